"""Matrix products of bfloat16 operands whose sums are kept in float32, and what makes logits of them.

Products of two bfloat16 numbers are exact in float32, so tensor cores may form them. Rounding their sums to bfloat16
would not be harmless: in bfloat16, logits between 16 and 32 have steps of 0.125, which is 6 % in a probability.
"""

from __future__ import annotations

import torch
from torch import Tensor


def float32_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return `rows matrix^T` [T, V] of rows [T, H] and a matrix [V, H], in float32 at least.

    On a GPU two bfloat16 operands go through tensor cores. Everywhere else both operands are widened first.
    """
    if rows.is_cuda and rows.dtype == matrix.dtype == torch.bfloat16:
        return torch.mm(rows, matrix.t(), out_dtype=torch.float32)
    dtype = torch.promote_types(torch.promote_types(rows.dtype, matrix.dtype), torch.float32)
    return rows.to(dtype) @ matrix.to(dtype).t()


def scale_and_cap(products: Tensor, scale: float, cap: float | None) -> Tensor:
    """Make `cap * tanh(scale * products / cap)` of `products`, of any shape, in place and return it.

    `cap` None leaves `scale * products`. Scale 1 without a cap touches nothing.
    """
    if cap is not None:
        return products.mul_(scale / cap).tanh_().mul_(cap)
    return products if scale == 1.0 else products.mul_(scale)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left^T right` to `total` in place, in its dtype: total [A, B], left [T, A], right [T, B]."""
    if left.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.t().to(total.dtype), right.to(total.dtype))
