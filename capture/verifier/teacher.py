"""The teacher signal at the positions that carry loss: top-k logits or final-norm states, plus exact scalars.

A renormalised top-k would bias the gradient by 2 * tau in L1 (tau: the dropped mass), so nothing is renormalised:
`log_z_full` and `log_z_draft` give both the tail's mass and the out-of-vocabulary mass exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from draftcache.capture.kernels.row_stats import draft_logits, largest, part_largest, row_stats
from draftcache.capture.verifier.head import head_logits
from draftcache.store.common.errors import InputError
from draftcache.store.format.head_form import IDENTITY, HeadForm
from draftcache.store.format.teacher import TeacherForm


@dataclass(frozen=True, kw_only=True)
class TeacherHead:
    """The head, and how the teacher signal is made of its logits."""

    head: nn.Linear
    form: TeacherForm
    target_ids: tuple[torch.Tensor, ...]
    """Per draft vocabulary of the form, its token ids [D] int64, ascending."""
    slice_rows: int
    """Rows whose logits [rows, V] are in memory at once."""
    head_form: HeadForm = IDENTITY
    """Scale and cap of the logits."""


@torch.inference_mode()
def teacher_signal(final: torch.Tensor, next_tokens: torch.Tensor, teacher: TeacherHead) -> dict[str, torch.Tensor]:
    """The store's teacher arrays for P positions, save the positions themselves, computed `slice_rows` rows at a time.

    `final` [P, H]: final-norm states at the teacher positions; `next_tokens` [P] int64: the realised tokens
    x_{p+1}. Logits are float32 throughout, and nothing waits for the device. Raises InputError where the states are to
    be kept and their dtype is not the form's compute dtype.
    """
    parts = []
    for first in range(0, final.shape[0], teacher.slice_rows):
        rows = slice(first, first + teacher.slice_rows)
        parts.append(_one_slice(head_logits(final[rows], teacher.head, teacher.head_form), next_tokens[rows], teacher))
    signal = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if teacher.form.kind == "hidden":
        signal["teacher_hidden"] = _stored_states(final, teacher.form)
    return signal


def _one_slice(logits: torch.Tensor, next_tokens: torch.Tensor, teacher: TeacherHead) -> dict[str, torch.Tensor]:
    form, over_all = teacher.form, row_stats(logits)
    signal = {
        "log_z_full": over_all.log_sum_exp,
        "argmax": over_all.argmax,
        "next_token_logit": logits.gather(1, next_tokens[:, None])[:, 0],
    }
    for vocab, target_ids in zip(form.vocabularies, teacher.target_ids, strict=True):
        in_draft = draft_logits(logits, target_ids)
        signal[vocab.log_z] = in_draft.log_sum_exp
        if vocab == form.main and form.kind == "draft":
            signal |= _top_k(*largest(in_draft.logits, in_draft.part_largest, form.top_k))
        elif vocab == form.main and form.kind == "hidden":
            signal["teacher_max"] = in_draft.logits.amax(dim=-1)
    return signal | _top_k(*largest(logits, part_largest(logits), form.top_k)) if form.kind == "full" else signal


def _top_k(values: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    highest = values[:, :1]
    return {
        "teacher_ids": ids,
        # Gaps to the highest logit are kept: in float16 they cost 8e-8 in KL, where bf16 logits would cost 2e-4.
        "teacher_gaps": (highest - values).to(torch.float16),
        "teacher_max": highest[:, 0],
    }


def _stored_states(final: torch.Tensor, form: TeacherForm) -> torch.Tensor:
    """The states [P, H] as they are, bfloat16 as bit patterns in uint16. Raises InputError for another dtype."""
    dtype = str(final.dtype).removeprefix("torch.")
    if dtype != form.compute_dtype:
        raise InputError(
            f"--teacher hidden: expected final-norm states of the compute dtype {form.compute_dtype}, found {dtype}; "
            "storing them would round them: use --compute-dtype float32"
        )
    return final.contiguous().view(torch.uint16) if final.dtype == torch.bfloat16 else final
