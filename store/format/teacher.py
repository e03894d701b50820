"""How a store keeps the verifier's distribution, the teacher: in which arrays, and over which draft vocabularies.

| teacher | what is kept at each position          | what training can make of it                                      |
|---------|----------------------------------------|-------------------------------------------------------------------|
| draft   | top-k over the main draft vocabulary   | tail-bucket loss, for that vocabulary and its subsets             |
| full    | top-k over the verifier's vocabulary   | tail-bucket loss, for any declared draft vocabulary               |
| hidden  | the final-norm state                   | exact cross entropy, for any declared draft vocabulary            |

Each of them keeps the scalars too, which make the tail's and the out-of-vocabulary mass exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError
from draftcache.store.format.array_spec import TEACHER_AXIS, ArraySpec, id_dtype
from draftcache.store.format.vocab_map import VocabMap

TEACHERS = ("draft", "full", "hidden")


@dataclass(frozen=True, kw_only=True)
class DraftVocab:
    """A draft vocabulary that the store is declared for, and the names of the array, tensor and file stored for it."""

    size: int
    """D, the number of token ids."""
    hash: str
    """`VocabMap.hash` of the vocabulary's map."""
    suffix: str = ""
    """End of its names: empty for the main vocabulary, `_<size>` for a further one."""

    @classmethod
    def further(cls, size: int, hash: str = "") -> DraftVocab:  # noqa: A002
        """Return a vocabulary that is declared beside the main one."""
        return cls(size=size, hash=hash, suffix=f"_{size}")

    @property
    def log_z(self) -> str:
        """Name of the array [P] float32 that holds the log of the sum of exp(z) over this vocabulary."""
        return f"log_z_draft{self.suffix}"

    @property
    def head(self) -> str:
        """Name of the tensor [size, H] of frozen.safetensors: this vocabulary's rows of the verifier's head."""
        return f"lm_head{self.suffix}"

    @property
    def map_name(self) -> str:
        """Name of the file that holds the vocabulary's map."""
        return f"vocab_map{self.suffix}.safetensors"


@dataclass(frozen=True, kw_only=True)
class TeacherForm:
    """Which arrays hold the teacher. Raises InputError where the values do not fit together."""

    kind: str
    """One of `TEACHERS`."""
    top_k: int
    """Entries per position; 0 for "hidden", which has none."""
    vocab_size: int
    """V, the verifier's rows of logits."""
    hidden_size: int
    """H, the width of the final-norm states."""
    compute_dtype: str
    """The verifier's dtype. Final-norm states are stored in it and never rounded, whatever the taps' mode does."""
    vocabularies: tuple[DraftVocab, ...]
    """The declared draft vocabularies, the main one first."""

    def __post_init__(self) -> None:
        if self.kind not in TEACHERS:
            raise InputError(f"teacher: expected one of {list(TEACHERS)}, found {self.kind!r}")
        if len(set(self.sizes)) < len(self.sizes):
            raise InputError(f"draft vocabularies: expected sizes that differ, found {list(self.sizes)}")

    @property
    def main(self) -> DraftVocab:
        """The main vocabulary. `teacher_ids` of teacher "draft", and `teacher_max` of all but "full", are over it."""
        return self.vocabularies[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the declared vocabularies, the main one's first."""
        return tuple(vocab.size for vocab in self.vocabularies)

    def in_draft(self, main: VocabMap) -> NDArray[np.bool_] | None:
        """Return, as [V] bool, which of the verifier's ids are in the main draft vocabulary, whose map is `main`.

        Only teacher "full" has such ids in `teacher_ids`: for the others this is None. See `teacher_stats.tail_mass`.
        """
        return main.padded(self.vocab_size).t2d if self.kind == "full" else None

    @property
    def ids_below(self) -> int:
        """The bound that every value of `teacher_ids` is below."""
        return self.vocab_size if self.kind == "full" else self.main.size

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the arrays [P] float32 that every form of the teacher keeps."""
        main, *more = (vocab.log_z for vocab in self.vocabularies)
        return ("teacher_max", "log_z_full", main, "next_token_logit", *more)

    def choose(self, size: int = 0) -> DraftVocab:
        """Return the declared vocabulary of `size`, or the main one for 0.

        Raises InputError, which names the sizes that exist, where there is none.
        """
        for vocab in self.vocabularies:
            if size in (0, vocab.size):
                return vocab
        raise InputError(
            f"--draft-vocab-size: expected one of the store's draft vocabularies, of sizes {list(self.sizes)}, "
            f"found {size}; further ones are declared at capture, by --more-vocab-maps"
        )

    def entry_specs(self) -> dict[str, ArraySpec]:
        """Return the description of each array that is kept beside the scalars, by name."""
        if self.kind == "hidden":
            dtype = "uint16" if self.compute_dtype == "bfloat16" else "float32"
            return {"teacher_hidden": _spec(dtype, self.hidden_size)}
        return {
            "teacher_ids": _spec(id_dtype(self.ids_below), self.top_k),
            "teacher_gaps": _spec("float16", self.top_k),
        }

    def array_specs(self) -> dict[str, ArraySpec]:
        """Return the description of every array on the teacher axis, by name."""
        return {
            "teacher_positions": ArraySpec(axis=TEACHER_AXIS, dtype="int32"),
            **self.entry_specs(),
            "argmax": ArraySpec(axis=TEACHER_AXIS, dtype="uint32"),
            **{name: _spec("float32") for name in self.scalars},
        }


def draft_teacher(*, draft_vocab_size: int, top_k: int) -> TeacherForm:
    """Return teacher "draft" over one vocabulary, for uses that depend on neither the verifier nor the map."""
    vocab = DraftVocab(size=draft_vocab_size, hash="")
    return TeacherForm(
        kind="draft", top_k=top_k, vocab_size=0, hidden_size=0, compute_dtype="bfloat16", vocabularies=(vocab,)
    )


def _spec(dtype: str, *inner: int) -> ArraySpec:
    return ArraySpec(axis=TEACHER_AXIS, dtype=dtype, inner=inner, compress=False)
