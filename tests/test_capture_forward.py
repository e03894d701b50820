"""Our forward beside the model's own code: whole, in pieces, padded, on random and on trained weights."""

from __future__ import annotations

import pytest
import torch

from draftcache.capture.verifier.forward import PlainForward
from draftcache.capture.verifier.load import find_modules, load_verifier
from draftcache.capture.verifier.nemotron.forward import NemotronForward
from draftcache.capture.verifier.ssm_precision import lift_dt_limit, mamba_mixers
from support.paths import DEMO
from support.tiny_models import make_model
from support.verifier_forwards import run, tokens, worst

CPU = torch.device("cpu")
LAYERS = (0, 2, 4)


def tiny() -> tuple[NemotronForward, PlainForward]:
    model = make_model("nemotron_h")
    lift_dt_limit(mamba_mixers(model))
    found = find_modules(model, CPU)
    return NemotronForward(model), PlainForward(found.body, found.blocks, found.final_norm)


def trained() -> tuple[NemotronForward, PlainForward]:
    found = load_verifier(DEMO, device=CPU, dtype=torch.float32, trust_remote_code=False)
    lift_dt_limit(mamba_mixers(found.model))
    return NemotronForward(found.model), PlainForward(found.body, found.blocks, found.final_norm)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 50, 130])
def test_random_weights_equal_the_models_code(length: int) -> None:
    ours, plain = tiny()
    ids = tokens(2, length)
    assert worst(run(ours, ids, LAYERS), run(plain, ids, LAYERS)) < 2e-5


def test_trained_weights_equal_the_models_code() -> None:
    ours, plain = trained()
    ids = tokens(1, 300)
    assert worst(run(ours, ids, (2, 5, 10)), run(plain, ids, (2, 5, 10))) < 2e-5


@pytest.mark.parametrize("chunk", [1, 2, 16, 48, 299])
@pytest.mark.parametrize("which", [0, 1])
def test_pieces_equal_one_piece(which: int, chunk: int) -> None:
    """Also where a piece is no multiple of the scan's chunk, or shorter than the convolution."""
    if which == 1 and chunk == 1:
        pytest.skip("the model's own code takes single tokens for decoding")
    forward = trained()[which]
    ids = tokens(1, 300 if chunk > 2 else 70)  # each piece is a call
    assert worst(run(forward, ids, (2, 5, 10), chunk), run(forward, ids, (2, 5, 10))) < 2e-5


def test_a_state_that_is_rounded_or_forgotten_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    ours, _ = trained()
    ids = tokens(1, 300)
    whole = run(ours, ids, (2, 5, 10))
    for change in (lambda state: state.to(torch.bfloat16).float(), torch.zeros_like):
        forward, _ = trained()
        for block in forward._blocks:
            if hasattr(block, "_scan"):
                scan = block._scan
                block._scan = lambda *args, scan=scan, change=change, **named: _changed(scan(*args, **named), change)  # type: ignore[misc]
        assert worst(run(forward, ids, (2, 5, 10), 48), whole) > 1e-4


def _changed(result: tuple[torch.Tensor, torch.Tensor], change: object) -> tuple[torch.Tensor, torch.Tensor]:
    return result[0], change(result[1])  # type: ignore[operator]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("chunk", [1 << 20, 64])
def test_rows_do_not_depend_on_their_batch_or_padding(which: int, chunk: int) -> None:
    forward = trained()[which]
    lengths = [300, 211, 5]
    batch = torch.zeros(3, 300, dtype=torch.int64)
    for row, length in enumerate(lengths):
        batch[row, :length] = tokens(1, length, seed=row)
    together = run(forward, batch, (2, 5, 10), chunk)
    for row, length in enumerate(lengths):
        alone = run(forward, tokens(1, length, seed=row), (2, 5, 10))
        assert worst([tensor[row : row + 1, :length] for tensor in together], alone) < 2e-5


def test_what_is_not_handled_is_named() -> None:
    assert NemotronForward.supports(make_model("nemotron_h")) is None
    assert NemotronForward.supports(make_model("llama")) == "LlamaForCausalLM is no NemotronH of transformers"
    model = make_model("nemotron_h")
    model.config.n_group = 2
    assert NemotronForward.supports(model) == "its n_group 2 is not handled"


@pytest.mark.parametrize("narrow", [True, False])
def test_router_weights_are_multiplied_as_they_are(narrow: bool) -> None:
    """Float32 ones stay so unless bfloat16 holds the same numbers."""
    model = make_model("nemotron_h")
    lift_dt_limit(mamba_mixers(model))
    with torch.no_grad():
        for block in model.base_model.layers:
            if block.block_type == "moe":
                weight = block.mixer.gate.weight
                weight.copy_(weight.bfloat16().float() * (1.0 if narrow else 1.001))
    found = find_modules(model, CPU)
    ours = NemotronForward(model)
    routers = [block._router for block in ours._blocks if hasattr(block, "_router")]
    assert {router.dtype for router in routers} == {torch.bfloat16 if narrow else torch.float32}
    plain = PlainForward(found.body, found.blocks, found.final_norm)
    assert worst(run(ours, tokens(1, 40), LAYERS), run(plain, tokens(1, 40), LAYERS)) < 2e-5
