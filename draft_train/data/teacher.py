"""The stored teacher as a draft of one of the store's vocabularies reads it.

Stored ids are of the main draft vocabulary, or with teacher "full" of the verifier's. Entries outside the chosen
vocabulary are absent: id -1, logit -inf, hence p = 0. The tail mass stays exact, because `log_z_draft` is the chosen
vocabulary's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError
from draftcache.store.common.products import float32_product
from draftcache.store.format.teacher import DraftVocab
from draftcache.store.reader import StoreReader


@dataclass(frozen=True)
class TeacherView:
    """The teacher arrays of a store under one draft vocabulary; by default, as a store's main one has them."""

    log_z: str = "log_z_draft"
    """Array of the chosen vocabulary's log Z."""
    lookup: NDArray[np.int64] | None = None
    """The chosen vocabulary's id of each id that may be stored, -1 outside; None where they are the same."""

    @classmethod
    def of(cls, store: StoreReader, vocab: DraftVocab) -> TeacherView:
        """Raises InputError where the stored top-k may lack the best entries of this vocabulary."""
        form = store.manifest.teacher_form
        if form.kind == "hidden" or (form.kind == "draft" and vocab == form.main):
            return cls(log_z=vocab.log_z)
        lookup = store.vocab_map(vocab.size).padded(form.vocab_size).target_to_draft().astype(np.int64)
        if form.kind == "draft":
            lookup = lookup[store.vocab_map().target_ids]
            if (outside := vocab.size - int((lookup >= 0).sum())) > 0:
                raise InputError(
                    f"{store.location}: --draft-vocab-size {vocab.size}: expected a subset of the main draft "
                    f"vocabulary of {form.main.size}, whose best entries are stored, found {outside} ids outside it: "
                    "the best of them may be missing; capture with --teacher full or --teacher hidden"
                )
        return cls(log_z=vocab.log_z, lookup=lookup)

    def columns(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
        """The teacher tensors of a `Batch` on the CPU. Where no entries were read, there are 0 of them."""
        positions = arrays["teacher_positions"].shape[0]
        ids, logits = np.empty((positions, 0), np.int64), np.empty((positions, 0), np.float32)
        if "teacher_ids" in arrays:
            ids = arrays["teacher_ids"].astype(np.int64)
            logits = arrays["teacher_max"][:, None] - arrays["teacher_gaps"].astype(np.float32)
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


def exact_probabilities(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """p [T, D] float32 of final-norm states [T, H], over the vocabulary whose rows of the head [D, H] are given.

    Logits are float32 sums of exact products, as capture makes them; no gradient.
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return torch.softmax(float32_product(hidden, head), dim=-1)
