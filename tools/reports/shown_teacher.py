"""The stored teacher of a conversation as tokens and probabilities, for every form of the teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.store.format.bf16 import bf16_to_float32
from draftcache.store.format.frozen import frozen_tensor
from draftcache.store.format.head_form import HeadForm
from draftcache.store.format.schema import Conversation
from draftcache.store.format.teacher_stats import tail_mass
from draftcache.store.reader import StoreReader

TOP_CHOICES = 3


def shown_teacher(
    reader: StoreReader, item: Conversation, text: Callable[[int], str] | None
) -> dict[int, dict[str, Any]]:
    """Return {position: the verifier's distribution over the next token}, as JSON values.

    The keys of a distribution are `choices` (`token_id`, `text` and `probability` of the TOP_CHOICES best stored
    tokens, which are of the draft vocabulary, or of the verifier's with teacher "full"), `argmax`,
    `next_token_probability`, `draft_vocab_probability` and `tail_mass` (None for teacher "hidden"). Probabilities are
    over the verifier's whole vocabulary.
    """
    arrays, form = item.arrays, reader.manifest.teacher_form
    log_z = arrays["log_z_full"].astype(np.float64)
    ids, logits = _choices(reader, item)
    probabilities = np.exp(logits - log_z[:, None]).tolist()
    in_draft = form.in_draft(reader.vocab_map())
    tails = [None] * log_z.size if form.kind == "hidden" else tail_mass(arrays, in_draft).tolist()
    columns = {
        "argmax": arrays["argmax"].tolist(),
        "next_token_probability": np.exp(arrays["next_token_logit"] - log_z).tolist(),
        "draft_vocab_probability": np.exp(arrays["log_z_draft"] - log_z).tolist(),
        "tail_mass": tails,
    }
    return {
        position: {
            "choices": [
                {"token_id": token_id, "text": None if text is None else text(token_id), "probability": probability}
                for token_id, probability in zip(ids[at].tolist(), probabilities[at], strict=True)
            ],
            **{name: values[at] for name, values in columns.items()},
        }
        for at, position in enumerate(arrays["teacher_positions"].tolist())
    }


def _choices(reader: StoreReader, item: Conversation) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the verifier ids [P, n] int64 of the largest logits, largest first, and these logits [P, n] float64."""
    arrays, form = item.arrays, reader.manifest.teacher_form
    target_ids = reader.vocab_map().target_ids
    if form.kind == "hidden":
        stored = arrays["teacher_hidden"]
        states = stored if stored.dtype == np.float32 else bf16_to_float32(stored)
        head = HeadForm.of(reader.manifest.verifier)
        all_logits = head.scale * (states @ frozen_tensor(reader.files.frozen, form.main.head).T)
        if head.cap is not None:
            all_logits = head.cap * np.tanh(all_logits / head.cap)
        order = np.argsort(-all_logits, axis=1, kind="stable")[:, :TOP_CHOICES]
        return target_ids[order], np.take_along_axis(all_logits, order, axis=1).astype(np.float64)
    top = min(TOP_CHOICES, form.top_k)
    ids = arrays["teacher_ids"][:, :top].astype(np.int64)
    logits = arrays["teacher_max"][:, None].astype(np.float64) - arrays["teacher_gaps"][:, :top]
    return (ids if form.kind == "full" else target_ids[ids]), logits
