"""What a shard holds: arrays over three axes, and one index row per conversation.

Legend: T tokens, R rows in reach, P teacher positions (all summed over the shard's conversations, packed flat),
H hidden size of the verifier, K teacher entries per position. What is kept of the teacher depends on the store's
`TeacherForm`: ids and gaps for teacher "draft" and "full", the state for "hidden"; the scalars always.

| array              | shape   | dtype             | meaning                                                     |
|--------------------|---------|-------------------|-------------------------------------------------------------|
| token_ids          | [T]     | uint32            | verifier token ids                                          |
| loss_mask          | [T]     | uint8             | 1 where the assistant wrote the token                       |
| positions          | [R]     | int32             | row t of each kept state, absolute in its conversation      |
| tap_<layer>        | [R, H]  | uint16 or float32 | output of block <layer>; uint16 is the bit pattern of bf16  |
|                    |         |                   | (stored as it is, or as the parts that `codecs` makes of it)|
| teacher_positions  | [P]     | int32             | p: the verifier has consumed x_p and predicts x_{p+1}       |
| teacher_ids        | [P, K]  | uint16 or uint32  | ids of the K largest logits, largest first: of the draft    |
|                    |         |                   | vocabulary, or with teacher "full" of the verifier's        |
| teacher_gaps       | [P, K]  | float16           | z_max - z                                                   |
| teacher_hidden     | [P, H]  | uint16 or float32 | final-norm state in the verifier's compute dtype            |
| teacher_max        | [P]     | float32           | z_max, the largest logit in the draft vocabulary, or with   |
|                    |         |                   | teacher "full" in the verifier's                            |
| log_z_full         | [P]     | float32           | log of the sum of exp(z) over the whole vocabulary          |
| log_z_draft        | [P]     | float32           | the same over the (main) draft vocabulary                   |
| log_z_draft_<D>    | [P]     | float32           | the same over the further draft vocabulary of size D        |
| argmax             | [P]     | uint32            | the verifier's greedy choice, over the whole vocabulary     |
| next_token_logit   | [P]     | float32           | logit of the realised token x_{p+1}                         |
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from draftcache.store.format.tap_codecs import TapCodec
    from draftcache.store.format.teacher import TeacherForm

CHUNK_ROWS = 256
"""Rows of one inner chunk of a tap: the unit that is read and checksummed. Narrower arrays have longer ones."""

_CHUNK_BYTES = 1 << 16
_MOST_CHUNK_ROWS = 4096

TOKENS_AXIS, ROWS_AXIS, TEACHER_AXIS = "tokens", "rows", "teacher"
FIRST_FIELD = {TOKENS_AXIS: "first_token", ROWS_AXIS: "first_row", TEACHER_AXIS: "first_teacher"}
COUNT_FIELD = {TOKENS_AXIS: "tokens", ROWS_AXIS: "rows", TEACHER_AXIS: "teacher_rows"}
LENGTH_ARRAY = {TOKENS_AXIS: "token_ids", ROWS_AXIS: "positions", TEACHER_AXIS: "teacher_positions"}
"""Per axis: the index fields of a conversation's slice, and the array whose length is the slice's."""

INDEX_DTYPE = np.dtype(
    [
        ("content_hash", "V16"),  # xxh3-128 of token ids and loss mask
        ("shard", "<i4"),
        ("split", "<i4"),  # position in the manifest's `splits`
        ("dataset_index", "<i8"),  # conversation number within the split of the prepared dataset
        ("first_token", "<i8"),
        ("tokens", "<i8"),
        ("loss_tokens", "<i8"),
        ("first_row", "<i8"),
        ("rows", "<i8"),
        ("first_teacher", "<i8"),
        ("teacher_rows", "<i8"),
    ]
)
"""Offsets are within the shard; `first_* + count` ends each conversation's slice on that axis."""


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """Shape beyond the packed axis, dtype, and whether the values are worth compressing."""

    axis: str
    dtype: str
    inner: tuple[int, ...] = ()
    compress: bool = True

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Little-endian, as in the files."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def chunk_rows(self) -> int:
        """Rows of one inner chunk: a power of two that makes up to 64 KiB, but at least 256 and at most 4,096."""
        fitting = 1 << max(_CHUNK_BYTES // self.row_bytes, 1).bit_length() - 1
        return min(max(fitting, CHUNK_ROWS), _MOST_CHUNK_ROWS)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before compression."""
        return math.prod(self.inner) * np.dtype(self.dtype).itemsize


def tap_name(layer: int) -> str:
    """Array name of the output of block `layer`."""
    return f"tap_{layer}"


def id_dtype(vocab_size: int) -> str:
    """Two bytes are enough for a vocabulary of up to 65,536 entries."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def array_specs(*, codec: TapCodec, teacher: TeacherForm) -> dict[str, ArraySpec]:
    """Every array of a shard, by name, taps in the form that `codec` stores."""
    taps = {name: spec for layer in codec.layers for name, spec in codec.specs(layer).items()}
    return {
        "token_ids": ArraySpec(axis=TOKENS_AXIS, dtype="uint32"),
        "loss_mask": ArraySpec(axis=TOKENS_AXIS, dtype="uint8"),
        "positions": ArraySpec(axis=ROWS_AXIS, dtype="int32"),
        **taps,
        **teacher.array_specs(),
    }


TOKEN_ARRAYS = ("token_ids", "loss_mask")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One captured conversation: its index fields, and its slice of every array (see the module docstring)."""

    content_hash: str
    split: int
    dataset_index: int
    arrays: dict[str, NDArray[Any]] = field(repr=False)
    """By name; a tap either as `tap_<layer>` or as the parts that the store's codec makes of it."""

    @property
    def loss_mask(self) -> NDArray[np.bool_]:
        """[T] bool."""
        return self.arrays["loss_mask"].astype(np.bool_)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(values.nbytes for values in self.arrays.values())
