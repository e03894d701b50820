"""How a store keeps the verifier's distribution, the teacher: which arrays, and over which draft vocabularies.

| teacher | kept at each position                  | what training makes of it                                         |
|---------|----------------------------------------|-------------------------------------------------------------------|
| draft   | top-k over the main draft vocabulary   | tail-bucket loss, for that vocabulary and its subsets             |
| full    | top-k over the verifier's vocabulary   | tail-bucket loss, for any declared draft vocabulary               |
| hidden  | the final-norm state                   | exact cross entropy, for any declared draft vocabulary            |

The scalars are kept in each: they make tail and out-of-vocabulary mass exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError
from draftcache.store.format.schema import TEACHER_AXIS, ArraySpec, id_dtype

if TYPE_CHECKING:
    from draftcache.store.format.vocab_map import VocabMap

TEACHERS = ("draft", "full", "hidden")


@dataclass(frozen=True, kw_only=True)
class DraftVocab:
    """A draft vocabulary that the store is declared for, and the names of what is stored for it."""

    size: int
    hash: str
    """Of its map, see `VocabMap.hash`."""
    suffix: str = ""
    """Of its names: none for the main one, `_<size>` for a further one."""

    @classmethod
    def further(cls, size: int, hash: str = "") -> DraftVocab:  # noqa: A002
        """One beside the main one."""
        return cls(size=size, hash=hash, suffix=f"_{size}")

    @property
    def log_z(self) -> str:
        """Array [P] float32: log of the sum of exp(z) over this vocabulary."""
        return f"log_z_draft{self.suffix}"

    @property
    def head(self) -> str:
        """Tensor [size, H] of frozen.safetensors: its rows of the verifier's head."""
        return f"lm_head{self.suffix}"

    @property
    def map_name(self) -> str:
        """File of its map."""
        return f"vocab_map{self.suffix}.safetensors"


@dataclass(frozen=True, kw_only=True)
class TeacherForm:
    """Raises InputError where the values do not fit together."""

    kind: str
    """One of `TEACHERS`."""
    top_k: int
    """Entries per position; 0 for "hidden", which has none."""
    vocab_size: int
    hidden_size: int
    compute_dtype: str
    """Of the verifier: final-norm states are stored in it and never rounded, whatever the taps' mode does."""
    vocabularies: tuple[DraftVocab, ...]
    """The main one first."""

    def __post_init__(self) -> None:
        if self.kind not in TEACHERS:
            raise InputError(f"teacher: expected one of {list(TEACHERS)}, found {self.kind!r}")
        if len(set(self.sizes)) < len(self.sizes):
            raise InputError(f"draft vocabularies: expected sizes that differ, found {list(self.sizes)}")

    @property
    def main(self) -> DraftVocab:
        """The vocabulary that `teacher_ids` of teacher "draft" and `teacher_max` (but for "full") are over."""
        return self.vocabularies[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the declared vocabularies, the main one's first."""
        return tuple(vocab.size for vocab in self.vocabularies)

    def in_draft(self, main: VocabMap) -> NDArray[np.bool_] | None:
        """[V]: which of `teacher_ids`, as teacher "full" has them, are in the main draft vocabulary of this map.

        None for the others, whose ids are no verifier's; see `teacher_stats.tail_mass`.
        """
        return main.padded(self.vocab_size).t2d if self.kind == "full" else None

    @property
    def ids_below(self) -> int:
        """Bound of `teacher_ids`."""
        return self.vocab_size if self.kind == "full" else self.main.size

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the [P] float32 arrays."""
        main, *more = (vocab.log_z for vocab in self.vocabularies)
        return ("teacher_max", "log_z_full", main, "next_token_logit", *more)

    def choose(self, size: int = 0) -> DraftVocab:
        """The declared vocabulary of a size, 0 for the main one. Raises InputError naming the sizes that exist."""
        for vocab in self.vocabularies:
            if size in (0, vocab.size):
                return vocab
        raise InputError(
            f"--draft-vocab-size: expected one of the store's draft vocabularies, of sizes {list(self.sizes)}, "
            f"found {size}; further ones are declared at capture, by --more-vocab-maps"
        )

    def entry_specs(self) -> dict[str, ArraySpec]:
        """What is kept beside the scalars, by name."""
        if self.kind == "hidden":
            dtype = "uint16" if self.compute_dtype == "bfloat16" else "float32"
            return {"teacher_hidden": _spec(dtype, self.hidden_size)}
        return {
            "teacher_ids": _spec(id_dtype(self.ids_below), self.top_k),
            "teacher_gaps": _spec("float16", self.top_k),
        }

    def array_specs(self) -> dict[str, ArraySpec]:
        """Every array on the teacher axis, by name."""
        return {
            "teacher_positions": ArraySpec(axis=TEACHER_AXIS, dtype="int32"),
            **self.entry_specs(),
            "argmax": ArraySpec(axis=TEACHER_AXIS, dtype="uint32"),
            **{name: _spec("float32") for name in self.scalars},
        }


def draft_teacher(*, draft_vocab_size: int, top_k: int) -> TeacherForm:
    """Teacher "draft" over one vocabulary, for what depends on neither the verifier nor the map."""
    vocab = DraftVocab(size=draft_vocab_size, hash="")
    return TeacherForm(
        kind="draft", top_k=top_k, vocab_size=0, hidden_size=0, compute_dtype="bfloat16", vocabularies=(vocab,)
    )


def _spec(dtype: str, *inner: int) -> ArraySpec:
    return ArraySpec(axis=TEACHER_AXIS, dtype=dtype, inner=inner, compress=False)
