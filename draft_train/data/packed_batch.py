"""One micro-batch as it lies in host memory: every array in one stretch, so that one copy takes it to a device.

Verifier states, which are nearly all of it, go from the files straight to their place in that stretch, and are decoded
on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from draftcache.draft_train.data.batches import Batch, BatchNeeds, Columns, pack_columns
from draftcache.draft_train.data.loss_rows import find_loss_rows
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


@dataclass(frozen=True)
class _Place:
    first: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        return memory[self.first : self.first + size].view(self.dtype).view(self.shape)


class _Stretch:
    """Hands out places in a stretch of bytes, one after the other."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.used = 0

    def place(self, shape: tuple[int, ...], dtype: torch.dtype) -> _Place:
        place = _Place(self.used, shape, dtype)
        self.used += aligned(int(np.prod(shape)) * dtype.itemsize)
        return place


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch in host memory that belongs to someone else: `unpack` it before that is used again."""

    memory: torch.Tensor
    """[bytes] uint8, pinned or not."""
    columns: Columns
    places: dict[str, _Place]
    """Of the columns, and of `teacher_hidden` where the store has it, by `Batch` field."""
    taps: dict[str, _Place]
    """Of the stored arrays that the codec made of the taps."""
    loss_share: float

    def unpack(self, codec: TapCodec, device: torch.device) -> Batch:
        """The batch on `device`, in memory of its own. On a GPU the copy is not waited for."""
        moved = self.memory.to(device, non_blocking=True)
        # Copies: as views they would keep the states in their stored form, half of a batch, for as long as they live.
        tensors = {name: place.of(moved).clone() for name, place in self.places.items()}
        if _STATES in tensors and tensors[_STATES].dtype == torch.uint16:
            tensors[_STATES] = tensors[_STATES].view(torch.bfloat16)
        return self.columns.batch(tensors | {"taps": self._decode(codec, moved, device)}, self.loss_share)

    def _decode(self, codec: TapCodec, moved: torch.Tensor, device: torch.device) -> torch.Tensor:
        """[R, taps * H]. One tap is decoded at a time, so that no second copy of all of them is alive."""
        rows = self.columns.tensors["key_tokens"].shape[0]
        if not self.taps:
            return torch.empty(rows, 0, device=device)
        found: torch.Tensor | None = None
        for number, layer in enumerate(codec.layers):
            parts = {name: self.taps[name].of(moved) for name in codec.specs(layer)}
            states = torch_codecs.decode(codec, layer, parts)
            width = states.shape[1]
            if found is None:
                found = torch.empty(rows, len(codec.layers) * width, dtype=states.dtype, device=device)
            found[:, number * width : (number + 1) * width] = states
        assert found is not None, "a store has taps"
        return found


class BatchLoader:
    """Reads micro-batches from a store: only what the draft's loss depends on."""

    def __init__(
        self,
        store: StoreReader,
        *,
        needs: BatchNeeds,
        teacher: TeacherView,
        loss_rows: str = "turns",
    ) -> None:
        """`needs` are the draft's, `loss_rows` names a rule. Raises InputError for a rule of another name."""
        find_loss_rows(loss_rows)
        self.codec = store.codec
        self.needs, self.teacher, self.loss_rows = needs, teacher, loss_rows
        window, kept = needs.window, store.manifest.window
        # Where capture kept more rows than this draft can see, the others are not read.
        self.read_window = window if window is not None and (kept is None or kept > window) else None
        layers = self.codec.layers if needs.taps else ()
        taps = [name for layer in layers for name in self.codec.specs(layer)]
        hidden = [name for name in (_STATES,) if name in store.specs]
        self.state_names = [*taps, *hidden]
        self._asked = [*map(tap_name, layers), *hidden]  # a tap's name stands for its parts
        self.column_names = [name for name in (*_COLUMNS, teacher.log_z) if name in store.specs]
        self._specs = store.specs
        self.bytes = self._bytes(store.index)
        """[conversations of the store] int64: what each takes at most in host memory."""

    def _bytes(self, index: NDArray[Any]) -> NDArray[np.int64]:
        """What each conversation takes at most, as `read` lays it out. [conversations] int64."""
        entries = self._specs["teacher_ids"].inner[0] if "teacher_ids" in self._specs else 0
        starts = index["teacher_rows" if self.loss_rows == "turns" else "rows"]
        columns = (
            index["rows"] * 16 + starts * (28 + 16 * self.needs.steps) + index["teacher_rows"] * (16 + 12 * entries)
        )
        specs = [self._specs[name] for name in self.state_names]
        states = [index[COUNT_FIELD[spec.axis]] * spec.row_bytes for spec in specs]
        return np.asarray(columns + sum(states), np.int64)

    def most_bytes(self, numbers: NDArray[np.int64]) -> int:
        """Memory that `read` may take for these conversations."""
        return int(self.bytes[numbers].sum()) + ALIGNMENT * (len(self.state_names) + 16)

    def read(
        self, store: StoreReader, numbers: NDArray[np.int64], loss_share: float, memory: torch.Tensor
    ) -> PackedBatch:
        """Read conversations into `memory`, uint8 of at least `most_bytes(numbers)`. Raises what `store.read` does."""
        items = [store.read(int(number), self.column_names, window=self.read_window) for number in numbers]
        columns = pack_columns(
            items,
            max_steps=self.needs.steps,
            window=self.needs.window,
            teacher=self.teacher,
            loss_rows=self.loss_rows,
        )
        stretch = _Stretch(memory)
        places = {}
        for name, value in columns.tensors.items():
            places[name] = stretch.place(tuple(value.shape), value.dtype)
            places[name].of(memory).copy_(value)
        states = self._read_states(store, numbers, items, stretch)
        if _STATES in states:
            places[_STATES] = states.pop(_STATES)
        return PackedBatch(memory[: stretch.used], columns, places, states, loss_share)

    def _read_states(
        self, store: StoreReader, numbers: NDArray[np.int64], items: list[Conversation], stretch: _Stretch
    ) -> dict[str, _Place]:
        """Each array of all conversations together, every conversation's rows straight to where they belong."""
        firsts = {
            axis: np.cumsum([0, *(len(item.arrays[name]) for item in items)])
            for axis, name in ((ROWS_AXIS, "positions"), (TEACHER_AXIS, "teacher_positions"))
        }
        places: dict[str, _Place] = {}
        views: dict[str, NDArray[Any]] = {}
        for name in self.state_names:
            spec = self._specs[name]
            dtype = torch.from_numpy(np.empty(0, spec.stored_dtype)).dtype
            places[name] = stretch.place((int(firsts[spec.axis][-1]), *spec.inner), dtype)
            views[name] = places[name].of(stretch.memory).numpy()
        for place, number in enumerate(numbers):
            out = {}
            for name, view in views.items():
                edges = firsts[self._specs[name].axis]
                out[name] = view[edges[place] : edges[place + 1]]
            store.read(int(number), self._asked, window=self.read_window, decode=False, out=out)
        return places
