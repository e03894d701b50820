"""The hand-written pass against autograd over the unroll: loss and every gradient, in float64 with the plain twins."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.drafts.eagle3 import memory as memory_estimate
from draftcache.draft_train.drafts.eagle3.architecture import Eagle3Draft
from draftcache.draft_train.drafts.eagle3.choose_pass import choose_pass
from draftcache.draft_train.drafts.eagle3.fused_pass import FusedPass
from draftcache.draft_train.drafts.eagle3.fused_state import FusedPassSettings
from draftcache.draft_train.drafts.eagle3.kernels import flash_attention, runs
from draftcache.draft_train.drafts.eagle3.kernels.runs import find_runs
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.drafts.gradient_pass import PlainPass
from draftcache.draft_train.optimizer import make_optimizer
from draftcache.store.common.errors import InputError
from support.draft_batches import MASKS, batch_of
from support.draft_models import EAGLE31, WINDOW, embeddings, make_model
from support.gradient_passes import SMALL, config, near, objective, plain_pass, run


def fused(model: Eagle3Model, settings: FusedPassSettings = SMALL, **changes: object) -> FusedPass:
    return FusedPass(model, objective(**changes), embeddings(), settings, dtype=torch.float64)


EVERY = [[name] for name in MASKS] + [list(MASKS)]


@pytest.mark.parametrize(
    ("names", "window", "switches"),
    [(names, window, {}) for names in EVERY for window in (WINDOW, 3, None)]
    + [(list(MASKS), WINDOW, {"fc_norm": True}), (list(MASKS), WINDOW, {"norm_output": True})]
    + [(names, WINDOW, EAGLE31) for names in EVERY],
)
def test_equals_autograd(names: list[str], window: int | None, switches: dict[str, bool]) -> None:
    model, batch = make_model(window, **switches), batch_of(names, window)
    expected = run(plain_pass(model, objective(), embeddings()), model, batch)
    for settings in (
        SMALL,
        replace(SMALL, recompute_mlp=True),
        replace(SMALL, flash_attention=True),
        FusedPassSettings(),
    ):
        found = run(fused(model, settings), model, batch)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-9)
        assert near(found[1], expected[1])
    wider = run(fused(model), model, replace(batch, window=batch.window + 1))
    assert window is None or not near(wider[1], expected[1])  # negative control: one key more


@pytest.mark.parametrize("changes", [{"loss": "tv"}, {"loss": "renormalized-kl"}, {"out_of_vocab": "drop"}])
def test_equals_autograd_under_other_objectives(changes: dict[str, str]) -> None:
    model, batch = make_model(), batch_of(["three turns"], WINDOW)
    expected = run(plain_pass(model, objective(**changes), embeddings()), model, batch)
    found = run(fused(model, **changes), model, batch)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-9)
    assert near(found[1], expected[1])
    assert not near(run(fused(model), model, batch)[1], expected[1])


def test_gradients_of_micro_batches_add_up_and_weights_are_read_anew() -> None:
    model = make_model()
    training, plain = fused(model), plain_pass(model, objective(), embeddings())
    batches = [batch_of([name], WINDOW) for name in ("one turn", "to the end")]
    for _ in range(2):
        sums = []
        for one in (training, plain):
            for batch in batches[:1]:
                one(batch)
            sums.append(run(one, model, batches[1])[1])
        assert near(*sums)
        with torch.no_grad():
            for value in model.parameters():
                value.mul_(1.1)


def test_training_follows_the_plain_pass_under_the_real_optimizer() -> None:
    """Fused AdamW writes parameters without raising their version: whoever keeps copies by it keeps old ones."""
    runs = []
    for made in (lambda model: fused(model), lambda model: plain_pass(model, objective(), embeddings())):
        model = make_model()
        training, optimizer = made(model), make_optimizer(config(learning_rate=0.05), model)
        for name in ("one turn", "to the end", "three turns"):
            training(batch_of([name], WINDOW))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        runs.append({name: value.detach().clone() for name, value in model.named_parameters()})
    assert near(*runs, bound=1e-4)
    begun = {name: value.detach() for name, value in make_model().named_parameters()}
    assert not near(begun, runs[1], bound=1e-2)  # the steps are large enough to be told from none


@pytest.mark.parametrize("switches", [{}, EAGLE31])
def test_every_gradient_is_announced_once_and_complete(switches: dict[str, bool]) -> None:
    model, batch = make_model(**switches), batch_of(["three turns"], WINDOW)
    heard: dict[nn.Parameter, torch.Tensor] = {}

    def ready(parameters: list[nn.Parameter]) -> None:
        for value in parameters:
            assert value not in heard
            assert value.grad is not None
            heard[value] = value.grad.clone()

    fused(model)(batch, ready)
    assert heard.keys() == set(model.parameters())
    assert all(torch.equal(value.grad, seen) for value, seen in heard.items())  # type: ignore[arg-type]


def test_asking_for_what_can_not_run_is_refused() -> None:
    model = make_model()
    for changes, name in (
        ({"compute": "fused"}, "--compute fused"),
        ({"recompute_mlp": True}, "--recompute-mlp"),
        ({"attention": "flash"}, "--attention flash"),
    ):
        with pytest.raises(InputError, match=f"{name}.*its kernels need a GPU"):
            choose_pass(config(**changes), model, objective(), embeddings())
    assert choose_pass(config(), model, objective(), embeddings()) is None
    draft, frozen = Eagle3Draft(model.shape, model), FrozenWeights(embeddings(), torch.ones(1), torch.ones(1))
    assert isinstance(draft.gradient_pass(config(), objective(), frozen), PlainPass)


def test_flash_attention_is_refused_where_it_can_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    flash_attention._flash.cache_clear()
    assert "no FlashAttention 4" in (flash_attention.why_not_flash(128, torch.device("cpu")) or "")
    monkeypatch.setattr(flash_attention, "_flash", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    assert "checked for 64 and 128 only" in (flash_attention.why_not_flash(16, torch.device("cpu")) or "")
    assert "capability 8" in (flash_attention.why_not_flash(128, torch.device("cpu")) or "")


def test_what_flash_attention_does_not_do_well_goes_to_the_other_kernels() -> None:
    cpu, gap = torch.device("cpu"), np.array([0, 1, 2, 3, 5, 6, 7, 8, 9])
    assert find_runs(np.arange(5, 10), gap, 1, 7, cpu) is None
    assert find_runs(np.arange(5, 10), gap, 1, 2, cpu) is not None  # none of them sees 4
    assert find_runs(np.arange(5, 10), np.arange(10), 3, 3, cpu) is None
    every = np.arange(1000)
    assert find_runs(every[every % 50 < 25], every, 0, 150, cpu) is not None
    assert find_runs(every[every % 10 < 5], every, 0, 150, cpu) is None
    assert memory_estimate.MOST_COPIES == runs.MOST_COPIES
