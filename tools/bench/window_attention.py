"""The draft's own attention kernels beside flex attention, on what both can do: step 0, causal, a window of 4,096.

`python -m draftcache.tools.bench.window_attention [--lengths 8192,32768] [--output FILE]` needs a CUDA device. There
are 32 query heads and 2 key-value heads of width 128, in bf16. The cases are `kernels-LENGTH` and `flex-LENGTH`, which
is compiled and has its block mask made beforehand. `forward_ms` and `backward_ms` are medians. `error` is the largest
relative difference, in the 2-norm, of the output and the gradients to the plain reference in float32, at 5,120 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftcache.draft_train.drafts.eagle3.kernels.attention import (
    attend,
    attend_backward,
    attend_backward_reference,
    attend_reference,
)
from draftcache.draft_train.drafts.eagle3.kernels.attention_result import AttentionResult
from draftcache.draft_train.drafts.eagle3.kernels.step_mask import StepMask
from draftcache.store.common.errors import InputError
from draftcache.tools.result_rows import report, result_row

HEADS, GROUPS, WIDTH, WINDOW, CHECKED = 32, 2, 128, 4096, 5120
UNITS = {"forward_ms": "ms", "backward_ms": "ms", "error": "relative"}

Case = tuple[Callable[[], Any], Callable[[Any], tuple[Tensor, Tensor]]]
"""The forward, and the backward from the forward's result to the gradients of q [L, N, D] and kv [L, 2, G, D]."""


def main() -> None:
    """Check and time both kinds of attention at every length."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", default="8192,32768", help="(%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("expected a CUDA device, found none; this benchmark measures one")
    device, rows = torch.cuda.get_device_name(), []
    for length in map(int, arguments.lengths.split(",")):
        for name, build in (("kernels", kernels_case), ("flex", flex_case)):
            metrics = {**timed_case(build, length), "error": error(build)}
            rows += [result_row(f"{name}-{length}", key, value, UNITS[key], device) for key, value in metrics.items()]
    report(rows, arguments.output)


def operands(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random q [L, N, D], kv [L, 2, G, D] and the output's gradient [L, N, D], all bf16."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((length, HEADS, WIDTH), (length, 2, GROUPS, WIDTH), (length, HEADS, WIDTH))
    q, kv, given = (torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes)
    return q, kv, given


def mask_of(length: int) -> StepMask:
    """Return the mask of every row at step 0."""
    every = torch.arange(length, device="cuda")
    return StepMask(every, every.int(), every.int(), 0, WINDOW)


def kernels_case(q: Tensor, kv: Tensor, given: Tensor) -> Case:
    """Return the forward and backward of our kernels."""
    mask, own = mask_of(q.shape[0]), q.new_empty(0, q.shape[0], 2, GROUPS, WIDTH)

    def backward(held: AttentionResult) -> tuple[Tensor, Tensor]:
        kv_gradient = torch.zeros_like(kv, dtype=torch.float32)
        q_gradient = attend_backward(given, held, kv_gradient, torch.zeros_like(own, dtype=torch.float32))
        return q_gradient, kv_gradient

    return lambda: attend(q, kv, own, mask), backward


def flex_case(q: Tensor, kv: Tensor, given: Tensor) -> Case:
    """Return the forward and backward of PyTorch's flex attention. The copies into its layout are not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (row >= key) & (row - key < WINDOW)

    mask = create_block_mask(seen, None, None, q.shape[0], q.shape[0], device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    leaf_q = q.transpose(0, 1)[None].contiguous().requires_grad_()
    leaf_k, leaf_v = (part.transpose(0, 1)[None].contiguous().requires_grad_() for part in kv.unbind(1))
    given = given.transpose(0, 1)[None].contiguous()

    def backward(out: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.autograd.grad(out, (leaf_q, leaf_k, leaf_v), given, retain_graph=True)
        q_gradient, k_gradient, v_gradient = (part[0].transpose(0, 1) for part in found)
        return q_gradient, torch.stack((k_gradient, v_gradient), dim=1)

    return lambda: compiled(leaf_q, leaf_k, leaf_v, block_mask=mask, enable_gqa=True), backward


def timed_case(build: Callable[..., Case], length: int) -> dict[str, float]:
    """Return the median milliseconds of the forward and of the backward."""
    from triton.testing import do_bench

    forward, backward = build(*operands(length))
    held = forward()
    return {
        "forward_ms": do_bench(forward, return_mode="median"),
        "backward_ms": do_bench(lambda: backward(held), return_mode="median"),
    }


def error(build: Callable[..., Case]) -> float:
    """Return the error of the case that `build` makes, at a length whose scores all fit into memory."""
    q, kv, given = operands(CHECKED)
    forward, backward = build(q, kv, given)
    held = forward()
    out = held.out.clone() if isinstance(held, AttentionResult) else held[0].transpose(0, 1)
    found = (out, *backward(held))
    wide_q, wide_kv = q.float(), kv.float()
    own = wide_q.new_empty(0, CHECKED, 2, GROUPS, WIDTH)
    reference = attend_reference(wide_q, wide_kv, own, mask_of(CHECKED))
    kv_gradient = torch.zeros_like(wide_kv)
    q_gradient = attend_backward_reference(given.float(), reference, kv_gradient, torch.zeros_like(own))
    expected = (reference.out, q_gradient, kv_gradient)
    return max(float((x.float() - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True))


if __name__ == "__main__":
    main()
