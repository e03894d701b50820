"""A micro-batch in host memory: all its arrays are in one buffer, so that a single copy moves it to a device.

The stored taps, nearly all of its bytes, are read from the files straight into that buffer, and are decoded on the
device.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from draftcache.draft_train.data.batches import Batch, BatchNeeds, Columns, pack_columns
from draftcache.draft_train.data.loss_rows import AnchorDraw, find_loss_rows
from draftcache.draft_train.data.teacher import TeacherView
from draftcache.store.common.pinned_ring import ALIGNMENT, aligned
from draftcache.store.format import torch_codecs
from draftcache.store.format.array_spec import COUNT_FIELD, ROWS_AXIS, TEACHER_AXIS, tap_name
from draftcache.store.format.schema import Conversation
from draftcache.store.format.tap_codecs import TapCodec
from draftcache.store.reader import StoreReader

_COLUMNS = (
    "token_ids", "loss_mask", "positions", "teacher_positions", "teacher_ids", "teacher_gaps", "teacher_max",
    "log_z_full", "argmax",
)  # fmt: skip
_STATES = "teacher_hidden"
_ENTRIES = ("teacher_ids", "teacher_gaps", "teacher_max")


@dataclass(frozen=True)
class _ArraySlot:
    """Where an array is in a buffer: its offset in bytes, its shape and its dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the array as a view of the buffer `memory` [bytes] uint8."""
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        return memory[self.offset : self.offset + size].view(self.dtype).view(self.shape)


class _Arena:
    """Allocates arrays in a buffer, one after the other, each at an aligned offset."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.used = 0

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> _ArraySlot:
        slot = _ArraySlot(self.used, shape, dtype)
        self.used += aligned(int(np.prod(shape)) * dtype.itemsize)
        return slot


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch in a buffer that its owner will use again. `unpack` copies it out before that."""

    memory: torch.Tensor
    """[bytes] uint8, pinned or not."""
    columns: Columns
    slots: dict[str, _ArraySlot]
    """By `Batch` field: the columns, and `teacher_hidden` where the store has it."""
    taps: dict[str, _ArraySlot]
    """By array name of the store: the encoded taps."""
    loss_share: float

    def unpack(self, codec: TapCodec, device: torch.device) -> Batch:
        """Return the batch on `device`, in newly allocated memory. On a GPU this does not wait for the copy to end."""
        moved = self.memory.to(device, non_blocking=True)
        # Views would keep the encoded taps, half of a batch, alive for as long as they live, so these are copies.
        tensors = {name: slot.view(moved).clone() for name, slot in self.slots.items()}
        if _STATES in tensors and tensors[_STATES].dtype == torch.uint16:
            tensors[_STATES] = tensors[_STATES].view(torch.bfloat16)
        return self.columns.batch(tensors | {"taps": self._decode(codec, moved, device)}, self.loss_share)

    def _decode(self, codec: TapCodec, moved: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the taps [R, taps * H]. They are decoded one by one, so that no second copy of all taps is alive."""
        rows = self.columns.tensors["key_tokens"].shape[0]
        if not self.taps:
            return torch.empty(rows, 0, device=device)
        found: torch.Tensor | None = None
        for number, layer in enumerate(codec.layers):
            parts = {name: self.taps[name].view(moved) for name in codec.specs(layer)}
            states = torch_codecs.decode(codec, layer, parts)
            width = states.shape[1]
            if found is None:
                found = torch.empty(rows, len(codec.layers) * width, dtype=states.dtype, device=device)
            found[:, number * width : (number + 1) * width] = states
        assert found is not None, "a store has taps"
        return found


class BatchLoader:
    """Reads micro-batches from a store, and of each conversation only what the draft's loss depends on."""

    def __init__(
        self,
        store: StoreReader,
        *,
        needs: BatchNeeds,
        teacher: TeacherView,
        loss_rows: str = "turns",
    ) -> None:
        """`needs` says what the draft reads, `loss_rows` names a rule. Raises InputError for an unknown rule."""
        find_loss_rows(loss_rows)
        self.codec = store.codec
        self.needs, self.teacher, self.loss_rows = needs, teacher, loss_rows
        window, kept = needs.window, store.manifest.window
        # Where the store holds more rows than this draft can attend to, the other rows are not read.
        self.read_window = window if window is not None and (kept is None or kept > window) else None
        layers = self.codec.layers if needs.taps else ()
        taps = [name for layer in layers for name in self.codec.specs(layer)]
        hidden = [name for name in (_STATES,) if name in store.specs and needs.teacher]
        self.state_names = [*taps, *hidden]
        self._asked = [*map(tap_name, layers), *hidden]  # a tap's name stands for all its arrays
        left_out = () if needs.teacher else _ENTRIES
        columns = dict.fromkeys((*_COLUMNS, teacher.log_z))
        self.column_names = [name for name in columns if name in store.specs and name not in left_out]
        self._specs = store.specs
        self.bytes = self._bytes(store.index)
        """[conversations of the store] int64: the most bytes of host memory that each takes."""

    def _bytes(self, index: NDArray[Any]) -> NDArray[np.int64]:
        """Return the most bytes that each conversation takes in a buffer of `read`, [conversations] int64."""
        entries = self._specs["teacher_ids"].inner[0] if "teacher_ids" in self.column_names else 0
        starts = index["teacher_rows" if self.loss_rows == "turns" else "rows"]
        columns = (
            index["rows"] * 16 + starts * (28 + 16 * self.needs.steps) + index["teacher_rows"] * (24 + 12 * entries)
        )
        specs = [self._specs[name] for name in self.state_names]
        states = [index[COUNT_FIELD[spec.axis]] * spec.row_bytes for spec in specs]
        return np.asarray(columns + sum(states), np.int64)

    @property
    def key(self) -> Hashable:
        """A value that two loaders of one store have in common exactly if they make the same batches."""
        return (self.needs, self.teacher.key, self.loss_rows)

    def most_bytes(self, numbers: NDArray[np.int64]) -> int:
        """Return the bytes that `read` may need for these conversations, alignment included."""
        return int(self.bytes[numbers].sum()) + ALIGNMENT * (len(self.state_names) + 16)

    def read(
        self, store: StoreReader, numbers: NDArray[np.int64], loss_share: float, memory: torch.Tensor, epoch: int = 0
    ) -> PackedBatch:
        """Read conversations into `memory`, uint8 of at least `most_bytes(numbers)`. `epoch` draws the start rows.

        Raises what `store.read` raises, and InputError where the store lacks a row that a start row needs.
        """
        items = [store.read(int(number), self.column_names, window=self.read_window) for number in numbers]
        share = self.needs.anchor_share
        columns = pack_columns(
            items,
            max_steps=self.needs.steps,
            window=self.needs.window,
            teacher=self.teacher,
            loss_rows=self.loss_rows,
            next_tokens=self.needs.next_tokens,
            draw=None if share == 1.0 else AnchorDraw(share, self.needs.anchor_seed, epoch),
        )
        arena = _Arena(memory)
        slots = {}
        for name, value in columns.tensors.items():
            slots[name] = arena.allocate(tuple(value.shape), value.dtype)
            slots[name].view(memory).copy_(value)
        states = self._read_states(store, numbers, items, arena)
        if _STATES in states:
            slots[_STATES] = states.pop(_STATES)
        return PackedBatch(memory[: arena.used], columns, slots, states, loss_share)

    def _read_states(
        self, store: StoreReader, numbers: NDArray[np.int64], items: list[Conversation], arena: _Arena
    ) -> dict[str, _ArraySlot]:
        """Read the taps and final-norm states: one array each for all conversations, filled one after the other."""
        firsts = {
            axis: np.cumsum([0, *(len(item.arrays[name]) for item in items)])
            for axis, name in ((ROWS_AXIS, "positions"), (TEACHER_AXIS, "teacher_positions"))
        }
        slots: dict[str, _ArraySlot] = {}
        views: dict[str, NDArray[Any]] = {}
        for name in self.state_names:
            spec = self._specs[name]
            dtype = torch.from_numpy(np.empty(0, spec.stored_dtype)).dtype
            slots[name] = arena.allocate((int(firsts[spec.axis][-1]), *spec.inner), dtype)
            views[name] = slots[name].view(arena.memory).numpy()
        for index, number in enumerate(numbers):
            out = {}
            for name, view in views.items():
                edges = firsts[self._specs[name].axis]
                out[name] = view[edges[index] : edges[index + 1]]
            store.read(int(number), self._asked, window=self.read_window, decode=False, out=out)
        return slots
