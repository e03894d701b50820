"""The held-out loss of the demo's verifier: every conversation runs alone, from a fresh state, as in serving."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HeldOut", "held_out_losses", "perplexities"]

_CHUNK = 64
_SPANS = ("all", "assistant")


@dataclass(frozen=True)
class HeldOut:
    """Padded held-out conversations: ids int64, assistant mask and validity mask bool, each [N, L]."""

    ids: Tensor
    assistant: Tensor
    valid: Tensor
    sources: tuple[str, ...]

    @classmethod
    def read(cls, corpus: Path, device: torch.device, longest: int = 1024) -> HeldOut:
        """Read the val split of `tokens.npz`; longer conversations are cut at `longest` tokens."""
        with np.load(corpus / "tokens.npz", allow_pickle=False) as arrays:
            tokens, lengths = arrays["val_tokens"], arrays["val_lengths"]
            assistant, sources = arrays["val_assistant"], arrays["val_sources"]
        width = min(longest, -(-int(lengths.max()) // _CHUNK) * _CHUNK)
        ids = np.zeros((len(lengths), width), np.int64)
        mask = np.zeros((len(lengths), width), bool)
        ends = np.cumsum(lengths)
        for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            kept = min(int(length), width)
            ids[row, :kept] = tokens[end - length : end - length + kept]
            mask[row, :kept] = assistant[end - length : end - length + kept].astype(bool)
        valid = np.arange(width)[None] < lengths[:, None]
        tensors = [torch.from_numpy(array).to(device) for array in (ids, mask, valid)]
        return cls(tensors[0], tensors[1], tensors[2], tuple(map(str, sources)))


@torch.no_grad()
def _sums(model: nn.Module, held_out: HeldOut, limit: int, batch: int) -> dict[str, dict[str, Tensor]]:
    """Return per source the summed loss (nats) and the token count, over all tokens and over the assistant's."""
    totals: dict[str, dict[str, Tensor]] = {}
    order = torch.randperm(len(held_out.ids), generator=torch.Generator().manual_seed(0))[:limit]
    device = held_out.ids.device
    for rows in torch.split(order.to(device), batch):
        ids = held_out.ids[rows]
        masks = {"full_attention": None, "linear_attention": None}
        with torch.autocast(device.type, dtype=torch.bfloat16):
            hidden = model.get_submodule("model")(
                input_ids=ids, attention_mask=masks, use_cache=False
            ).last_hidden_state
            logits = model.get_submodule("lm_head")(hidden[:, :-1])
        loss = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        for position, row in enumerate(rows.tolist()):
            empty = {key: torch.zeros(2, device=device) for key in _SPANS}
            into = totals.setdefault(held_out.sources[row], empty)
            for key, mask in (("all", held_out.valid), ("assistant", held_out.assistant)):
                chosen = mask[row, 1:]
                into[key] += torch.stack([(loss[position] * chosen).sum(), chosen.sum()])
    return totals


def held_out_losses(model: nn.Module, held_out: HeldOut, *, limit: int, batch: int = 64) -> dict[str, float]:
    """Return the mean loss per assistant token (nats) by source, on the first `limit` rows of a fixed order."""
    model.eval()
    totals = _sums(model, held_out, limit, batch)
    model.train()
    return {source: float(sums["assistant"][0] / sums["assistant"][1]) for source, sums in sorted(totals.items())}


def perplexities(model: nn.Module, held_out: HeldOut, batch: int = 64) -> dict[str, dict[str, Any]]:
    """Return perplexities and token counts by source and in `total`, for the assistant's tokens and for all tokens."""
    model.eval()
    totals = _sums(model, held_out, len(held_out.ids), batch)
    together = {key: torch.stack([sums[key] for sums in totals.values()]).sum(0) for key in _SPANS}
    report: dict[str, dict[str, Any]] = {}
    for source, sums in (*sorted(totals.items()), ("total", together)):
        report[source] = {
            "assistant_perplexity": round(math.exp(float(sums["assistant"][0] / sums["assistant"][1])), 3),
            "assistant_tokens": int(sums["assistant"][1]),
            "perplexity": round(math.exp(float(sums["all"][0] / sums["all"][1])), 3),
            "tokens": int(sums["all"][1]),
        }
    return report
