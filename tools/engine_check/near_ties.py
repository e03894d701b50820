"""Whether two greedy texts part at a near-tie of the verifier, where rounding decides and neither is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch


@torch.inference_mode()
def margins_at(verifier: Path, prefixes: Mapping[int, Sequence[int]], *, dtype: str, device: str) -> dict[int, float]:
    """Return by how much the verifier's best next logit is above the second best, after each of these token ids."""
    if not prefixes:
        return {}
    from draftcache.capture.verifier.head import head_logits
    from draftcache.capture.verifier.load import choose_dtype, load_verifier
    from draftcache.capture.verifier.ssm_precision import enforce_contract
    from draftcache.store.common.device import use_device

    chosen = use_device(device)
    loaded = load_verifier(verifier, device=chosen, dtype=choose_dtype(dtype, chosen), trust_remote_code=False)
    enforce_contract(loaded.model, verifier, allow_fallback=False)
    found = {}
    for number, tokens in prefixes.items():
        final = loaded.forward(torch.tensor(list(tokens)), ()).final[-1:]
        best = head_logits(final, loaded.head, loaded.head_form)[0].float().topk(2).values
        found[number] = float(best[0] - best[1])
    return found
