"""What a shard holds: arrays over three axes, and one index row per conversation.

Legend: T tokens, R rows in reach, P teacher positions (all summed over the shard's conversations, packed flat),
H hidden size of the verifier, K teacher entries per position. The store's `TeacherForm` says what is kept of the
teacher: ids and gaps for teacher "draft" and "full", the state for "hidden", and the scalars for all three.

| array              | shape   | dtype             | meaning                                                     |
|--------------------|---------|-------------------|-------------------------------------------------------------|
| token_ids          | [T]     | uint32            | verifier token ids                                          |
| loss_mask          | [T]     | uint8             | 1 where the assistant wrote the token                       |
| positions          | [R]     | int32             | row t of each kept state, absolute in its conversation      |
| tap_<layer>        | [R, H]  | uint16 or float32 | output of block <layer>; uint16 is the bit pattern of bf16  |
|                    |         |                   | (stored as it is, or as the parts that `tap_codecs` makes)  |
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

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.store.format.array_spec import ROWS_AXIS, TOKENS_AXIS, ArraySpec
from draftcache.store.format.tap_codecs import TapCodec
from draftcache.store.format.teacher import TeacherForm

INDEX_DTYPE = np.dtype(
    [
        ("content_hash", "V16"),  # xxh3-128 of token ids and loss mask
        ("shard", "<i4"),
        ("split", "<i4"),  # index into the manifest's `splits`
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
"""Fields of an index row. Offsets are within the shard; `first_*` + count is the end of a conversation's slice."""

TOKEN_ARRAYS = ("token_ids", "loss_mask")
"""Names of the arrays on the token axis."""


def array_specs(*, codec: TapCodec, teacher: TeacherForm) -> dict[str, ArraySpec]:
    """Return the description of every array of a shard, by name, with taps in the form that `codec` stores."""
    taps = {name: spec for layer in codec.layers for name, spec in codec.specs(layer).items()}
    return {
        "token_ids": ArraySpec(axis=TOKENS_AXIS, dtype="uint32"),
        "loss_mask": ArraySpec(axis=TOKENS_AXIS, dtype="uint8"),
        "positions": ArraySpec(axis=ROWS_AXIS, dtype="int32"),
        **taps,
        **teacher.array_specs(),
    }


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One captured conversation: its index fields, and its slice of every array (see the module's docstring)."""

    content_hash: str
    """xxh3-128 of its token ids and loss mask, as 32 hexadecimal digits."""
    split: int
    """Index into the manifest's `splits`."""
    dataset_index: int
    """The conversation's number within its split of the prepared dataset."""
    arrays: dict[str, NDArray[Any]] = field(repr=False)
    """By name. A tap is either `tap_<layer>` or the parts that the store's codec makes of it."""

    @property
    def loss_mask(self) -> NDArray[np.bool_]:
        """[T] bool, True where the assistant wrote the token."""
        return self.arrays["loss_mask"].astype(np.bool_)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(values.nbytes for values in self.arrays.values())
