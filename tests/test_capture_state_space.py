"""Mamba-2's scan and single step for CPUs, beside loops over tokens in float64 and beside transformers' own code."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers.models.nemotron_h.modeling_nemotron_h as nemotron
from torch import Tensor
from torch.nn import functional

from draftcache.capture.kernels import state_space
from draftcache.capture.kernels.state_space import chunk_scan, selective_state_update
from draftcache.capture.verifier.ssm_precision import scan_function, torch_forms_on_the_cpu
from draftcache.tools.demo.pipeline import load_demo_verifier
from support.tiny_models import make_model

HEADS, WIDTH, GROUPS, SIZE, CHUNK = 6, 5, 2, 7, 16


def arguments(batch: int, length: int, decay: float, seed: int = 0) -> tuple[list[Tensor], dict[str, Any]]:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    rows = [
        normal(batch, length, HEADS, WIDTH),
        normal(batch, length, HEADS),
        -decay * torch.rand(HEADS, generator=rng),
    ]
    rows += [normal(batch, length, GROUPS, SIZE), normal(batch, length, GROUPS, SIZE)]
    named = {"D": normal(HEADS), "dt_bias": normal(HEADS), "initial_states": normal(batch, HEADS, WIDTH, SIZE)}
    return rows, named | {"chunk_size": CHUNK, "dt_softplus": True, "dt_limit": (0.0, float("inf"))}


def token_by_token(rows: list[Tensor], named: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The recurrence in float64, one token after the other."""
    x, dt, a, b, c = (value.double() for value in rows)
    dt = functional.softplus(dt + named["dt_bias"].double())
    b, c = (value.repeat_interleave(HEADS // GROUPS, dim=2) for value in (b, c))
    state, out = named["initial_states"].double(), []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None, None]
        state = torch.exp(a[:, None, None] * step) * state + step * x[:, t, ..., None] * b[:, t, :, None]
        out.append((state * c[:, t, :, None]).sum(-1) + named["D"].double()[:, None] * x[:, t])
    return torch.stack(out, 1), state


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 83])
@pytest.mark.parametrize("decay", [0.01, 1.0, 30.0])
def test_the_scan_is_the_recurrence(length: int, decay: float) -> None:
    rows, named = arguments(3, length, decay)
    y, last = chunk_scan(*rows, **named, return_final_states=True)
    expected, state = token_by_token(rows, named)
    for found, exact in ((y.double(), expected), (last.double(), state)):
        roundings = 2e-7 * float(exact.abs().max())  # of sums as large as the largest value
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=max(1e-5, roundings))
    assert torch.equal(chunk_scan(*rows, **named), y)


def test_pieces_with_a_carried_state_are_the_whole() -> None:
    rows, named = arguments(2, 48, 0.5)
    whole, last = chunk_scan(*rows, **named, return_final_states=True)
    x, dt, a, b, c = rows
    first, state = chunk_scan(x[:, :20], dt[:, :20], a, b[:, :20], c[:, :20], **named, return_final_states=True)
    carried = named | {"initial_states": state}
    second, end = chunk_scan(x[:, 20:], dt[:, 20:], a, b[:, 20:], c[:, 20:], **carried, return_final_states=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-5)


def test_a_scan_that_forgets_between_chunks_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the comparison with the recurrence."""
    rows, named = arguments(2, 48, 0.5)
    expected, _ = token_by_token(rows, named)
    states = state_space._states

    def forgetful(added: Tensor, decay: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        before, last = states(added, decay, first)
        return torch.zeros_like(before), last

    monkeypatch.setattr(state_space, "_states", forgetful)
    assert (chunk_scan(*rows, **named) - expected).abs().max() > 0.1


def test_the_scan_is_transformers_own_one() -> None:
    rows, named = arguments(2, 83, 4.0)
    theirs = inspect.unwrap(nemotron.mamba2_chunk_scan)(*rows, **named, return_final_states=True)
    for ours, other in zip(chunk_scan(*rows, **named, return_final_states=True), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_step_is_transformers_own_one(dtype: torch.dtype) -> None:
    rows, named = arguments(4, 3, 4.0)
    x, dt, a, b, c = rows
    x, dt, b, c = (value.to(dtype) for value in (x, dt, b, c))
    wide = [named[name][:, None].expand(-1, WIDTH).to(dtype) for name in ("D", "dt_bias")]
    a_wide = a[:, None, None].expand(-1, WIDTH, SIZE)
    states = [named["initial_states"].clone(), named["initial_states"].clone()]
    forms = (selective_state_update, inspect.unwrap(nemotron.mamba2_selective_state_update))
    for t in range(x.shape[1]):
        dt_wide = dt[:, t, :, None].expand(-1, -1, WIDTH)
        outs = [
            form(state, x[:, t], dt_wide, a_wide, b[:, t], c[:, t], wide[0], dt_bias=wide[1], dt_softplus=True)
            for form, state in zip(forms, states, strict=True)
        ]
        torch.testing.assert_close(*outs, rtol=2e-6 if dtype == torch.float32 else 1e-2, atol=2e-6)
        torch.testing.assert_close(*states, rtol=2e-6, atol=2e-6)
        assert outs[0].dtype == dtype


def test_the_verifiers_own_step_is_ours_and_a_state_of_another_dtype_goes_to_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[torch.dtype] = []
    real = selective_state_update

    def counted(state: Tensor, *rest: Any, **named: Any) -> Tensor:
        calls.append(state.dtype)
        return real(state, *rest, **named)

    monkeypatch.setattr("draftcache.capture.verifier.ssm_precision.selective_state_update", counted)
    model = make_model("nemotron_h")
    torch_forms_on_the_cpu([module for module in model.modules() if hasattr(module, "A_log")])
    model.generate(input_ids=torch.arange(4, 9)[None], max_new_tokens=3, do_sample=False)
    assert calls
    assert set(calls) == {torch.float32}
    rows, named = arguments(2, 1, 1.0)
    x, dt, a, b, c = rows
    before = len(calls)
    state = named["initial_states"].to(torch.bfloat16)
    nemotron.mamba2_selective_state_update(
        state,
        x[:, 0],
        dt[:, 0, :, None].expand(-1, -1, WIDTH),
        a[:, None, None].expand(-1, WIDTH, SIZE),
        b[:, 0],
        c[:, 0],
    )
    assert len(calls) == before


def test_the_demos_verifier_is_captured_through_it() -> None:
    """Its own code runs transformers' scan, with which every block of ours is compared at the start of a job."""
    verifier = load_demo_verifier()
    mixers = [module for module in verifier.model.modules() if hasattr(module, "A_log")]
    assert scan_function(mixers[0]) is not chunk_scan
    torch.manual_seed(0)
    differences = verifier.body_forward.block_differences(torch.randint(0, 4096, (1, 200)))
    assert 0 < max(differences) < 1e-5
