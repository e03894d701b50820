"""Where kernels are tested: on a GPU, else on the CPU in Triton's interpreter where TRITON_INTERPRET=1 asks for it."""

from __future__ import annotations

import pytest
import torch

from draftcache.draft_train.drafts.eagle3.kernels.flash_attention import AT_COMPILATION
from draftcache.store.common.triton_launch import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
MARKS = [
    pytest.mark.usefixtures("seeded"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device, or TRITON_INTERPRET=1"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of lanes that are masked out afterwards
    pytest.mark.filterwarnings(f"ignore:{AT_COMPILATION}"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of FlashAttention's own packages
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # in the first backward pass of autograd's thread
]
DTYPES = [torch.float32] if INTERPRETED else [torch.bfloat16, torch.float32]
"""The interpreter cuts bfloat16 off instead of rounding it."""
BF16, F32 = torch.bfloat16, torch.float32
BOUND = {F32: 3e-5, BF16: 1e-2}
"""The largest `error` that a kernel may have, by dtype."""


def rand(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    """Draw normal random numbers of this shape on DEVICE."""
    return torch.randn(*shape, device=DEVICE).to(dtype)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the difference of two tensors of one shape, relative in the 2-norm; with NaN every comparison fails."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
