"""The stored teacher over one of the store's draft vocabularies.

Stored ids are ids of the main draft vocabulary or, with teacher "full", of the verifier's vocabulary. Entries outside
the chosen vocabulary are absent: their id is -1 and their logit -inf, hence p = 0. The tail mass stays exact, because
`log_z_draft` is the log Z of the chosen vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError
from draftcache.store.common.products import float32_product, scale_and_cap
from draftcache.store.format.head_form import IDENTITY, HeadForm
from draftcache.store.format.teacher import DraftVocab
from draftcache.store.reader import StoreReader


@dataclass(frozen=True)
class TeacherView:
    """The teacher arrays of a store over one draft vocabulary; by default, over the store's main one."""

    log_z: str = "log_z_draft"
    """Name of the stored array with the chosen vocabulary's log Z."""
    lookup: NDArray[np.int64] | None = None
    """By stored id, the id in the chosen vocabulary, -1 if it is outside; None where stored ids need no mapping."""
    top_k: int = 0
    """How many of a position's stored entries, the best first, are used; 0 for all. The others count as tail."""

    @property
    def key(self) -> Hashable:
        """A value that two views of one store have in common exactly if they are the same."""
        return (self.log_z, None if self.lookup is None else self.lookup.tobytes(), self.top_k)

    @classmethod
    def of(cls, store: StoreReader, vocab: DraftVocab, top_k: int = 0) -> TeacherView:
        """Return the view over `vocab`, of the best `top_k` entries, or of all that are stored for 0.

        Raises InputError where the stored top-k may lack the vocabulary's best entries, or is smaller than `top_k`.
        """
        form = store.manifest.teacher_form
        stored = 0 if form.kind == "hidden" else store.manifest.top_k
        if top_k > stored:
            kept = f"the {stored} entries that are stored per position" if stored else "no --top-k: states are stored"
            raise InputError(f"{store.location}: --top-k: expected at most {kept}, found {top_k}")
        if form.kind == "hidden" or (form.kind == "draft" and vocab == form.main):
            return cls(log_z=vocab.log_z, top_k=top_k)
        lookup = store.vocab_map(vocab.size).padded(form.vocab_size).target_to_draft().astype(np.int64)
        if form.kind == "draft":
            lookup = lookup[store.vocab_map().target_ids]
            if (outside := vocab.size - int((lookup >= 0).sum())) > 0:
                raise InputError(
                    f"{store.location}: --draft-vocab-size {vocab.size}: expected a subset of the main draft "
                    f"vocabulary of {form.main.size}, whose best entries are stored, found {outside} ids outside it: "
                    "the best of them may be missing; capture with --teacher full or --teacher hidden"
                )
        return cls(log_z=vocab.log_z, lookup=lookup, top_k=top_k)

    def columns(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
        """Return the teacher tensors of a `Batch`, on the CPU. If no entries were read, K is 0."""
        positions = arrays["teacher_positions"].shape[0]
        ids, logits = np.empty((positions, 0), np.int64), np.empty((positions, 0), np.float32)
        if "teacher_ids" in arrays:
            used = slice(self.top_k or None)
            ids = arrays["teacher_ids"][:, used].astype(np.int64)
            logits = arrays["teacher_max"][:, None] - arrays["teacher_gaps"][:, used].astype(np.float32)
        if self.lookup is not None:
            ids = self.lookup[ids]
            logits = np.where(ids >= 0, logits, np.float32(-np.inf))
        values = {
            "teacher_ids": ids,
            "teacher_logits": logits,
            "log_z_full": arrays["log_z_full"],
            "log_z_draft": arrays[self.log_z],
            "argmax": arrays["argmax"].astype(np.int64),
        }
        tensors = {name: torch.from_numpy(value) for name, value in values.items()}
        if "teacher_hidden" in arrays:
            states = torch.from_numpy(arrays["teacher_hidden"])
            tensors["teacher_hidden"] = states if states.dtype == torch.float32 else states.view(torch.bfloat16)
        return tensors


def exact_probabilities(hidden: torch.Tensor, head: torch.Tensor, form: HeadForm = IDENTITY) -> torch.Tensor:
    """Return p [T, D] float32 of final-norm states [T, H] over the vocabulary whose head rows [D, H] are given.

    Logits are float32 sums of exact products, then scaled and capped by `form`, as in capture. No gradient flows
    through them.
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return torch.softmax(scale_and_cap(float32_product(hidden, head), form.scale, form.cap), dim=-1)
