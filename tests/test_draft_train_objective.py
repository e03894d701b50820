"""The tail-bucket loss against its definition, its gradient bound, and its averaging."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from draftcache.draft_train.loss.objective import ObjectiveResult, row_weights, teacher_probabilities
from draftcache.draft_train.loss.tail_bucket import fused_tail_bucket_loss, tail_bucket_loss
from support.draft_batches import batches
from support.draft_models import embeddings, make_model
from support.gradient_passes import loss_of, objective
from support.synthetic import DRAFT_VOCAB, VOCAB, vocab_map

V, K, ROWS = 50, 8, 12


def teacher_and_logits(scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    make = lambda: scale * torch.randn(ROWS, V, generator=generator, dtype=torch.float64)  # noqa: E731
    return make(), make().requires_grad_()


def stored(teacher: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values, ids = teacher.topk(k)
    p, tau = teacher_probabilities(values, teacher.logsumexp(-1))
    return ids, p, tau


def test_equals_cross_entropy_over_head_and_tail_bucket() -> None:
    teacher, logits = teacher_and_logits()
    ids, p, tau = stored(teacher, K)
    q = torch.softmax(logits, -1).gather(1, ids)
    expected = -(p * q.log()).sum(-1) - tau * (1 - q.sum(-1)).log()
    found = tail_bucket_loss(logits, ids, p, tau)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    mine = torch.autograd.grad(found.sum(), logits)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(expected.sum(), logits)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("k", [1, K, V])
def test_fused_loss_equals_its_plain_twin(dtype: torch.dtype, tolerance: float, scale: float, k: int) -> None:
    teacher, logits = (value.detach().to(dtype) for value in teacher_and_logits(scale))
    ids, p, tau = stored(teacher, k)
    results = []
    for function in (tail_bucket_loss, fused_tail_bucket_loss):
        leaf = logits.clone().requires_grad_()
        losses = function(leaf, ids, p, tau)
        (losses * torch.arange(1, ROWS + 1)).sum().backward()
        assert leaf.grad is not None
        results.append((losses.detach(), leaf.grad))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)


def test_whole_vocabulary_is_the_full_cross_entropy() -> None:
    teacher, logits = teacher_and_logits()
    ids, p, tau = stored(teacher, V)
    found = tail_bucket_loss(logits, ids, p, tau)
    expected = -(torch.softmax(teacher, -1) * torch.log_softmax(logits, -1)).sum(-1)
    torch.testing.assert_close(found, expected)
    assert torch.isfinite(torch.autograd.grad(found.sum(), logits)[0]).all()


def test_gradient_error_is_within_twice_the_tail_and_renormalising_is_not_better() -> None:
    teacher, logits = teacher_and_logits(2.0)
    ids, p, tau = stored(teacher, K)
    full = torch.softmax(logits, -1) - torch.softmax(teacher, -1)
    ours = torch.autograd.grad(tail_bucket_loss(logits, ids, p, tau).sum(), logits)[0]
    assert ((ours - full).abs().sum(-1) <= 2 * tau + 1e-9).all()
    assert float(tau.min()) > 0.01
    renormalised = torch.zeros_like(teacher).scatter(1, ids, p / p.sum(-1, keepdim=True))
    biased = torch.softmax(logits, -1) - renormalised
    torch.testing.assert_close((biased - full).abs().sum(-1), 2 * tau)
    assert (ours - full).abs().sum() < (biased - full).abs().sum()


def test_confident_tail_stays_finite_in_float32() -> None:
    """log(1 - sum q) would be log(0) here; the log-sum-exp of the rest is not."""
    for low, function in ((-60.0, tail_bucket_loss), (-60.0, fused_tail_bucket_loss), (-900.0, fused_tail_bucket_loss)):
        logits = torch.full((1, V), low)
        logits[0, :K] = 10.0
        logits.requires_grad_()
        loss = function(logits, torch.arange(K)[None], torch.full((1, K), 0.9 / K), torch.tensor([0.1]))
        assert torch.isfinite(loss).all()
        assert torch.isfinite(torch.autograd.grad(loss.sum(), logits)[0]).all()


def test_loss_averages_rows_then_conversations_in_any_packing() -> None:
    model, together, apart = make_model(), *batches()
    packed = loss_of(objective(), model, embeddings(), together).loss
    separate = torch.stack([loss_of(objective(), model, embeddings(), batch).loss for batch in apart])
    torch.testing.assert_close(packed, separate.mean())


def test_loss_of_one_conversation_by_hand() -> None:
    from draftcache.draft_train.drafts.eagle3.unroll import unroll

    model, (batch, _) = make_model(), batches()[1]
    expected = 0.0
    for step in unroll(model, embeddings(), batch, 4):
        rows = []
        for row, hidden in zip(step.rows.tolist(), step.hidden, strict=True):
            place = int(batch.teacher_index[row, step.number])
            p, tau = teacher_probabilities(batch.teacher_logits[place][None], batch.log_z_draft[place][None])
            loss = tail_bucket_loss(model.logits(hidden[None]), batch.teacher_ids[place][None], p, tau)
            in_draft = torch.exp(batch.log_z_draft[place] - batch.log_z_full[place])
            rows.append(float(loss.detach()) * float(in_draft))
        expected += 0.8**step.number * sum(rows) / len(rows)
    assert float(loss_of(objective(), model, embeddings(), batch).loss.detach()) == pytest.approx(expected, rel=1e-6)


def test_slices_of_the_head_change_no_value_and_no_gradient() -> None:
    model, batch = make_model(), batches()[0]
    results = []
    for chunk in (4096, 3):
        result = loss_of(objective(loss_chunk=chunk), model, embeddings(), batch)
        results.append((result.loss, *torch.autograd.grad(result.loss, list(model.parameters()))))
    for whole, sliced in zip(*results, strict=True):
        torch.testing.assert_close(sliced, whole)


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    """With the share of the whole step; with their own shares the loss would count twice."""
    model, together, apart = make_model(), *batches()
    whole = loss_of(objective(), model, embeddings(), together)
    added = ObjectiveResult.zeros(4, torch.device("cpu"))
    for part in apart:
        added = added + loss_of(objective(), model, embeddings(), replace(part, loss_share=together.loss_share))
    torch.testing.assert_close(added.packed(), whole.packed())
    twice = sum(float(loss_of(objective(), model, embeddings(), part).loss.detach()) for part in apart)
    assert twice == pytest.approx(2 * float(added.loss))
    assert float(whole.tail_positions) == together.argmax.shape[0]


def test_row_weights_of_rows_outside_the_draft_vocabulary() -> None:
    batch = batches()[0]
    places = torch.arange(batch.argmax.shape[0])
    inside = torch.from_numpy(vocab_map().t2d)
    outside_rows = ~inside[batch.argmax]
    assert outside_rows.any()
    assert (~outside_rows).any()
    weight = row_weights("weight", batch, places, inside)
    torch.testing.assert_close(weight, torch.exp(batch.log_z_draft - batch.log_z_full))
    assert torch.equal(row_weights("drop", batch, places, inside), (~outside_rows).float())
    assert torch.equal(row_weights("keep", batch, places, inside), torch.ones(len(places)))
    losses = {
        mode: float(loss_of(objective(out_of_vocab=mode), make_model(), embeddings(), batch).loss.detach())
        for mode in ("weight", "drop", "keep")
    }
    assert len(set(losses.values())) == 3


def test_argmax_outside_the_draft_vocabulary_is_a_miss() -> None:
    model, batch = make_model(), batches()[1][0]
    result = loss_of(objective(), model, embeddings(), batch)
    never = torch.tensor([index for index in range(VOCAB) if not vocab_map().t2d[index]][:1])
    none = loss_of(objective(), model, embeddings(), replace(batch, argmax=never.expand_as(batch.argmax)))
    assert none.hits.sum() == 0 < result.hits.sum()
    assert torch.equal(none.rows, result.rows)
    assert DRAFT_VOCAB < VOCAB
