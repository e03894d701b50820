"""draftcache's own proposals where the engine made its, by `tools.decoding`, which shares no code with training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from draftcache.draft_train.checkpoint import load_draft, load_state
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.store.common.progress import progress_bar
from draftcache.store.format.array_spec import tap_name
from draftcache.store.reader import StoreReader
from draftcache.tools.decoding.loop import draft_cache
from draftcache.tools.engine_check.comparison import ProposalCounts, Walk

MOST_CHAINS = 2000
"""Chains that are compared. One takes about 10 ms, because keys are lists of rows."""


def chosen_traces(walks: Sequence[Walk], lengths: Sequence[int], most: int = MOST_CHAINS) -> list[int]:
    """Return the numbers of traces whose chains are compared: evenly spaced by length, the longest among them."""
    order = sorted(range(len(walks)), key=lambda number: lengths[number], reverse=True)
    total = sum(len(found.steps) for found in walks)
    stride = max(1, -(-total // most))
    return order[::stride]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: on rows this small others only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def compare_proposals(
    walks: Sequence[Walk],
    traces: Sequence[tuple[Sequence[int], Sequence[int]]],
    numbers: Sequence[int],
    store: StoreReader,
    checkpoint: Path,
    draft_tokens: int,
    margin: float,
) -> ProposalCounts:
    """Compare the engine's proposals with ours on the traces `numbers`, (prompt, answer) each, in the store's order.

    The draft runs in float32 on the CPU, on the store's taps.
    """
    state = load_state(checkpoint)
    draft = load_draft(checkpoint, state, torch.device("cpu"))
    vocab = store.manifest.teacher_form.choose(draft.shape.draft_vocab_size)
    embeddings = FrozenWeights.load(store, torch.device("cpu"), vocab).embed_tokens.float()
    target_ids = torch.from_numpy(store.vocab_map(draft.shape.draft_vocab_size).target_ids)
    places = {int(row["dataset_index"]): number for number, row in enumerate(store.index)}
    counts = ProposalCounts(margin)
    with progress_bar(total=len(numbers), unit="trace", desc="our proposals") as bar, one_thread():
        for trace in numbers:
            prompt, text = traces[trace]
            tokens, taps = [*prompt, *text], _taps(store, places[trace])
            cache = draft_cache(draft, embeddings)
            for step in walks[trace].steps:
                known = tokens[: len(prompt) + step.produced]
                ours = cache.propose(taps, known, target_ids, draft_tokens)
                counts.add(step.proposed, ours, trace, step.produced)
            bar.update(1)
    return counts


def _taps(store: StoreReader, number: int) -> Tensor:
    """Return the taps [rows, taps * H] float32 of a conversation, from row 0 on."""
    names = [tap_name(layer) for layer in store.manifest.layers]
    item = store.read(number, names)
    return torch.from_numpy(np.concatenate([item.arrays[name] for name in names], axis=1))
