"""Computing one shard: conversations -> verifier -> teacher and codec on the device -> gates -> the shard.

While the device computes a batch, the batch before is copied to the host, and a thread judges, compresses and writes
the batches before that, and closes the shard's files behind the last one. The device waits only for host memory: at
most `buffer_bytes` are computed and not written yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftcache.capture.job.batches import token_batches
from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.gates import Gates, gate_statistics
from draftcache.capture.job.overlap import HostArrays, Writing
from draftcache.capture.job.progress import Progress
from draftcache.capture.job.work_plan import ShardPlan, WorkPlan
from draftcache.capture.verifier.forward import Piece
from draftcache.capture.verifier.source import ReadsAhead, StateSource
from draftcache.capture.verifier.teacher import TeacherHead, teacher_signal
from draftcache.store.common.errors import GateError
from draftcache.store.common.pinned_ring import PinnedRing
from draftcache.store.format import torch_codecs
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.format.rows import rows_in_reach, teacher_positions
from draftcache.store.format.schema import Conversation
from draftcache.store.format.teacher_stats import tail_mass
from draftcache.store.format.vocab_map import VocabMap
from draftcache.store.shard_in_progress import ShardInProgress

_STATISTICS = "gate statistics"
_GPU_MULTIPLE = 128
"""On a GPU, batches are padded to a multiple of this length: the scan's chunk is as long, and Triton compiles a new
kernel for a length that 16 does not divide."""


@dataclass
class ShardSummary:
    """What a shard's commit record says in addition to its files."""

    quarantined: list[dict[str, Any]] = field(default_factory=list)
    tails: list[NDArray[Any]] = field(default_factory=list)
    """Per conversation, tau [P] of `draftcache.store.format.teacher_stats.tail_mass`."""
    norms: dict[str, Any] = field(default_factory=dict)
    """Statistics of the conversations' norms, from `Gates.norms_json`."""


@dataclass
class _Task:
    """One conversation on its way from the device to the shard; `positions` and `teacher` are ascending."""

    number: int
    token_ids: NDArray[Any]
    loss_mask: NDArray[np.bool_]
    content_hash: str
    positions: NDArray[np.int64]
    teacher: NDArray[np.int64]
    host: HostArrays
    statistics: Tensor | None = None


class ShardCapture:
    """Computes shards with one verifier, and holds what all of a job's shards share."""

    def __init__(
        self,
        config: CaptureConfig,
        work: WorkPlan,
        verifier: StateSource,
        vocab_maps: Sequence[VocabMap],
        manifest: StoreManifest,
    ) -> None:
        """`vocab_maps` are the maps of the manifest's draft vocabularies, in the manifest's order."""
        self.config = config
        self.work = work
        self.verifier = verifier
        self.manifest = manifest
        self.device = verifier.device
        self.writings: list[Writing[_Task]] = []
        """The writing threads of the shards that are not finished."""
        self._teacher = TeacherHead(
            head=verifier.head,
            form=manifest.teacher_form,
            target_ids=tuple(torch.from_numpy(item.target_ids).to(self.device) for item in vocab_maps),
            slice_rows=config.head_slice,
            head_form=verifier.head_form,
        )
        self.in_draft = manifest.teacher_form.in_draft(vocab_maps[0])
        on_gpu = self.device.type == "cuda"
        self._memory = PinnedRing(config.buffer_bytes, pinned=True) if on_gpu and config.buffer_bytes else None
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._waited_s = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting, unless the device still computes at its end and has lost nothing."""
        began = time.monotonic()
        yield
        if self._stream is None or torch.cuda.current_stream(self.device).query():
            self._waited_s += time.monotonic() - began

    @property
    def waited_s(self) -> float:
        """Seconds for which the device was given nothing, because what it had computed was not written yet."""
        return self._waited_s + (0.0 if self._memory is None else self._memory.waited_s)

    def compute_piece(self, piece: Piece, token_ids: Tensor, row: int, task: _Task, wait: Callable[[], bool]) -> None:
        """Encode what is kept of the conversation in the batch's row `row` of a piece, and copy it to the host."""
        config = self.config
        tap_rows, teacher_rows = piece.rows_of(task.positions), piece.rows_of(task.teacher)
        taps = {layer: self._rows(piece.taps[layer][row], tap_rows) for layer in config.layers}
        final = self._rows(piece.final[row], teacher_rows)
        statistics = gate_statistics(taps, final)
        task.statistics = statistics if task.statistics is None else task.statistics + statistics
        parts: dict[str, Tensor] = {}
        for layer, tap in taps.items():
            parts |= torch_codecs.encode(self.manifest.codec, layer, tap, require_finite=False)
        counts = dict.fromkeys(parts, task.positions.size)
        if teacher_rows.size:
            next_tokens = self._rows(token_ids[row], teacher_rows + piece.first + 1)
            signal = teacher_signal(final, next_tokens, self._teacher)
            parts |= signal
            counts |= dict.fromkeys(signal, task.teacher.size)
        task.host.add(parts, counts, wait)

    def _rows(self, states: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """Rows of states [L, ...]; a view where the rows are consecutive."""
        if rows.size and rows[-1] - rows[0] + 1 == rows.size:
            return states[int(rows[0]) : int(rows[-1]) + 1]
        return states[self.to_device(rows)]

    def host_arrays(self) -> HostArrays:
        """Empty host arrays for one conversation."""
        return HostArrays(self._stream, self._memory)

    def to_device(self, array: NDArray[np.int64]) -> Tensor:
        """Copy to the device without waiting for it, from pinned memory; a copy from other memory would wait."""
        tensor = torch.from_numpy(array)
        return (
            tensor.to(self.device) if self._stream is None else tensor.pin_memory().to(self.device, non_blocking=True)
        )


class ShardRunning:
    """One shard that `compute` computes, while it is copied and written; then `finish` or `abandon` ends it."""

    def __init__(self, capture: ShardCapture, begun: ShardInProgress, plan: ShardPlan, progress: Progress) -> None:
        self._capture, self._begun, self._plan, self._progress = capture, begun, plan, progress
        self._split = capture.work.splits[plan.split]
        self._gates = Gates(capture.config.layers, capture.manifest.bands)
        self._summary = ShardSummary()
        self._lines: list[str] = []
        self._writing = Writing[_Task](
            self._append, capture.config.buffer_bytes, drop=lambda task: task.host.release(), last=begun.close
        )
        capture.writings.append(self._writing)

    def compute(self) -> None:
        """Append the shard's conversations, except those that fail a gate.

        Returns when all of the shard's work was given to the device; `finish` waits for the rest. Stopped may end this
        call at any instant, and `abandon` has to be called then.
        """
        config, plan = self._capture.config, self._plan
        tasks = [task for number in range(plan.first, plan.last) if (task := self._task(number)) is not None]
        batches = token_batches([task.token_ids.size for task in tasks], config.batch_tokens)
        if isinstance(source := self._capture.verifier, ReadsAhead):
            source.read_ahead([tasks[number].token_ids for batch in batches for number in batch])
        for batch in batches:
            self._compute_batch([tasks[number] for number in batch])
        self._writing.close()

    def _task(self, number: int) -> _Task | None:
        token_ids, loss_mask, content_hash = self._capture.work.dataset.split(self._split)[number]
        teacher = teacher_positions(loss_mask)
        if not teacher.size:
            reason = "expected an assistant turn of at least two tokens after the first token, found none"
            self._quarantine(number, content_hash, reason)
            self._progress.advance(len(token_ids), self._begun.payload_bytes)
            return None
        return _Task(
            number=number,
            token_ids=token_ids,
            loss_mask=loss_mask,
            content_hash=content_hash,
            positions=rows_in_reach(loss_mask, self._capture.config.window or None),
            teacher=teacher,
            host=self._capture.host_arrays(),
        )

    @torch.inference_mode()
    def _compute_batch(self, tasks: list[_Task]) -> None:
        capture = self._capture
        longest = max(task.token_ids.size for task in tasks)
        multiple = _GPU_MULTIPLE if capture.device.type == "cuda" else 1
        token_ids = np.zeros((len(tasks), -(-longest // multiple) * multiple), np.int64)
        for row, task in enumerate(tasks):
            token_ids[row, : task.token_ids.size] = task.token_ids
        ids = capture.to_device(token_ids)
        lengths = [task.token_ids.size for task in tasks]
        try:
            for piece in capture.verifier.states(ids, lengths, capture.config.layers, capture.config.prefill_chunk):
                for row, task in enumerate(tasks):
                    if piece.first < task.token_ids.size:
                        capture.compute_piece(piece, ids, row, task, self._memory_comes_back)
        except GateError as exc:  # of the source, before its first piece
            self._without_states(tasks, str(exc))
            return
        for task in tasks:
            assert task.statistics is not None
            counts = {_STATISTICS: task.statistics.shape[0]}
            task.host.add({_STATISTICS: task.statistics}, counts, self._memory_comes_back)
            with capture.waiting():
                self._writing.put(task, task.host.nbytes)
            self._say()
            self._progress.advance(task.token_ids.size, self._begun.payload_bytes)

    def _without_states(self, tasks: list[_Task], reason: str) -> None:
        """Quarantine a conversation whose states can't be had; of several, those of which that is so alone."""
        if len(tasks) > 1:
            for task in tasks:
                self._compute_batch([task])
            return
        self._quarantine(tasks[0].number, tasks[0].content_hash, reason)
        self._say()
        self._progress.advance(tasks[0].token_ids.size, self._begun.payload_bytes)

    def _memory_comes_back(self) -> bool:
        """Whether the writing thread of this shard, or of the shard before, will give host memory back."""
        return any(writing.busy for writing in self._capture.writings)

    def _append(self, task: _Task) -> None:
        """Judge and append one conversation; runs in the writing thread."""
        try:
            self._judge_and_append(task)
        finally:
            task.host.release()

    def _judge_and_append(self, task: _Task) -> None:
        """Append the conversation, or quarantine it where it fails a gate."""
        arrays = task.host.numpy()
        try:
            self._gates.judge(torch.from_numpy(arrays.pop(_STATISTICS)))
        except GateError as exc:
            self._quarantine(task.number, task.content_hash, str(exc))
            return
        arrays |= {
            "token_ids": task.token_ids.astype(np.uint32),
            "loss_mask": task.loss_mask.astype(np.uint8),
            "positions": task.positions.astype(np.int32),
            "teacher_positions": task.teacher.astype(np.int32),
        }
        self._summary.tails.append(tail_mass(arrays, self._capture.in_draft))
        self._begun.append(
            Conversation(
                content_hash=task.content_hash, split=self._plan.split, dataset_index=task.number, arrays=arrays
            )
        )

    def _quarantine(self, number: int, content_hash: str, reason: str) -> None:
        self._summary.quarantined.append(
            {"split": self._split, "dataset_index": number, "content_hash": content_hash, "reason": reason}
        )
        self._lines.append(f"quarantined {self._split}[{number}]: {reason}")

    def _say(self) -> None:
        while self._lines:
            self._progress.say(self._lines.pop(0))

    def finish(self) -> ShardSummary:
        """Wait until every conversation is appended or quarantined, and the shard's files are closed."""
        self._writing.finish()
        self._capture.writings.remove(self._writing)
        self._say()
        self._summary.quarantined.sort(key=lambda item: item["dataset_index"])
        self._summary.norms = self._gates.norms_json()
        return self._summary

    def abandon(self) -> None:
        """Drop the conversations that are not appended yet."""
        self._writing.abandon()
