"""Batches: the tensors that a training step reads, made of stored conversations.

Conversations are packed by position. The positions of each are shifted past the last window of the conversation before
it, so that the causal sliding window itself keeps them apart and no segment ids are needed. Rotary embeddings use the
same positions, which is right because only differences of positions matter to them.

Shape legend: R key rows (all rows in reach), S start rows, P teacher positions, K teacher entries, H hidden size of
the verifier.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from draftcache.draft_train.data.loss_rows import AnchorDraw, find_loss_rows
from draftcache.draft_train.data.teacher import TeacherView
from draftcache.store.common.errors import InputError
from draftcache.store.format import torch_codecs
from draftcache.store.format.schema import Conversation
from draftcache.store.format.tap_codecs import TapCodec

_CPU = torch.device("cpu")
_AS_STORED = TeacherView()


@dataclass(frozen=True, kw_only=True)
class BatchNeeds:
    """What a batch for training a draft has to hold. It decides which columns of the store are read."""

    steps: int
    """The most tokens that are predicted from a start row."""
    window: int | None
    """Attention window in positions: rows this far or farther behind every start row are not needed; None needs all."""
    taps: bool = True
    """Whether the draft reads the verifier's taps. If not, `Batch.taps` has a width of 0."""
    teacher: bool = True
    """Whether the teacher's entries or states are read. An evaluation needs its argmax only."""
    next_tokens: bool = False
    """Whether the batch has `next_tokens`."""
    anchor_share: float = 1.0
    """Share of each conversation's start rows that an epoch takes, drawn from `anchor_seed` and the epoch."""
    anchor_seed: int = 0


class HostRows(NamedTuple):
    """Host copies of three fields of a `Batch`, so that the host need not wait for a device to read them."""

    key_positions: NDArray[Any]
    start_index: NDArray[Any]
    steps: NDArray[Any]

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> Self:
        """Return views of these tensors, which are on the host; `tensors` is by `Batch` field."""
        return cls(*(tensors[name].numpy() for name in cls._fields))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The tensors of one micro-batch, on one device."""

    taps: torch.Tensor
    """[R, taps * H] taps of each key row, side by side, in the dtype of the store: bf16 or float32."""
    key_tokens: torch.Tensor
    """[R] int64: token x_{t+1} of each key row t."""
    key_positions: torch.Tensor
    """[R] int64, ascending: positions, shifted for each conversation."""
    start_index: torch.Tensor
    """[S] int64: the key row of each start row."""
    steps: torch.Tensor
    """[S] int64: the steps of each start row that are computed, from 1 to `max_steps`."""
    step_tokens: torch.Tensor
    """[S, max_steps] int64: token x_{t+1+k}, which step k consumes (0 where k >= steps)."""
    teacher_index: torch.Tensor
    """[S, max_steps] int64: row of the teacher arrays for position t+1+k (0 where k >= steps)."""
    conversation: torch.Tensor
    """[S] int64: which conversation of the batch each start row belongs to."""
    teacher_ids: torch.Tensor
    """[P, K] int64 draft-vocabulary ids; -1 where a stored entry is outside the vocabulary. K may be 0."""
    teacher_logits: torch.Tensor
    """[P, K] float32; -inf where the id is -1."""
    log_z_full: torch.Tensor
    """[P] float32: log-sum-exp of the teacher's logits over the verifier's vocabulary."""
    log_z_draft: torch.Tensor
    """[P] float32: log-sum-exp of the teacher's logits over the draft vocabulary."""
    argmax: torch.Tensor
    """[P] int64: the teacher's most probable token of the verifier's vocabulary."""
    host: HostRows
    conversations: int
    loss_share: float
    """Weight of one conversation's mean loss: 1 / (conversations of the whole optimizer step)."""
    tokens: int
    """Tokens of all conversations, whether or not they have rows."""
    window: int
    """Attention window, in positions, which keeps packed conversations apart."""
    absent_entries: bool = False
    """Whether any teacher id is -1. The host knows it, so that no loss has to wait for the device."""
    pair_weight: torch.Tensor | None = None
    """[S] float32: weight of a start row's losses in its conversation's mean; None: 1 / (its rows at the step).
    Only where this is given may teacher_index be -1, which means that the row carries no loss at that step."""
    next_tokens: torch.Tensor | None = None
    """[P] int64: the token of the text that follows each teacher position, where it was asked for."""
    shifts: tuple[int, ...] = ()
    """By conversation: what was added to its positions. Empty where the batch was not made from a store."""
    teacher_hidden: torch.Tensor | None = None
    """[P, H] final-norm states in the verifier's compute dtype, where the store keeps states instead of entries."""

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on another device."""
        moved = {
            item.name: value.to(device, non_blocking=True)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), torch.Tensor)
        }
        return replace(self, **moved)  # type: ignore[arg-type]  # tensors only


def stored_taps(conversation: Conversation, codec: TapCodec, device: torch.device) -> torch.Tensor:
    """Return the taps of a conversation, [R, taps * H] in the codec's dtype (bf16 or float32), in ascending order.

    The encoded arrays are copied to `device` and decoded there, so that the smaller form crosses the bus.
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
    next_tokens: bool = False,
) -> Batch:
    """Return a batch on `device` of conversations that were read with `decode=False`.

    With `window` None, a row attends to every earlier row of its conversation. `teacher` is the teacher over the chosen
    draft vocabulary. With `loss_share` None, these conversations are the whole optimizer step. `loss_rows` names a rule
    of `draftcache.draft_train.data.loss_rows`. Raises InputError where the store lacks a row that a start row needs.
    """
    columns = pack_columns(
        conversations,
        max_steps=max_steps,
        window=window,
        teacher=teacher,
        loss_rows=loss_rows,
        next_tokens=next_tokens,
    )
    tensors = {name: value.to(device, non_blocking=True) for name, value in columns.tensors.items()}
    tensors["taps"] = torch.cat([stored_taps(item, codec, device) for item in conversations])
    return columns.batch(tensors, loss_share)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A batch on the host, without its taps. Its fields mean what those of `Batch` do."""

    tensors: dict[str, torch.Tensor]
    """Tensors by the name of their `Batch` field."""
    conversations: int
    tokens: int
    window: int
    absent_entries: bool
    shifts: tuple[int, ...]

    def batch(self, tensors: dict[str, torch.Tensor], loss_share: float | None) -> Batch:
        """Return the batch of `tensors`: `self.tensors` and taps, on any device. `loss_share`: see `build_batch`."""
        values: dict[str, Any] = {**tensors}
        return Batch(
            **values,
            host=HostRows.of(self.tensors),
            conversations=self.conversations,
            loss_share=1 / self.conversations if loss_share is None else loss_share,
            tokens=self.tokens,
            window=self.window,
            absent_entries=self.absent_entries,
            shifts=self.shifts,
        )


def pack_columns(
    conversations: list[Conversation],
    *,
    max_steps: int,
    window: int | None,
    teacher: TeacherView,
    loss_rows: str = "turns",
    next_tokens: bool = False,
    draw: AnchorDraw | None = None,
) -> Columns:
    """Return everything of a batch but its taps, for the arguments of `build_batch`.

    `teacher_hidden` is there only if it was read, and `next_tokens` if it is asked for. With `draw`, the batch has only
    the start rows that it takes.
    """
    lengths = [item.arrays["token_ids"].shape[0] for item in conversations]
    reach = window if window is not None else max(lengths) + max_steps
    parts = [_row_columns(item, max_steps, loss_rows, draw) | teacher.columns(item.arrays) for item in conversations]
    absent = teacher.lookup is not None and any(bool((part["teacher_ids"] < 0).any()) for part in parts)
    if next_tokens:
        for item, part in zip(conversations, parts, strict=True):
            part["next_tokens"] = _next_tokens(item)
    joined: dict[str, list[torch.Tensor]] = {name: [] for name in parts[0]}
    shifts = []
    position = rows = teacher_rows = 0
    for number, part in enumerate(parts):
        rows_here, teacher_rows_here = part["key_positions"].shape[0], part["argmax"].shape[0]
        part["key_positions"] = part["key_positions"] + position
        shifts.append(position)
        part["start_index"] = part["start_index"] + rows
        part["teacher_index"] = torch.where(part["teacher_index"] < 0, -1, part["teacher_index"] + teacher_rows)
        part["conversation"] = torch.full_like(part["start_index"], number)
        if loss_rows == "unshifted":
            part["pair_weight"] = torch.full(part["start_index"].shape, 1 / max(lengths))
        for name, value in part.items():
            joined.setdefault(name, []).append(value)
        position += lengths[number] + reach + max_steps
        rows += rows_here
        teacher_rows += teacher_rows_here
    return Columns(
        tensors={name: torch.cat(values) for name, values in joined.items()},
        conversations=len(conversations),
        tokens=sum(lengths),
        window=reach,
        absent_entries=absent,
        shifts=tuple(shifts),
    )


def _next_tokens(item: Conversation) -> torch.Tensor:
    positions = item.arrays["teacher_positions"].astype(np.int64)
    return torch.from_numpy(item.arrays["token_ids"].astype(np.int64)[positions + 1])


def _row_columns(
    item: Conversation, max_steps: int, loss_rows: str, draw: AnchorDraw | None
) -> dict[str, torch.Tensor]:
    """Return the columns of one conversation that do not depend on the teacher's values, by `Batch` field."""
    arrays = item.arrays
    token_ids = arrays["token_ids"].astype(np.int64)
    positions = arrays["positions"].astype(np.int64)
    rows = find_loss_rows(loss_rows)(item.loss_mask, max_steps)
    if draw is not None:
        rows = rows.take(draw.taken(item.content_hash, len(rows.starts)))
    offsets = np.arange(max_steps)
    live = offsets[None, :] < rows.steps[:, None]
    token_positions = rows.starts[:, None] + 1 + offsets  # of x_{t+1+k}, and of its teacher
    teacher_index = np.where(live, -1, 0)
    teacher_index[rows.carries] = _find_rows(
        token_positions[rows.carries], arrays["teacher_positions"].astype(np.int64), item, "teacher rows"
    )
    values = {
        "key_tokens": token_ids[positions + 1],
        "key_positions": positions,
        "start_index": _find_rows(rows.starts, positions, item, "rows"),
        "steps": rows.steps,
        "step_tokens": np.where(live, token_ids[np.where(live, token_positions, 0)], 0),
        "teacher_index": teacher_index,
    }
    return {name: torch.from_numpy(value) for name, value in values.items()}


def _find_rows(wanted: np.ndarray[Any, Any], stored: np.ndarray[Any, Any], item: Conversation, what: str) -> Any:
    """Return the index of each wanted position among the stored ones. Raises InputError where one is missing."""
    found = np.searchsorted(stored, wanted)
    if wanted.size and (stored.size == 0 or not np.array_equal(stored[np.minimum(found, stored.size - 1)], wanted)):
        raise InputError(
            f"conversation {item.content_hash}: expected {what} for every start row and step, found some missing; "
            "the store was captured with another rule, capture it again"
        )
    return found
