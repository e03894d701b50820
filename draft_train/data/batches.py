"""From stored conversations to the tensors of one optimizer step.

Conversations are packed by position: each one's positions are shifted past the last window of the one before it,
so that the causal sliding window itself keeps them apart, with no segment ids. Rotary angles use the same
positions; only differences matter there.

Shape legend: R key rows (all rows in reach), S start rows, P teacher positions, K teacher entries, H hidden size of
the verifier.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from draftcache.draft_train.data.loss_rows import find_loss_rows
from draftcache.draft_train.data.teacher import TeacherView
from draftcache.store.common.errors import InputError
from draftcache.store.format import torch_codecs
from draftcache.store.format.schema import Conversation
from draftcache.store.format.tap_codecs import TapCodec

_CPU = torch.device("cpu")
_AS_STORED = TeacherView()


@dataclass(frozen=True, kw_only=True)
class BatchNeeds:
    """What a batch for training a draft has to hold, and so which columns of the store are read."""

    steps: int
    """Tokens that are predicted from each start row, at most."""
    window: int | None
    """Rows farther back than this from every start row are not needed; None needs all that are stored."""
    taps: bool = True
    """Whether the draft reads the verifier's states. Without them `Batch.taps` has a width of 0."""


class HostRows(NamedTuple):
    """What the host knows of a batch's rows, so that it need not wait for a device to learn it: as in `Batch`."""

    key_positions: NDArray[Any]
    start_index: NDArray[Any]
    steps: NDArray[Any]

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> Self:
        """Of tensors on the host, by `Batch` field; their memory is shared."""
        return cls(*(tensors[name].numpy() for name in cls._fields))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tensors of one step, on one device."""

    taps: torch.Tensor
    """[R, taps * H] verifier states, in the stored dtype."""
    key_tokens: torch.Tensor
    """[R] int64: x_{t+1} of each key row t."""
    key_positions: torch.Tensor
    """[R] int64, ascending, shifted per conversation."""
    start_index: torch.Tensor
    """[S] int64: which key rows are start rows."""
    steps: torch.Tensor
    """[S] int64: loss-carrying steps of each start row, at most `max_steps`; at least 1."""
    step_tokens: torch.Tensor
    """[S, max_steps] int64: x_{t+1+k} consumed at step k (0 where k >= steps)."""
    teacher_index: torch.Tensor
    """[S, max_steps] int64: row of the teacher arrays for position t+1+k (0 where k >= steps)."""
    conversation: torch.Tensor
    """[S] int64: which conversation of the batch each start row belongs to."""
    teacher_ids: torch.Tensor
    """[P, K] int64 draft-vocabulary ids; -1 where a stored entry is outside the vocabulary. K may be 0."""
    teacher_logits: torch.Tensor
    """[P, K] float32; -inf where the id is -1."""
    log_z_full: torch.Tensor
    log_z_draft: torch.Tensor
    argmax: torch.Tensor
    """[P] int64, over the verifier's vocabulary."""
    host: HostRows
    conversations: int
    loss_share: float
    """Weight of one conversation's mean loss: 1 over the conversations of the whole optimizer step."""
    tokens: int
    window: int
    """Attention window that keeps packed conversations apart."""
    absent_entries: bool = False
    """Whether any teacher id is -1: known on the host, so that no loss waits for the device to find out."""
    pair_weight: torch.Tensor | None = None
    """[S] float32: weight of a start row's loss at any step in its conversation's mean; None: 1 over the step's rows.
    Where it is given, teacher_index may be -1: no loss at that step."""
    teacher_hidden: torch.Tensor | None = None
    """[P, H] final-norm states in the verifier's compute dtype, where the store keeps these instead of entries."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved = {
            item.name: value.to(device, non_blocking=True)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), torch.Tensor)
        }
        return replace(self, **moved)  # type: ignore[arg-type]  # tensors only


def stored_taps(conversation: Conversation, codec: TapCodec, device: torch.device) -> torch.Tensor:
    """[R, taps * H]: the taps, concatenated in ascending order, bf16 or float32 as the codec has it.

    What is stored goes to `device` as it is, and is decoded there: the smaller form crosses the bus.
    """
    taps = []
    for layer in codec.layers:
        parts = {name: torch.from_numpy(conversation.arrays[name]).to(device) for name in codec.specs(layer)}
        taps.append(torch_codecs.decode(codec, layer, parts))
    return torch.cat(taps, dim=-1)


def build_batch(
    conversations: list[Conversation],
    codec: TapCodec,
    *,
    max_steps: int,
    window: int | None,
    teacher: TeacherView = _AS_STORED,
    device: torch.device = _CPU,
    loss_share: float | None = None,
    loss_rows: str = "turns",
) -> Batch:
    """Pack conversations read with `decode=False`, onto `device`.

    `window` None attends to every earlier row of the same conversation; `teacher` says which draft vocabulary's;
    `loss_share` None makes these conversations the whole optimizer step; `loss_rows`: see
    `draftcache.draft_train.data.loss_rows`.
    """
    columns = pack_columns(conversations, max_steps=max_steps, window=window, teacher=teacher, loss_rows=loss_rows)
    tensors = {name: value.to(device, non_blocking=True) for name, value in columns.tensors.items()}
    tensors["taps"] = torch.cat([stored_taps(item, codec, device) for item in conversations])
    return columns.batch(tensors, loss_share)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A batch without its verifier states, on the host."""

    tensors: dict[str, torch.Tensor]
    """By `Batch` field."""
    conversations: int
    tokens: int
    window: int
    absent_entries: bool

    def batch(self, tensors: dict[str, torch.Tensor], loss_share: float | None) -> Batch:
        """The batch of `tensors`, which are these and `taps` on some device. `loss_share` as in `build_batch`."""
        values: dict[str, Any] = {**tensors}
        return Batch(
            **values,
            host=HostRows.of(self.tensors),
            conversations=self.conversations,
            loss_share=1 / self.conversations if loss_share is None else loss_share,
            tokens=self.tokens,
            window=self.window,
            absent_entries=self.absent_entries,
        )


def pack_columns(
    conversations: list[Conversation],
    *,
    max_steps: int,
    window: int | None,
    teacher: TeacherView,
    loss_rows: str = "turns",
) -> Columns:
    """Everything but `taps`; `teacher_hidden` only where it was read. See `build_batch`."""
    lengths = [item.arrays["token_ids"].shape[0] for item in conversations]
    reach = window if window is not None else max(lengths) + max_steps
    parts = [_one(item, max_steps, loss_rows) | teacher.columns(item.arrays) for item in conversations]
    absent = teacher.lookup is not None and any(bool((part["teacher_ids"] < 0).any()) for part in parts)
    joined: dict[str, list[torch.Tensor]] = {name: [] for name in parts[0]}
    position = rows = places = 0
    for number, part in enumerate(parts):
        rows_here, places_here = part["key_positions"].shape[0], part["argmax"].shape[0]
        part["key_positions"] = part["key_positions"] + position
        part["start_index"] = part["start_index"] + rows
        part["teacher_index"] = torch.where(part["teacher_index"] < 0, -1, part["teacher_index"] + places)
        part["conversation"] = torch.full_like(part["start_index"], number)
        if loss_rows == "unshifted":
            part["pair_weight"] = torch.full(part["start_index"].shape, 1 / max(lengths))
        for name, value in part.items():
            joined.setdefault(name, []).append(value)
        position += lengths[number] + reach + max_steps
        rows += rows_here
        places += places_here
    return Columns(
        tensors={name: torch.cat(values) for name, values in joined.items()},
        conversations=len(conversations),
        tokens=sum(lengths),
        window=reach,
        absent_entries=absent,
    )


def _one(item: Conversation, max_steps: int, loss_rows: str) -> dict[str, torch.Tensor]:
    arrays = item.arrays
    token_ids = arrays["token_ids"].astype(np.int64)
    positions = arrays["positions"].astype(np.int64)
    rows = find_loss_rows(loss_rows)(item.loss_mask, max_steps)
    offsets = np.arange(max_steps)
    live = offsets[None, :] < rows.steps[:, None]
    places = rows.starts[:, None] + 1 + offsets
    teacher_index = np.where(live, -1, 0)
    teacher_index[rows.carries] = _positions_of(
        places[rows.carries], arrays["teacher_positions"].astype(np.int64), item, "teacher rows"
    )
    values = {
        "key_tokens": token_ids[positions + 1],
        "key_positions": positions,
        "start_index": _positions_of(rows.starts, positions, item, "rows"),
        "steps": rows.steps,
        "step_tokens": np.where(live, token_ids[np.where(live, places, 0)], 0),
        "teacher_index": teacher_index,
    }
    return {name: torch.from_numpy(value) for name, value in values.items()}


def _positions_of(wanted: np.ndarray[Any, Any], stored: np.ndarray[Any, Any], item: Conversation, what: str) -> Any:
    found = np.searchsorted(stored, wanted)
    if wanted.size and (stored.size == 0 or not np.array_equal(stored[np.minimum(found, stored.size - 1)], wanted)):
        raise InputError(
            f"conversation {item.content_hash}: expected {what} for every start row and step, found some missing; "
            "the store was captured with another rule, capture it again"
        )
    return found
