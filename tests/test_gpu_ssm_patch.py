"""What the patch that goes round for fp32 SSM state changes, bit by bit: nothing in a prefill of one piece.

The patch lets mamba-ssm's `_state_passing_fwd` return the states at its chunks' borders in float32 instead of C's
dtype. Between the chunks of one call the state is in float32 registers anyway, and the kernel that reads the border
states casts them to C's dtype before its dot product, so the values that it multiplies are the same. What does change
the model is a state that is rounded from call to call: see `draftcache.capture.verifier.ssm_precision`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from draftcache.capture.verifier.load import load_verifier
from draftcache.capture.verifier.ssm_precision import DT_LIMIT, enforce_contract
from support.paths import DEMO
from support.verifier_forwards import run, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or find_spec("mamba_ssm") is None, reason="needs a CUDA device and mamba-ssm"
    ),
    pytest.mark.filterwarnings("ignore"),
]
HEADS, WIDTH, GROUPS, STATE, CHUNK = 64, 64, 8, 128, 128  # of Nemotron-Cascade-2-30B-A3B


@contextmanager
def patched(monkeypatch: pytest.MonkeyPatch, module_name: str) -> Iterator[list[torch.dtype]]:
    """Border states in float32, by replacing the function in that module; dtypes of what its calls returned."""
    module: Any = __import__(f"mamba_ssm.ops.triton.{module_name}", fromlist=["_"])
    original, seen = module._state_passing_fwd, []

    def in_float32(*arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named | {"out_dtype": torch.float32})
        seen.append(result[0].dtype)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(module, "_state_passing_fwd", in_float32)
        yield seen


def scan(parts: list[torch.Tensor], initial: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, a, b, c = parts
    return mamba_chunk_scan_combined(  # type: ignore[no-any-return]
        x, dt, a, b, c, chunk_size=CHUNK, dt_softplus=True, dt_limit=DT_LIMIT, initial_states=initial,
        return_final_states=True,
    )  # fmt: skip


def inputs(length: int) -> list[torch.Tensor]:
    """bf16 inputs of the verifier's shape; half of the heads remember for thousands of tokens."""
    made = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made, device="cuda")

    x = normal(1, length, HEADS, WIDTH).bfloat16()
    dt = (normal(1, length, HEADS) - 3).bfloat16()
    a = -torch.logspace(-3.5, 0.5, HEADS, device="cuda")
    b, c = (normal(1, length, GROUPS, STATE).mul(0.3).bfloat16() for _ in range(2))
    return [x, dt, a, b, c]


@pytest.mark.parametrize("length", [CHUNK, 1_000, 32_768])
def test_a_scan_in_one_piece_is_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    parts = inputs(length)
    plain = scan(parts)
    with patched(monkeypatch, "ssd_combined") as seen:
        found = scan(parts)
    assert seen == [torch.float32]  # it ran, and not in bf16
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, plain, strict=True))
    other = scan([parts[0].flip(1), *parts[1:]])
    assert not torch.equal(other[0], plain[0])  # the comparison could fail


def test_where_it_is_defined_the_patch_does_not_even_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with patched(monkeypatch, "ssd_state_passing") as seen:
        scan(inputs(CHUNK))
    assert seen == []


def test_a_state_that_is_rounded_between_calls_is_what_costs_accuracy() -> None:
    parts = inputs(16_384)
    whole, _ = scan(parts)
    errors = {}
    for carry in (torch.float32, torch.bfloat16):
        state, pieces = None, []
        for first in range(0, 16_384, CHUNK):
            piece = [part if part.dim() == 1 else part[:, first : first + CHUNK] for part in parts]
            out, state = scan(piece, state)
            state = state.to(carry).float()
            pieces.append(out)
        errors[carry] = float((torch.cat(pieces, 1).float() - whole.float()).norm() / whole.float().norm())
    print("relative difference to one piece, carry in float32 and in bf16:", list(errors.values()))
    assert errors[torch.float32] < 2e-3
    assert errors[torch.bfloat16] > 2 * errors[torch.float32]


def test_taps_and_final_states_of_a_trained_verifier_are_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_verifier(DEMO, device=torch.device("cuda"), dtype=torch.bfloat16, trust_remote_code=False)
    enforce_contract(found.model, DEMO, allow_fallback=False)
    ids = tokens(1, 1_024).cuda()
    plain = run(found.body_forward, ids, (2, 5, 10))
    with patched(monkeypatch, "ssd_combined") as seen:
        with_patch = run(found.body_forward, ids, (2, 5, 10))
    assert seen
    assert set(seen) == {torch.float32}
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(with_patch, plain, strict=True))
