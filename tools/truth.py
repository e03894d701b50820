"""The truth check: compare offline acceptance with real greedy speculative decoding by the same draft.

Traces are written by plain greedy decoding, captured in float32 (bf16 rounding could flip a near-tie between two
ways of computing the same state), evaluated offline, and decoded again speculatively. The text must be equal token
for token, and the number of verify steps must be equal too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.worker_job import CaptureJob
from draftcache.capture.prepare.job import PrepareConfig, prepare
from draftcache.capture.verifier.load import Verifier, load_verifier
from draftcache.capture.verifier.ssm_precision import enforce_contract
from draftcache.capture.verifier.weights import former_fingerprint, weights_fingerprint
from draftcache.draft_train.checkpoint import load_draft, load_state, resolve_checkpoint
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.drafts.protocol import CheckpointState
from draftcache.draft_train.drafts.registry import find_architecture
from draftcache.draft_train.fit import require_fit
from draftcache.draft_train.measure import measure_draft
from draftcache.store.common.errors import InputError, ManifestMismatchError
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import Location
from draftcache.tools.decoding.loop import has_cache, plain_greedy, speculative_greedy

SPLIT = "truth"
"""The split that `capture_traces` makes."""


@dataclass(frozen=True)
class TruthResult:
    """The counts of the truth check, from which `lossless` and `offline_equals_online` follow."""

    traces: int
    tokens: int
    offline_steps: int
    online_steps: int
    lossless: bool

    def to_json(self) -> dict[str, Any]:
        """Return the counts, and whether text and verify steps were equal."""
        return {
            "traces": self.traces,
            "tokens": self.tokens,
            "text_equal": self.lossless,
            "offline_verify_steps": self.offline_steps,
            "online_verify_steps": self.online_steps,
            "steps_equal": self.offline_equals_online,
        }

    @property
    def offline_equals_online(self) -> bool:
        """Whether the offline number of verify steps is the number that speculative decoding made."""
        return self.offline_steps == self.online_steps


def truth_check(
    *,
    verifier: Verifier,
    verifier_path: Path,
    vocab_map: Path,
    checkpoint: Path,
    prompts: Sequence[Sequence[int]],
    eos_token_id: int,
    max_new_tokens: int,
    layers: tuple[int, ...],
    directory: Path,
    draft_tokens: int = 5,
    device: str = "cpu",
) -> TruthResult:
    """Run the check on `prompts` (token ids); its files stay in `directory`.

    `device` is where capture loads the verifier once more, the one that `verifier` is on. The draft runs on the CPU.
    """
    traces = [
        plain_greedy(verifier, list(prompt), max_new_tokens=max_new_tokens, eos_token_id=eos_token_id)
        for prompt in prompts
    ]
    kept = [(list(prompt), trace) for prompt, trace in zip(prompts, traces, strict=True) if len(trace) > 1]
    store = capture_traces(kept, verifier_path, layers, directory, vocab_map=vocab_map, device=device)
    path = resolve_checkpoint(checkpoint)
    draft = load_draft(path, load_state(path), torch.device("cpu"))
    assert has_cache(draft), "the caller has checked it"
    frozen = FrozenWeights.load(store, torch.device("cpu"))
    counts = measure_draft(draft, frozen, store, store.members(SPLIT), draft_tokens=draft_tokens)
    target_ids = torch.from_numpy(store.vocab_map().target_ids)
    online = [
        speculative_greedy(
            verifier, draft, frozen.embed_tokens, target_ids, layers, prompt,
            max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, draft_tokens=draft_tokens,
        )
        for prompt, _ in kept
    ]  # fmt: skip
    return TruthResult(
        traces=len(kept),
        tokens=sum(len(trace) for _, trace in kept),
        offline_steps=counts.verify_steps,
        online_steps=sum(result.verify_steps for result in online),
        lossless=all(result.token_ids == trace for result, (_, trace) in zip(online, kept, strict=True)),
    )


def capture_traces(
    traces: Sequence[tuple[Sequence[int], Sequence[int]]],
    verifier_path: Path,
    layers: tuple[int, ...],
    directory: Path,
    *,
    vocab_map: Path | None = None,
    draft_vocab_size: int | None = None,
    compute_dtype: str = "float32",
    device: str = "cpu",
) -> StoreReader:
    """Prepare and capture (prompt, answer) pairs of token ids, as the split `truth`, and keep every row in float32.

    The draft vocabulary is `vocab_map`'s, or the `draft_vocab_size` most frequent ids of the answers.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = directory / "traces.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"token_ids": [*prompt, *trace], "loss_mask": [0] * len(prompt) + [1] * len(trace)}) + "\n"
            for prompt, trace in traces
        ),
        encoding="utf-8",
    )
    prepare(
        PrepareConfig(
            tokenizer=verifier_path,
            output=directory / "prepared",
            splits={SPLIT: [rows]},
            held_out={},
            draft_vocab_size=draft_vocab_size,
            workers=1,
            overwrite=True,
            progress=False,
        )
    )
    config = CaptureConfig(
        verifier=verifier_path,
        dataset=directory / "prepared",
        output=directory / "store",
        layers=layers,
        vocab_map=vocab_map,
        mode="float32",
        window=0,
        compute_dtype=compute_dtype,
        device=device,
    )
    CaptureJob(config).run()
    return StoreReader(directory / "store")


def online_check(
    *,
    store: Location,
    verifier_path: Path,
    checkpoint: Path,
    splits: Sequence[str],
    prompts: int,
    max_new_tokens: int,
    draft_tokens: int,
    directory: Path,
    device: torch.device,
) -> TruthResult:
    """Run the check on the shortest prompts of a store's splits, with the verifier of that store in float32.

    A prompt is what comes before the first turn of a conversation. Raises ManifestMismatchError where the verifier is
    not the store's, and InputError where there is no prompt or the draft is none that the decoding loop runs.
    """
    reader = StoreReader(store)
    state = require_online(reader, verifier_path, checkpoint)
    verifier = load_verifier(verifier_path, device=device, dtype=torch.float32, trust_remote_code=False)
    enforce_contract(verifier.model, verifier_path, allow_fallback=False)
    vocab = reader.manifest.teacher_form.choose(state.shape.draft_vocab_size)
    files = reader.files
    return truth_check(
        verifier=verifier,
        verifier_path=verifier_path,
        vocab_map=files.more_vocab_maps.get(vocab.size, files.vocab_map),
        checkpoint=checkpoint,
        prompts=opening_prompts(reader, splits, prompts),
        eos_token_id=_end_of_turn(reader),
        max_new_tokens=max_new_tokens,
        layers=reader.manifest.layers,
        directory=directory,
        draft_tokens=draft_tokens,
        device=str(device),
    )


def require_online(store: StoreReader, verifier_path: Path, checkpoint: Path) -> CheckpointState:
    """Return the checkpoint's state. Raises what `online_check` raises, in a second and before anything is computed."""
    state = load_state(resolve_checkpoint(checkpoint))
    require_fit(checkpoint, state, store)
    if not has_cache(find_architecture(state.architecture).build(state.shape, torch.device("meta"))):
        raise InputError(f"--online: expected a draft that the decoding loop can run, found {state.architecture}")
    expected, known = store.manifest.verifier["weights_hash"], (weights_fingerprint, former_fingerprint)
    if expected not in (found := [fingerprint(verifier_path) for fingerprint in known]):
        raise ManifestMismatchError(
            f"--verifier {verifier_path}: expected the weights of {store.location}'s verifier, {expected}, found "
            f"{found[0]}; the count of another verifier says nothing of this store"
        )
    return state


def opening_prompts(store: StoreReader, splits: Sequence[str], most: int, *, shortest: bool = True) -> list[list[int]]:
    """Return prompts of the splits that differ, as token ids, by length: the shortest ones, or some of every length.

    Raises InputError where there is none.
    """
    found: set[tuple[int, ...]] = set()
    members = np.concatenate([store.members(split) for split in splits])
    members = members[np.argsort(store.index["tokens"][members], kind="stable")]
    # The shortest prompts are looked for among the shortest conversations, so that a large store is not read in full.
    tried = members[: 16 * most] if shortest else members[_spread(len(members), 4 * most)]
    for number in tried:
        item = store.read(int(number), ["token_ids", "loss_mask"])
        if item.loss_mask.any() and (opening := int(np.argmax(item.loss_mask))):
            found.add(tuple(item.arrays["token_ids"][:opening].tolist()))
    if not found:
        raise InputError(f"{store.location}: expected conversations with a prompt in {list(splits)}, found none")
    prompts = [list(prompt) for prompt in sorted(found, key=lambda prompt: (len(prompt), prompt))]
    return prompts[:most] if shortest else [prompts[place] for place in _spread(len(prompts), most)]


def _spread(count: int, most: int) -> list[int]:
    """Return at most `most` places of `count`, evenly spaced, the first and the last among them."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).astype(int).tolist()))


def _end_of_turn(store: StoreReader) -> int:
    """Return the verifier's end-of-sequence token, or -1, which no token is, where its configuration names none."""
    named = store.manifest.verifier.get("eos_token_id")
    if isinstance(named, list):
        named = named[0] if named else None
    return -1 if named is None else int(named)
