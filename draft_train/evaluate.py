"""The offline acceptance of a draft, beside that of the untrained draft, of a bigram table and of other drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from draftcache.draft_train.acceptance import LENGTH_BUCKETS, AcceptanceCounts
from draftcache.draft_train.bigram import bigram_table
from draftcache.draft_train.by_length import figures, require_edges
from draftcache.draft_train.checkpoint import load_draft, load_state, resolve_checkpoint
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.data.teacher import TeacherView
from draftcache.draft_train.drafts.protocol import CheckpointState, Draft
from draftcache.draft_train.drafts.registry import find_architecture
from draftcache.draft_train.eval_record import KIND, conversation_record, recorded_counts
from draftcache.draft_train.examples import examples
from draftcache.draft_train.fit import require_fit
from draftcache.draft_train.intervals import LEVEL, RESAMPLES
from draftcache.draft_train.measure import Hits, Sampling, bigram_hits, draft_hits, measure
from draftcache.draft_train.sampled import SampledCounts, draft_overlaps, require_temperature
from draftcache.draft_train.setting_tables import CHOICES
from draftcache.draft_train.split_checks import members_of, warn_of_trained
from draftcache.store.common.device import use_device
from draftcache.store.common.errors import InputError, ManifestMismatchError
from draftcache.store.common.progress import progress_bar
from draftcache.store.format.teacher import DraftVocab
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import Location


def evaluate(
    *,
    store: Location,
    checkpoint: Path,
    splits: list[str],
    draft_tokens: int = 5,
    bigram_store: Location | None = None,
    bigram_splits: list[str] | None = None,
    compare: Sequence[Path] = (),
    length_buckets: Sequence[int] = LENGTH_BUCKETS,
    temperature: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    show_conversations: int = 0,
    device: str = "auto",
    compute: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Return the acceptance of a draft on splits of a store, beside the untrained draft and a bigram table.

    `checkpoint` is the directory of a checkpoint, the directory of a run (its newest checkpoint counts) or RUN/best.
    `draft_tokens` tokens are proposed per verify step. The bigram table is made only where `bigram_store` or
    `bigram_splits` is given: it counts these splits (by default those that the draft was trained on) of that store (by
    default `store`), which is one more reading of all their token ids. `compare` holds other drafts: checkpoints, which
    are measured on the same batches, or JSON files of earlier evaluations on the same conversations. `length_buckets`
    are the tokens that separate buckets of positions and of lengths. With a `temperature`, the interval of acceptance
    under speculative sampling is counted too (see `sampled`). Intervals are over `resamples` draws of conversations
    with `seed`. `show_conversations` of the best and of the worst conversations are kept token by token. With `compute`
    "auto" the draft computes as in training, on a GPU in bfloat16; "plain" is the reference in float32, several times
    slower. `progress` shows a bar.

    The result holds JSON values: `checkpoint`, `step`, what was asked for, and under `splits` for each split the
    figures of `draft`, `untrained` and, if it was made, `bigram`, as `by_length.figures` returns them; where they were
    asked for, `compared` ({name: figures}), `differences` (the draft minus each of them), `draft`'s `sampled`,
    and `examples`. `conversations` is what `eval_record.conversation_record` returns, by split.

    Raises CheckpointError or ManifestMismatchError where checkpoint and store don't belong together, and InputError for
    a split that is named twice, or that the store does not have.
    """
    if draft_tokens < 1:
        raise InputError(f"--draft-tokens: expected at least 1, found {draft_tokens}")
    if compute not in CHOICES["compute"]:
        raise InputError(f"--compute: expected one of {list(CHOICES['compute'])}, found {compute!r}")
    if resamples < 100:
        raise InputError(f"--resamples: expected at least 100, found {resamples}")
    if seed < 0:
        raise InputError(f"--seed: expected 0 or more, found {seed}")
    edges = require_edges(length_buckets)
    if temperature is not None:
        require_temperature(temperature)
    run = _Evaluation(
        StoreReader(store), use_device(device), draft_tokens, compute, edges, temperature, resamples, seed
    )
    run.load(checkpoint, [path for path in compare if not _is_record(path)])
    members = _members(run.store, splits, run.state)
    counted = None
    if bigram_store is not None or bigram_splits is not None:
        counted = _bigram_members(run.store, bigram_store, bigram_splits or run.state.objective["splits"])
        run.bigram = bigram_hits(bigram_table(*counted), run.device)
    result = run.header()
    tokens = sum(int(run.store.index["tokens"][numbers].sum()) for numbers in members.values()) * run.passes
    with progress_bar(total=tokens, unit="tok", unit_scale=True, desc="eval", disable=not progress) as bar:
        for split, numbers in members.items():
            found, sampled = run.measure(numbers, bar.update)
            for path in filter(_is_record, compare):
                found[str(path)] = recorded_counts(path, split, run.store, numbers, found["draft"])
            result["splits"][split] = run.figures(found, sampled, numbers, [str(path) for path in compare])
            result["conversations"][split] = conversation_record(run.store, numbers, found)
            if show_conversations:
                draft = run.drafts["draft"]
                result["splits"][split]["examples"] = examples(
                    run.store, numbers, found["draft"], draft.draft, draft.frozen, each=show_conversations
                )
    return result


@dataclass(frozen=True)
class _Loaded:
    """A draft that is measured."""

    path: Path
    state: CheckpointState
    vocab: DraftVocab
    frozen: FrozenWeights
    draft: Draft

    @property
    def reads(self) -> tuple[int, str]:
        """What a batch has to be made for: drafts that agree in it are measured on the same batches."""
        return self.draft.shape.sliding_window or 0, self.vocab.hash


@dataclass
class _Evaluation:
    """One evaluation: the store, the drafts, and what is asked of them."""

    store: StoreReader
    device: torch.device
    draft_tokens: int
    compute: str
    edges: tuple[int, ...]
    temperature: float | None
    resamples: int
    seed: int
    drafts: dict[str, _Loaded] = field(default_factory=dict)
    """By name: "draft", "untrained", and the paths of those to compare with."""
    bigram: Hits | None = None

    @property
    def state(self) -> CheckpointState:
        return self.drafts["draft"].state

    @property
    def passes(self) -> int:
        """How often the store is read: drafts with another window or vocabulary than the first need other batches."""
        return len({item.reads for item in self.drafts.values()})

    def load(self, checkpoint: Path, others: Sequence[Path]) -> None:
        """Load the draft, the untrained draft of its shape, and the drafts to compare with."""
        names = ["draft", *map(str, others)]
        if len(set(names)) < len(names):
            raise InputError(f"--compare: expected every draft once, found {names[1:]}")
        for name, given in zip(names, (checkpoint, *others), strict=True):
            path = resolve_checkpoint(given)
            state = load_state(path)
            vocab = require_fit(path, state, self.store)
            frozen = next((item.frozen for item in self.drafts.values() if item.vocab == vocab), None)
            frozen = frozen or FrozenWeights.load(self.store, self.device, vocab)
            self.drafts[name] = _Loaded(path, state, vocab, frozen, load_draft(path, state, self.device))
        main = self.drafts["draft"]
        untrained = find_architecture(main.state.architecture).build(main.state.shape, self.device)
        untrained.initialize(int(main.state.objective["seed"]), main.frozen, main.state.objective["head_init"])
        self.drafts["untrained"] = _Loaded(main.path, main.state, main.vocab, main.frozen, untrained)

    def header(self) -> dict[str, Any]:
        """Return the part of the result that is no figure."""
        main = self.drafts["draft"]
        return {
            "kind": KIND,
            "checkpoint": main.path.name,
            "checkpoint_path": str(main.path.absolute()),
            "step": main.state.step,
            "longest_in_training_store": main.state.longest,
            "store": self.store.location,
            "store_hash": self.store.manifest.hash,
            "draft_tokens": self.draft_tokens,
            "length_buckets": list(self.edges),
            "temperature": self.temperature,
            "level": LEVEL,
            "resamples": self.resamples,
            "seed": self.seed,
            "splits": {},
            "conversations": {},
        }

    def measure(
        self, members: NDArray[np.int64], progress: Any
    ) -> tuple[dict[str, AcceptanceCounts], dict[str, SampledCounts]]:
        """Return the counts of all drafts on some conversations: greedy ones, and with a temperature sampled ones."""
        found: dict[str, AcceptanceCounts] = {}
        sampled: dict[str, SampledCounts] = {}
        for reads in dict.fromkeys(item.reads for item in self.drafts.values()):
            some = {name: item for name, item in self.drafts.items() if item.reads == reads}
            hits = {
                name: draft_hits(
                    item.draft, item.frozen, self.store, draft_tokens=self.draft_tokens, compute=self.compute
                )
                for name, item in some.items()
            }
            if self.bigram is not None and "draft" in some:
                hits["bigram"] = self.bigram
            sampling = self._sampling(some, len(members))
            found |= measure(
                self.store,
                members,
                hits,
                draft_tokens=self.draft_tokens,
                window=reads[0] or None,
                device=self.device,
                edges=self.edges,
                sampled=sampling,
                progress=lambda size: progress(size),
            )
            sampled |= {} if sampling is None else sampling.counts
        return found, sampled

    def _sampling(self, some: dict[str, _Loaded], members: int) -> Sampling | None:
        if self.temperature is None:
            return None
        trained = {name: item for name, item in some.items() if name != "untrained"}
        if not trained:
            return None
        view = TeacherView.of(self.store, next(iter(trained.values())).vocab)
        overlaps = {
            name: draft_overlaps(
                item.draft, item.frozen, self.store,
                draft_tokens=self.draft_tokens, temperature=self.temperature, compute=self.compute,
            )
            for name, item in trained.items()
        }  # fmt: skip
        counts = {name: SampledCounts(self.draft_tokens, self.temperature, members) for name in trained}
        return Sampling(view, overlaps, counts)

    def figures(
        self,
        found: dict[str, AcceptanceCounts],
        sampled: dict[str, SampledCounts],
        members: NDArray[np.int64],
        compared: list[str],
    ) -> dict[str, Any]:
        """Return the figures of a split."""
        lengths = self.store.index["tokens"][members].astype(np.int64)
        pairs = [("draft", name) for name in compared]
        made = figures(found, lengths, compare=pairs, resamples=self.resamples, seed=self.seed)
        for name, counts in sampled.items():
            made[name]["sampled"] = counts.to_json(resamples=self.resamples, seed=self.seed)
        result: dict[str, Any] = {name: made[name] for name in ("draft", "untrained", "bigram") if name in made}
        if compared:
            result |= {"compared": {name: made[name] for name in compared}, "differences": made["differences"]}
        return result


def _is_record(path: Path) -> bool:
    """Return whether this draft to compare with is the file of an earlier evaluation."""
    return path.is_file()


def _members(store: StoreReader, splits: list[str], state: CheckpointState) -> dict[str, NDArray[np.int64]]:
    """Return the numbers of the conversations of each split, and say where the draft was trained on some of them."""
    members_of(store, splits, "--splits")  # no split twice
    if state.store_hash == store.manifest.hash:
        for split in splits:
            warn_of_trained(store, split, state.objective["splits"])
    return {split: members_of(store, [split], "--splits") for split in splits}


def _bigram_members(
    store: StoreReader, other: Location | None, splits: list[str]
) -> tuple[StoreReader, NDArray[np.int64]]:
    """Return the store that the bigram table counts, and the numbers of its conversations."""
    counted = StoreReader(other) if other is not None else store
    mine, theirs = store.manifest.tokenizer_hash, counted.manifest.tokenizer_hash
    if mine != theirs:
        raise ManifestMismatchError(f"{counted.location}: expected tokenizer {mine}, found {theirs}")
    return counted, members_of(counted, splits, "--bigram-splits")
