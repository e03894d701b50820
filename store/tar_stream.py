"""Streams tar shards from front to back: whole shards are dealt to ranks and workers, and every byte is checked.

This is for people whose data lives in tar pipelines. A stream can't do three things that random reads by `StoreReader`
can: single conversations by number, batches of like length, and a resume inside an epoch without reading the
conversations before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from draftcache.store.common.errors import StreamingError
from draftcache.store.format.commits import Record, shard_number
from draftcache.store.format.schema import Conversation
from draftcache.store.layouts.tar_samples import read_tar
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import Location


@dataclass(frozen=True)
class Reader:
    """Which of all readers this one is: worker `worker` of `workers` on rank `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    workers: int = 1


class TarStream:
    """An iterable of one epoch's batches of conversations. Every rank gets the same number of batches.

    Shards go to ranks and workers by size. Their order, and whether conversations are left out at a reader's start or
    end, is a pure function of (seed, epoch), so that no conversation is left out for good. `dropped` says how many
    conversations all ranks together leave out in this epoch.
    """

    def __init__(
        self,
        location: Location,
        *,
        split: str | None = None,
        reader: Reader | None = None,
        batch_size: int = 1,
        seed: int = 0,
        epoch: int = 0,
        uneven: str = "drop",
        skip_batches: int = 0,
        decode: bool = True,
    ) -> None:
        """Open the store at a path or URL and deal out its shards.

        All ranks and workers must be given the same arguments, except for `reader`, which says which of them this one
        is. `split` names one split, by default all. `uneven` "drop" leaves out the conversations that some ranks have
        more than others; with "repeat", ranks that have fewer begin again. `skip_batches` are read but not given out,
        to resume inside an epoch. Without `decode`, taps stay in the form of the arrays that the codec made of them.

        Raises StreamingError for an argument out of range, a store of another layout, fewer shards than ranks, or too
        few conversations for a batch on every rank; ShardDamagedError where a commit record is missing or misplaced;
        and the errors of `StoreReader`.
        """
        self._store = StoreReader(location)
        self._reader = reader or Reader()
        self._decode, self._batch_size, self._skip = decode, batch_size, skip_batches
        self._uneven = uneven
        manifest = self._store.manifest
        if manifest.layout != "webdataset":
            raise StreamingError(
                f"{self._store.location}: expected tar shards, found {manifest.layout}; read it with StoreReader, "
                "or run `draftcache convert --layout webdataset`"
            )
        if uneven not in ("drop", "repeat") or batch_size < 1 or skip_batches < 0:
            raise StreamingError(
                f"expected uneven drop or repeat, batch_size >= 1 and skip_batches >= 0, found {uneven!r}, "
                f"{batch_size} and {skip_batches}"
            )
        if split is not None and split not in manifest.splits:
            raise StreamingError(
                f"{self._store.location}: expected a split of {list(manifest.splits)}, found {split!r}"
            )
        self._records = [record for record in self._store.records() if self._wanted(record, split)]
        if len(self._records) < self._reader.world_size:
            raise StreamingError(
                f"{self._store.location}: expected at least {self._reader.world_size} shards, one for each rank, found "
                f"{len(self._records)}; make smaller ones with `draftcache convert --shard-tokens`"
            )
        self._dealt = self._deal(seed, epoch)
        self._share_out(seed, epoch)

    def _wanted(self, record: Record, split: str | None) -> bool:
        """Return whether a shard has conversations and, as shards hold one split each, is of the split asked for."""
        if not record["conversations"]:
            return False
        index = self._store.index
        first = index[np.flatnonzero(index["shard"] == shard_number(record["directory"]))[0]]
        return split is None or self._store.manifest.splits.index(split) == first["split"]

    def _deal(self, seed: int, epoch: int) -> list[list[list[Record]]]:
        """Return the shards of each worker of each rank."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self._records))
        shuffled = [self._records[int(number)] for number in order]
        ranks = _balanced(shuffled, self._reader.world_size)
        return [_balanced(shards, self._reader.workers) for shards in ranks]

    def _share_out(self, seed: int, epoch: int) -> None:
        """Choose how many batches this worker gives, with equal sums for all ranks, and its first conversation."""
        size = self._batch_size
        counts = [[sum(record["conversations"] for record in shards) for shards in rank] for rank in self._dealt]
        batches = [[count // size for count in rank] for rank in counts]
        totals = [sum(rank) for rank in batches]
        self._total = min(totals) if self._uneven == "drop" else max(totals)
        if not self._total:
            raise StreamingError(
                f"{self._store.location}: expected at least {size} conversations for a worker of every rank, found "
                f"ranks of {[sum(rank) for rank in counts]}; lower the batch size"
            )
        mine = batches[self._reader.rank]
        if self._uneven == "drop":
            for _ in range(sum(mine) - self._total):
                mine[mine.index(max(mine))] -= 1
        else:
            busy = [worker for worker, count in enumerate(counts[self._reader.rank]) if count]
            for number in range(self._total - sum(mine)):
                mine[busy[number % len(busy)]] += 1
        self._quota = mine[self._reader.worker]
        surplus = counts[self._reader.rank][self._reader.worker] - self._quota * size
        draw = np.random.default_rng([seed, epoch, self._reader.rank, self._reader.worker])
        self._start = int(draw.integers(surplus + 1)) if surplus > 0 else 0
        held = sum(sum(rank) for rank in counts)
        self.dropped = held - self._total * size * self._reader.world_size if self._uneven == "drop" else 0

    def __len__(self) -> int:
        """Return the number of batches of this rank's workers together, which is the same for every rank."""
        return int(self._total)

    def __getitem__(self, number: int) -> Conversation:
        raise StreamingError(
            f"{self._store.location}: a stream has no conversation {number}: read single ones with StoreReader"
        )

    def __iter__(self) -> Iterator[list[Conversation]]:
        shards = self._dealt[self._reader.rank][self._reader.worker]
        batch: list[Conversation] = []
        given = 0
        passed = 0
        while given < self._quota:
            for item in self._conversations(shards):
                if passed < self._start:
                    passed += 1
                    continue
                batch.append(item)
                if len(batch) == self._batch_size:
                    given += 1
                    if given > self._skip:
                        yield [self._store.decode(one) if self._decode else one for one in batch]
                    batch = []
                    if given == self._quota:
                        return

    def _conversations(self, shards: list[Record]) -> Iterator[Conversation]:
        for record in shards:
            index = self._store.index[self._store.index["shard"] == shard_number(record["directory"])]
            yield from read_tar(self._store.storage, record, self._store.specs, index)


def _balanced(records: list[Record], parts: int) -> list[list[Record]]:
    """Divide records into `parts`, each of which keeps their order.

    The largest shard goes first, and each one to the part that has the fewest conversations so far.
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for number in sorted(range(len(records)), key=lambda number: -int(records[number]["conversations"])):
        least = sizes.index(min(sizes))
        dealt[least].append(number)
        sizes[least] += records[number]["conversations"]
    return [[records[number] for number in sorted(part)] for part in dealt]
