"""The GPU memory of a run over a store, and how many runs fit on a GPU side by side; computed without a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.drafts.registry import find_architecture
from draftcache.draft_train.drafts.sizes import BatchRows, VerifierShape
from draftcache.store.common.errors import InputError
from draftcache.store.reader import StoreReader

USABLE = 0.94
"""Share of a card's memory that training may fill; CUDA's context and fragmentation take the rest."""

SizedBatch = tuple[int, BatchRows]
"""The tokens of a micro-batch, and its rows."""


def largest_batches(store: StoreReader, config: TrainConfig) -> list[SizedBatch]:
    """Return two micro-batches: the conversation that takes most memory, and a full pack.

    The pack has the largest row shares of any conversation, and no tokens if a step has a single conversation. Raises
    InputError where the store has no conversations.
    """
    index, top_k = store.index, config.top_k or store.manifest.top_k
    if not len(index):
        raise InputError(f"{store.location}: expected conversations, found none")
    taken = index["rows"] * len(store.manifest.taps) + 12 * index["teacher_rows"]  # in units of one hidden state
    largest = index[int(taken.argmax())]
    rows = BatchRows(rows=int(largest["rows"]), starts=int(largest["teacher_rows"]), top_k=top_k)
    pack = config.pack_tokens * (config.batch_conversations > 1)
    shares = [float((index[name] / index["tokens"]).max()) for name in ("rows", "teacher_rows")]
    packed = BatchRows(rows=int(pack * shares[0]), starts=int(pack * shares[1]), top_k=top_k)
    return [(int(largest["tokens"]), rows), (pack, packed)]


def run_bytes(store: StoreReader, config: TrainConfig) -> dict[str, int]:
    """Return the GPU memory of a run's largest step, in bytes by `MEMORY_KINDS`."""
    architecture = find_architecture(config.draft)
    shape = architecture.shape_for(config, VerifierShape.of(store, config.draft_vocab_size))
    peaks = [architecture.peak_bytes(shape, config, rows) for _, rows in largest_batches(store, config)]
    return max(peaks, key=lambda peak: sum(peak.values()))


def side_by_side_bytes(runs: Sequence[dict[str, int]]) -> int:
    """Return an upper bound of the GPU memory of runs that train side by side on one device.

    `runs` holds `run_bytes` of each. Weights and micro-batches are counted once per run, as runs may need different
    rows; what a pass works with is counted for the largest run, as passes follow one another.
    """
    apart = ("weights and optimizer", "frozen weights", "micro-batch", "next micro-batch")
    own = sum(run[kind] for run in runs for kind in apart)
    return own + max(sum(size for kind, size in run.items() if kind not in apart) for run in runs)


def fitting(runs: Sequence[dict[str, int]], room: float) -> list[list[int]]:
    """Cut runs, whose `run_bytes` are given, into groups that fit into `room` bytes side by side, in their order.

    Returns the groups' positions in `runs`. A run that does not fit alone is a group of its own.
    """
    groups: list[list[int]] = []
    for number, run in enumerate(runs):
        if groups and side_by_side_bytes([*(runs[at] for at in groups[-1]), run]) <= room:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups
