"""The teacher signal at the positions that carry loss: top-k over the draft vocabulary plus exact scalars.

A renormalised top-k would bias the gradient by 2 * tau in L1 (tau: the dropped mass), so nothing is
renormalised: `log_z_full` and `log_z_draft` make both the tail and the out-of-vocabulary mass known exactly.
"""

from __future__ import annotations

import torch
from torch import nn

from capture.kernels.row_stats import row_stats
from capture.verifier import head_logits


@torch.inference_mode()
def teacher_signal(
    final: torch.Tensor,
    next_tokens: torch.Tensor,
    head: nn.Linear,
    target_ids: torch.Tensor,
    *,
    top_k: int,
    head_slice: int,
) -> dict[str, torch.Tensor]:
    """Teacher arrays of `store.schema` for P positions, computed `head_slice` rows at a time.

    `final` [P, H]: final-norm states at the teacher positions; `next_tokens` [P] int64: the realised tokens
    x_{p+1}; `target_ids` [D] int64: the draft vocabulary, ascending. Logits are float32 throughout.
    """
    parts = [
        _one_slice(
            head_logits(final[first : first + head_slice], head),
            next_tokens[first : first + head_slice],
            target_ids,
            top_k,
        )
        for first in range(0, final.shape[0], head_slice)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _one_slice(
    logits: torch.Tensor, next_tokens: torch.Tensor, target_ids: torch.Tensor, top_k: int
) -> dict[str, torch.Tensor]:
    in_draft = logits.index_select(1, target_ids)
    values, ids = torch.topk(in_draft, top_k, dim=-1)
    largest = values[:, :1]
    over_all = row_stats(logits)
    return {
        "teacher_ids": ids,
        # Gaps, not logits: float16 keeps them to 8e-8 in KL, where bf16 logits would cost 2e-4.
        "teacher_gaps": (largest - values).to(torch.float16),
        "teacher_max": largest[:, 0],
        "log_z_full": over_all.log_sum_exp,
        "log_z_draft": row_stats(in_draft).log_sum_exp,
        "argmax": over_all.argmax,
        "next_token_logit": logits.gather(1, next_tokens[:, None])[:, 0],
    }
