"""Each loss of a row against its definition, outcome by outcome in float64 from the verifier's whole distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from draftcache.draft_train.loss.objective import draft_mass
from draftcache.draft_train.loss.row_losses import LK_DECAY, LOSSES
from draftcache.store.common.errors import InputError
from support.absent_entries import IDS, D
from support.draft_batches import batches
from support.draft_models import embeddings, make_model
from support.gradient_passes import loss_of, objective
from support.row_losses import acceptance, row_loss, text

ROWS, OUTSIDE = IDS.shape[0], 5
WHOLE = torch.arange(D).flip(0).repeat(ROWS, 1)
"""S = D, in an order of its own."""


@dataclass
class Row:
    """One row's teacher and draft over its outcomes: single entries, and what is left as one."""

    p: list[torch.Tensor]
    q: list[torch.Tensor]
    single: int
    """How many of them are single entries."""
    mass: torch.Tensor
    log_q: torch.Tensor
    """[D] of all of the draft vocabulary."""


def teacher_and_logits(scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The verifier's probabilities of D and OUTSIDE more ids, and draft logits over D; float64."""
    generator = torch.Generator().manual_seed(3)
    full = scale * torch.randn(ROWS, D + OUTSIDE, generator=generator, dtype=torch.float64)
    return full.softmax(-1), scale * torch.randn(ROWS, D, generator=generator, dtype=torch.float64)


def outcomes(full: torch.Tensor, logits: torch.Tensor, ids: list[int]) -> Row:
    mass, q = full[:D].sum(), logits.exp() / logits.exp().sum()
    over_draft = full[:D] / mass
    inside = [item for item in ids if item >= 0]
    rest = [item for item in range(D) if item not in inside]
    p, draft = [over_draft[item] for item in inside], [q[item] for item in inside]
    if rest:
        p.append(over_draft[rest].sum())
        draft.append(q[rest].sum())
    return Row(p, draft, len(inside), mass, q.log())


def naive(kind: str, row: Row, token: int) -> torch.Tensor:
    """The loss of a row whose text goes on with draft id `token`, -1 outside the draft vocabulary."""
    zero = torch.zeros((), dtype=torch.float64)
    alpha = sum((torch.minimum(row.mass * p, q) for p, q in zip(row.p, row.q, strict=True)), zero)
    cross_entropy = sum((-p * q.log() for p, q in zip(row.p, row.q, strict=True)), zero)
    if kind == "tail-kl":
        return cross_entropy
    if kind == "renormalized-kl":
        kept = sum(row.p[: row.single], zero)
        return sum((-p / kept * q.log() for p, q in zip(row.p[: row.single], row.q, strict=False)), zero)
    if kind == "tv":
        return 1 - alpha
    if kind == "lk-alpha":
        return -alpha.log()
    surprise = -row.log_q[token] if token >= 0 else zero
    if kind == "ce":
        return surprise
    if kind == "ce-l1":
        rest = row.mass * (1 - sum(row.p, zero))
        distance = sum(((row.mass * p - q).abs() for p, q in zip(row.p, row.q, strict=True)), 1 - row.mass + rest)
        return 0.1 * surprise + 0.9 * distance
    assert kind == "lk"
    kl = cross_entropy + sum((p * p.log() for p in row.p), zero)
    blend = float((-3 * alpha.detach()).exp())
    return blend * kl + (1 - blend) * (1 - alpha)


def stored(full: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """p of the ids, tau and p(D), as a store gives them."""
    mass = full[:, :D].sum(-1)
    p = (full[:, :D] / mass[:, None]).gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)
    return p, (1 - p.sum(-1)).clamp(min=0), mass


def value_and_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    losses = function(leaf)
    weights = torch.arange(1, len(losses) + 1, dtype=losses.dtype)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), leaf)
    return losses.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("ids", [IDS, IDS[:1].expand(ROWS, -1), WHOLE], ids=["absent", "all present", "whole"])
@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_is_its_definition(kind: str, ids: torch.Tensor, dtype: torch.dtype) -> None:
    full, logits = teacher_and_logits()
    p, tau, mass = (value.to(dtype) for value in stored(full, ids))
    expected = value_and_gradient(
        lambda leaf: torch.stack(
            [
                naive(kind, outcomes(full[row], leaf[row], ids[row].tolist()), int(text(ROWS, D)[row]))
                for row in range(ROWS)
            ]
        ),
        logits,
    )
    found = value_and_gradient(lambda leaf: row_loss(kind)(leaf, ids, p, tau, mass), logits.to(dtype))
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_teacher_over_the_whole_vocabulary_needs_no_ids(kind: str) -> None:
    full, logits = teacher_and_logits()
    p, tau, mass = stored(full, torch.arange(D).repeat(ROWS, 1))
    by_ids = value_and_gradient(lambda leaf: row_loss(kind)(leaf, WHOLE, p.flip(1), tau, mass), logits)
    exact = value_and_gradient(lambda leaf: row_loss(kind)(leaf, None, p, None, mass), logits)
    for mine, theirs in zip(exact, by_ids, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind != "lk"])
def test_gradients_are_those_of_the_values(kind: str) -> None:
    """By finite differences; `lk` holds its blend constant, so that its values have another slope."""
    full, logits = teacher_and_logits()
    p, tau, mass = stored(full, IDS)
    assert torch.autograd.gradcheck(lambda leaf: row_loss(kind)(leaf, IDS, p, tau, mass), (logits.requires_grad_(),))


def test_no_gradient_flows_through_the_blend() -> None:
    full, logits = teacher_and_logits()
    p, tau, mass = stored(full, IDS)
    leaf = logits.requires_grad_()
    mixed = row_loss("lk")(leaf, IDS, p, tau, mass)
    blend = torch.exp(-LK_DECAY * acceptance(leaf, IDS, p, tau, mass).detach())
    parts = [torch.autograd.grad(row_loss(kind)(leaf, IDS, p, tau, mass).sum(), leaf)[0] for kind in ("tail-kl", "tv")]
    expected = blend[:, None] * parts[0] + (1 - blend[:, None]) * parts[1]
    torch.testing.assert_close(torch.autograd.grad(mixed.sum(), leaf)[0], expected)
    free = torch.exp(-LK_DECAY * acceptance(leaf, IDS, p, tau, mass))  # negative control: with the blend's own gradient
    through = (free * row_loss("tail-kl")(leaf, IDS, p, tau, mass)).sum()
    assert not torch.allclose(torch.autograd.grad(through, leaf)[0], blend[:, None] * parts[0])


def test_a_tail_as_one_outcome_overstates_acceptance_by_no_more_than_it_holds() -> None:
    full, logits = teacher_and_logits()
    for ids in (IDS, WHOLE):
        p, tau, mass = stored(full, ids)
        q = torch.softmax(logits, -1)
        exact = torch.minimum(full[:, :D], q).sum(-1)
        found = acceptance(logits, ids, p, tau, mass)
        tail = 1 - (q.gather(1, ids.clamp(min=0)) * (ids >= 0)).sum(-1)
        assert (found >= exact - 1e-12).all()
        assert (found - exact <= torch.minimum(mass * tau, tail) + 1e-12).all()
        assert torch.allclose(found, exact) == (ids is WHOLE)


def test_an_empty_s_has_no_gradient() -> None:
    full, logits = teacher_and_logits()
    ids = torch.full_like(IDS, -1)
    p, tau, mass = stored(full, ids)
    for kind in (name for name, loss in LOSSES.items() if not loss.needs_text):
        losses, gradient = value_and_gradient(
            lambda leaf, kind=kind: row_loss(kind)(leaf, ids, p, tau, mass),  # type: ignore[misc]
            logits,
        )
        assert torch.isfinite(losses).all(), kind
        assert float(gradient.abs().max()) < 1e-12, kind


@pytest.mark.parametrize("kind", LOSSES)
def test_a_draft_that_is_far_off_stays_finite_in_float32(kind: str) -> None:
    """All of q on one entry that the teacher gives nothing: alpha underflows to 0."""
    logits = torch.full((1, D), -200.0)
    logits[0, 8] = 200.0
    p = torch.full((1, 4), 0.25)
    losses, gradient = value_and_gradient(
        lambda leaf: row_loss(kind)(leaf, torch.arange(4)[None], p, torch.zeros(1), torch.ones(1)), logits
    )
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", LOSSES)
def test_the_objective_dispatches_and_slices_change_nothing(kind: str) -> None:
    model, batch = make_model(), batches(next_tokens=True)[0]
    results = []
    for chunk in (4096, 3):
        result = loss_of(objective(loss=kind, loss_chunk=chunk), model, embeddings(), batch)
        results.append((result.loss, *torch.autograd.grad(result.loss, list(model.parameters()))))
    for whole, sliced in zip(*results, strict=True):
        torch.testing.assert_close(sliced, whole)
    if kind != "tail-kl":
        assert float(results[0][0].detach()) != float(loss_of(objective(), model, embeddings(), batch).loss.detach())


def test_acceptance_losses_know_the_mass_outside_the_draft_vocabulary() -> None:
    batch = batches()[0]
    places = torch.arange(batch.argmax.shape[0])
    mass = draft_mass(batch, places)
    assert float(mass.min()) < 0.9
    logits = torch.randn(len(places), 24, generator=torch.Generator().manual_seed(0))
    losses, _ = objective(loss="tv").row_losses(logits, batch, places)
    assert (losses >= 1 - mass - 1e-6).all()
    best = torch.full_like(logits, -torch.inf).scatter(1, batch.teacher_ids, batch.teacher_logits)
    assert float(objective(loss="tv").row_losses(best, batch, places)[0].sum()) < float(losses.sum())


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(InputError, match="--loss: expected one of"):
        objective(loss="kl")
    with pytest.raises(ValueError, match="expected one of"):
        row_loss("kl")
