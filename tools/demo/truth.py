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

import torch

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.worker_job import CaptureJob
from draftcache.capture.prepare.job import PrepareConfig, prepare
from draftcache.capture.verifier.load import Verifier
from draftcache.draft_train.checkpoint import load_draft, load_state, resolve_checkpoint
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.measure import measure_draft
from draftcache.store.reader import StoreReader
from draftcache.tools.speculative_decode import plain_greedy, speculative_greedy


@dataclass(frozen=True)
class TruthResult:
    """The counts of the truth check, from which `lossless` and `offline_equals_online` follow."""

    traces: int
    tokens: int
    offline_steps: int
    online_steps: int
    lossless: bool

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
) -> TruthResult:
    """Run the check on `prompts` (token ids); its files stay in `directory`."""
    traces = [
        plain_greedy(verifier, list(prompt), max_new_tokens=max_new_tokens, eos_token_id=eos_token_id)
        for prompt in prompts
    ]
    kept = [(list(prompt), trace) for prompt, trace in zip(prompts, traces, strict=True) if len(trace) > 1]
    store = _capture_traces(kept, verifier_path, vocab_map, layers, directory)
    path = resolve_checkpoint(checkpoint)
    draft = load_draft(path, load_state(path), torch.device("cpu"))
    assert isinstance(draft.model, Eagle3Model), "the decoding loop runs Eagle3 drafts"
    frozen = FrozenWeights.load(store, torch.device("cpu"))
    counts = measure_draft(draft, frozen, store, store.members("truth"), draft_tokens=draft_tokens)
    target_ids = torch.from_numpy(store.vocab_map().target_ids)
    online = [
        speculative_greedy(
            verifier, draft.model, frozen.embed_tokens, target_ids, layers, prompt,
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


def _capture_traces(
    traces: list[tuple[list[int], list[int]]],
    verifier_path: Path,
    vocab_map: Path,
    layers: tuple[int, ...],
    directory: Path,
) -> StoreReader:
    """Prepare and capture (prompt, answer) pairs of token ids in float32, and keep every row."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = directory / "traces.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"token_ids": prompt + trace, "loss_mask": [0] * len(prompt) + [1] * len(trace)}) + "\n"
            for prompt, trace in traces
        ),
        encoding="utf-8",
    )
    prepare(
        PrepareConfig(
            tokenizer=verifier_path,
            output=directory / "prepared",
            splits={"truth": [rows]},
            held_out={},
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
        device="cpu",
    )
    CaptureJob(config).run()
    return StoreReader(directory / "store")
