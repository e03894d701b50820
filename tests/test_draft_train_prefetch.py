"""Reading ahead: the same batches to the bit, bounded memory, errors with their own words, no thread left behind."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from draftcache.draft_train.data.batches import Batch, BatchNeeds, HostRows, build_batch
from draftcache.draft_train.data.packed_batch import BatchLoader
from draftcache.draft_train.data.prefetch import Part, Prefetcher, local_readers, ring_bytes
from draftcache.draft_train.data.teacher import TeacherView
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import ShardDamagedError
from draftcache.store.common.pinned_ring import PinnedRing, aligned
from draftcache.store.reader import StoreReader
from draftcache.store.writer import StoreWriter
from support.synthetic import conversation, manifest, turns, write_files, write_store
from support.teacher_stores import OTHER, write_teacher_store
from support.training_runs import config

CPU = torch.device("cpu")


def loader_of(store: StoreReader, window: int | None = 16, size: int = 0) -> BatchLoader:
    teacher = TeacherView.of(store, store.manifest.teacher_form.choose(size))
    return BatchLoader(store, needs=BatchNeeds(steps=3, window=window), teacher=teacher)


def require_equal(mine: Batch, theirs: Batch) -> None:
    for item in fields(Batch):
        first, second = getattr(mine, item.name), getattr(theirs, item.name)
        if isinstance(first, torch.Tensor):
            assert first.dtype == second.dtype, item.name
            assert torch.equal(first, second), item.name
        elif isinstance(first, HostRows):
            for mine_of, theirs_of in zip(first, second, strict=True):
                np.testing.assert_array_equal(mine_of, theirs_of)
        else:
            assert first == second, item.name


def test_memory_for_reading_ahead_is_no_more_than_the_steps_can_use(tmp_path: Path) -> None:
    """One conversation a step never fills a pack, however large packs may be."""
    write_store(tmp_path / "store", per_shard=40)
    trainers = [Trainer(config(tmp_path, batch_conversations=size, pack_tokens=100_000)) for size in (1, 4)]
    loader = loader_of(trainers[0].store)
    alone, four = (ring_bytes(made.store, [loader], made.schedule, 1 << 30) - (1 << 20) for made in trainers)
    assert alone == 8 * int(loader.bytes[trainers[0].members].max())
    assert four > alone


@pytest.mark.parametrize("mode", ["float32", "bf16", "lossless", "int8", "fp8"])
@pytest.mark.parametrize("layout", ["zarr", "webdataset"])
def test_batches_are_those_of_the_plain_way(tmp_path: Path, mode: str, layout: str) -> None:
    write_store(tmp_path / "store", mode=mode, layout=layout, per_shard=6)
    store = StoreReader(tmp_path / "store")
    parts = [np.array([0, 3, 1]), np.array([5]), np.array([2, 4])] * 3
    loader = loader_of(store, None)
    with Prefetcher(store, [loader], [Part(part, 0.2) for part in parts], [CPU], most_bytes=1 << 16) as data:
        found = [data.next_batch() for _ in parts]
    for part, batch in zip(parts, found, strict=True):
        items = [store.read(int(number), decode=False) for number in part]
        require_equal(batch, build_batch(items, store.codec, max_steps=3, window=None, loss_share=0.2))


@pytest.mark.parametrize(("kind", "size"), [("full", OTHER), ("hidden", OTHER), ("draft", 0)])
@pytest.mark.parametrize("bf16", [False, True])
def test_batches_of_each_teacher_are_those_of_the_plain_way(tmp_path: Path, kind: str, size: int, bf16: bool) -> None:
    write_teacher_store(tmp_path / "store", kind, bf16=bf16)
    store = StoreReader(tmp_path / "store")
    loader, numbers = loader_of(store, size=size), np.array([2, 0])
    memory = torch.empty(loader.most_bytes(numbers), dtype=torch.uint8)
    packed = loader.read(store, numbers, 0.5, memory)
    batch = packed.unpack(store.codec, CPU)
    memory.zero_()  # what was unpacked is its own
    items = [store.read(int(number), decode=False) for number in numbers]
    require_equal(batch, build_batch(items, store.codec, max_steps=3, window=16, teacher=loader.teacher))


def write_long_store(path: Path) -> StoreReader:
    """Conversations with most rows out of a window of 16, kept all the same: captured without a window."""
    made = manifest(shards=1, splits=("train",))
    rng = np.random.default_rng(0)
    with StoreWriter(path, made, write_files) as writer:
        items = [conversation(rng, turns(3000, (2000, 2030), (2900, 2950)), number=number) for number in range(3)]
        writer.write_shard(0, items, {"quarantined": [], "gates": {}})
        writer.finish()
    return StoreReader(path)


def test_rows_out_of_the_drafts_window_are_not_read_and_do_not_matter(tmp_path: Path) -> None:
    """Loss and gradients are the same; with a window of 15 in the place of 16 they are not: the rows matter."""
    store = write_long_store(tmp_path / "store")
    trainer = Trainer(config(tmp_path))
    results = []
    for read_window in (16, None, 15):
        loader = loader_of(store)
        assert loader.read_window == 16
        loader.read_window = read_window
        numbers = np.array([0, 2])
        packed = loader.read(store, numbers, 0.5, torch.empty(loader.most_bytes(numbers), dtype=torch.uint8))
        gradients = gradients_of(trainer, packed.unpack(store.codec, CPU))
        results.append((packed.memory.numel(), gradients))
    (pruned_bytes, pruned), (whole_bytes, whole), (_, short) = results
    assert pruned_bytes < 0.2 * whole_bytes
    for mine, theirs in zip(pruned, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert any(
        not torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6) for mine, theirs in zip(short, whole, strict=True)
    )


def gradients_of(trainer: Trainer, batch: Batch) -> list[torch.Tensor]:
    """Of the trainer's draft on one batch, its loss first."""
    trainer.optimizer.zero_grad()
    result = trainer.learner.gradients(batch)
    return [result.loss.detach(), *(gradient_of(item) for item in trainer.model.parameters())]


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_window_that_capture_has_pruned_to_is_read_as_it_is(tmp_path: Path) -> None:
    write_store(tmp_path / "store", window=16)
    assert loader_of(StoreReader(tmp_path / "store")).read_window is None
    assert loader_of(StoreReader(tmp_path / "store"), 8).read_window == 8


def test_errors_of_the_threads_are_raised_where_the_batch_is_asked_for(tmp_path: Path) -> None:
    write_store(tmp_path / "store", per_shard=6)
    before = threading.active_count()
    store = StoreReader(tmp_path / "store")
    path = tmp_path / "store" / "shards" / "00000" / "tap_3" / "c.0.0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    parts = [Part(np.array([number]), 1.0) for number in (6, 0, 1)]
    with Prefetcher(store, [loader_of(store)], parts, [CPU], most_bytes=1 << 20) as reading:
        reading.next_batch()  # of the other shard
        with pytest.raises(ShardDamagedError, match=r"tap_3.*crc32c; run `draftcache repair`"):
            reading.next_batch()
    assert threading.active_count() == before


def test_threads_end_in_the_middle_and_nothing_is_asked_for_twice(tmp_path: Path) -> None:
    write_store(tmp_path / "store", per_shard=6)
    store, before = StoreReader(tmp_path / "store"), threading.active_count()
    parts = [Part(np.array([number % 6]), 1.0) for number in range(100)]
    with Prefetcher(store, [loader_of(store)], parts, [CPU], most_bytes=1 << 20) as data:
        data.next_batch()
        assert threading.active_count() > before
    assert threading.active_count() == before
    with Prefetcher(store, [loader_of(store)], parts[:1], [CPU], most_bytes=1 << 20) as data:
        data.next_batch()
        with pytest.raises(EOFError):
            data.next_batch()


def test_reading_ahead_keeps_to_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "store", per_shard=6)
    store = StoreReader(tmp_path / "store")
    loader = loader_of(store)
    one = aligned(loader.most_bytes(np.array([0])))  # 40 tokens each
    most = reached = 0
    take, give_back = PinnedRing.take, PinnedRing.give_back

    def watched_take(ring: PinnedRing, size: int, *, larger_alone: bool) -> torch.Tensor | None:
        nonlocal most, reached
        memory = take(ring, size, larger_alone=larger_alone)
        most += size if memory is not None else 0
        reached = max(reached, most)
        return memory

    def watched_give_back(ring: PinnedRing, memory: torch.Tensor) -> None:
        nonlocal most
        most -= memory.numel()
        give_back(ring, memory)

    monkeypatch.setattr(PinnedRing, "take", watched_take)
    monkeypatch.setattr(PinnedRing, "give_back", watched_give_back)
    parts = [Part(np.array([number % 6]), 1.0) for number in range(40)]
    for room, expected in ((3.5, 3), (1.5, 1), (0.5, 1)):
        reached = most = 0
        with Prefetcher(store, [loader], parts, [CPU], most_bytes=int(room * one)) as data:
            for _ in parts:
                data.next_batch()
                time.sleep(0.001)
        assert reached == expected * one


def test_waiting_for_data_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "store", per_shard=6)
    store = StoreReader(tmp_path / "store")
    slow = BatchLoader.read

    def late(*arguments: object) -> object:
        time.sleep(0.2)
        return slow(*arguments)  # type: ignore[arg-type]

    parts = [Part(np.array([0]), 1.0)]
    with Prefetcher(store, [loader_of(store)], parts, [CPU], most_bytes=1 << 20) as data:
        time.sleep(0.3)
        data.next_batch()
        assert data.waited < 0.1
    monkeypatch.setattr(BatchLoader, "read", late)
    with Prefetcher(store, [loader_of(store)], parts, [CPU], most_bytes=1 << 20) as data:
        data.next_batch()
        assert data.waited > 0.15


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(1, 1, 2), (6, 1, 3), (64, 1, 4), (64, 4, 4), (16, 8, 2)])
def test_threads_that_read_a_local_store_share_the_cores_with_other_ranks(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, threads: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert local_readers() == threads
