"""Absent teacher entries against a loop, exact teachers, and training with each form and vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from draftcache.draft_train.checkpoint import load_state
from draftcache.draft_train.data.batches import Batch, build_batch
from draftcache.draft_train.data.teacher import TeacherView, exact_probabilities
from draftcache.draft_train.evaluate import evaluate
from draftcache.draft_train.export import export
from draftcache.draft_train.loss import objective
from draftcache.draft_train.loss.objective import ObjectiveResult, teacher_probabilities
from draftcache.draft_train.loss.row_losses import LOSSES
from draftcache.draft_train.loss.tail_bucket import fused_tail_bucket_loss, tail_bucket_loss
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import CheckpointError, InputError
from draftcache.store.reader import StoreReader
from support.absent_entries import IDS, D
from support.row_losses import row_loss
from support.synthetic import DRAFT_VOCAB, TOP_K, VOCAB
from support.teacher_stores import OTHER, SUBSET, maps, write_teacher_store
from support.training_runs import config

ROWS = IDS.shape[0]


def teacher_and_logits(scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """p, tau and draft logits, float64."""
    generator = torch.Generator().manual_seed(0)
    teacher, logits = (scale * torch.randn(ROWS, D, generator=generator, dtype=torch.float64) for _ in range(2))
    kept = teacher.gather(1, IDS.clamp(min=0)).masked_fill(IDS < 0, -torch.inf)
    p, tau = teacher_probabilities(kept, teacher.logsumexp(-1))
    return p, tau, logits


def by_loop(ids: torch.Tensor, p: torch.Tensor, tau: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The definition, outcome by outcome."""
    losses = []
    for row in range(ids.shape[0]):
        q = torch.softmax(logits[row], -1)
        inside = [int(item) for item in ids[row] if item >= 0]
        loss = torch.zeros((), dtype=logits.dtype)
        for entry, item in enumerate(ids[row].tolist()):
            if item >= 0:
                loss = loss - p[row, entry] * q[item].log()
        outside = [item for item in range(logits.shape[1]) if item not in inside]
        if outside:
            loss = loss - tau[row] * torch.stack([q[item] for item in outside]).sum().log()
        losses.append(loss)
    return torch.stack(losses)


@pytest.mark.parametrize("function", [tail_bucket_loss, fused_tail_bucket_loss])
def test_absent_entries_are_outside_s(function: Any) -> None:
    p, tau, logits = teacher_and_logits()
    named = {"absent": True} if function is fused_tail_bucket_loss else {}
    results = []
    for make in (lambda leaf: by_loop(IDS, p, tau, leaf), lambda leaf: function(leaf, IDS, p, tau, **named)):
        leaf = logits.clone().requires_grad_()
        losses = make(leaf)
        (losses * torch.arange(1, ROWS + 1)).sum().backward()
        assert leaf.grad is not None
        results.append((losses.detach(), leaf.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert float(tau[1]) == 1.0
    assert abs(float(results[1][0][1])) < 1e-12
    assert float(results[1][1][1].abs().max()) < 1e-12
    leaf = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: function(values, IDS, p, tau, **named), (leaf,))


def test_the_loop_tells_absent_from_present() -> None:
    """Negative control: id 0 in the place of what is absent is another loss."""
    p, tau, logits = teacher_and_logits()
    wrong = fused_tail_bucket_loss(logits, IDS.clamp(min=0), p, tau)
    assert float((wrong - by_loop(IDS, p, tau, logits)).abs().max()) > 0.1


@pytest.mark.parametrize("function", [tail_bucket_loss, fused_tail_bucket_loss])
def test_no_tail_where_every_entry_of_the_vocabulary_is_present(function: Any) -> None:
    """Rounding of the gaps leaves a tau there; nothing is left that could take it, and log(0) would be its price."""
    named = {"absent": True} if function is fused_tail_bucket_loss else {}
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ids = torch.tensor([[2, -1, 0, 1], [1, -1, 0, -1]])
    p = torch.tensor([[0.5, 0.0, 0.3, 0.199], [0.5, 0.0, 0.3, 0.0]])
    tau = 1 - p.sum(-1)
    losses = function(logits, ids, p, tau, **named)
    torch.testing.assert_close(losses, by_loop(ids, p, tau, logits))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    (expected,) = torch.autograd.grad(by_loop(ids, p, tau, logits).sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_fused_and_plain_agree_in_float32_with_many_rows() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher, logits = (4 * torch.randn(300, 64, generator=generator) for _ in range(2))
    values, ids = teacher.topk(16)
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, -1)
    p, tau = teacher_probabilities(values.masked_fill(ids < 0, -torch.inf), teacher.logsumexp(-1))
    results = []
    for function in (tail_bucket_loss, lambda *values: fused_tail_bucket_loss(*values, absent=True)):
        leaf = logits.clone().requires_grad_()
        losses = function(leaf, ids, p, tau)
        losses.sum().backward()
        assert leaf.grad is not None
        results.append((losses.detach(), leaf.grad))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=2e-5, atol=2e-5)


def exact_loss(logits: torch.Tensor, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    return row_loss("tail-kl")(logits, None, exact_probabilities(hidden, head), None, None)


def test_exact_loss_is_the_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(5, 8, generator=generator), torch.randn(D, 8, generator=generator)
    logits = torch.randn(5, D, generator=generator, dtype=torch.float64).requires_grad_()
    p = torch.softmax(hidden @ head.T, -1).double()
    expected = -(p * torch.log_softmax(logits, -1)).sum(-1)
    torch.testing.assert_close(exact_loss(logits, hidden, head), expected)
    every = torch.arange(D).expand(5, D)
    as_top_k = fused_tail_bucket_loss(logits, every, p, torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(as_top_k, expected)
    assert torch.autograd.gradcheck(lambda values: exact_loss(values, hidden, head), (logits,))


def batch_of(store: StoreReader, size: int = 0) -> Batch:
    vocab = store.manifest.teacher_form.choose(size)
    items = [store.read(number, decode=False) for number in range(2)]
    view = TeacherView.of(store, vocab)
    return build_batch(items, store.codec, max_steps=3, window=16, teacher=view, next_tokens=True)


def loss_and_gradients(tmp_path: Path, name: str, **changes: Any) -> tuple[ObjectiveResult, list[torch.Tensor]]:
    """Of the untrained draft on the first conversations of store `name`."""
    trainer = Trainer(config(tmp_path, store=tmp_path / name, **changes))
    batch = batch_of(trainer.store, changes.get("draft_vocab_size", 0))
    draft = trainer.draft
    outputs = draft.step_outputs(trainer.frozen, batch, 3)
    result = trainer.learner.objective(outputs, lambda output: draft.logits(output, batch), batch)
    return result, list(torch.autograd.grad(result.loss, list(trainer.model.parameters())))


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    """Small and whole top-k in either vocabulary, and states."""
    write_teacher_store(tmp_path / "draft", "draft")
    write_teacher_store(tmp_path / "draft-whole", "draft", top_k=DRAFT_VOCAB)
    write_teacher_store(tmp_path / "full", "full")
    write_teacher_store(tmp_path / "full-whole", "full", top_k=40)
    write_teacher_store(tmp_path / "hidden", "hidden")
    return tmp_path


@pytest.mark.parametrize("size", [DRAFT_VOCAB, SUBSET, OTHER])
def test_whole_top_k_equals_the_exact_teacher(stores: Path, size: int) -> None:
    """Gaps are float16: that is the tolerance. A small top-k is another loss, in each vocabulary."""
    exact, expected = loss_and_gradients(stores, "hidden", draft_vocab_size=size)
    assert exact.tail_mass == 0
    names = ["full-whole"] if size == OTHER else ["full-whole", "draft-whole"]
    for name in names:
        result, gradients = loss_and_gradients(stores, name, draft_vocab_size=size)
        torch.testing.assert_close(result.loss, exact.loss, rtol=1e-3, atol=0)
        for mine, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-3 * float(theirs.abs().max()) + 1e-6)
        assert result.tail_mass < 1e-3 * result.tail_positions
    for name in ["full"] if size == OTHER else ["full", "draft"]:
        result, gradients = loss_and_gradients(stores, name, draft_vocab_size=size)
        assert result.tail_mass > 0.05 * result.tail_positions
        assert abs(float((result.loss - exact.loss).detach())) > 1e-2 * float(exact.loss.detach())


@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind != "ce"])
def test_every_loss_reads_the_exact_teacher(stores: Path, kind: str) -> None:
    exact, expected = loss_and_gradients(stores, "hidden", loss=kind)
    result, gradients = loss_and_gradients(stores, "draft-whole", loss=kind)
    torch.testing.assert_close(result.loss, exact.loss, rtol=2e-3, atol=0)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-2 * float(theirs.abs().max()) + 1e-6)
    _, of_part = loss_and_gradients(stores, "draft", loss=kind)  # a small top-k is another loss
    assert any(
        (mine - theirs).abs().max() > 5e-2 * theirs.abs().max() for mine, theirs in zip(of_part, expected, strict=True)
    )


def test_the_l1_distance_of_blocks_is_exact_with_states_and_near_by_the_tail(tmp_path: Path) -> None:
    """alpha counts the tail as one outcome, so that the loss of a small top-k is a little too low, and no more."""
    for name, top_k in (("hidden", 0), ("whole", DRAFT_VOCAB), ("some", TOP_K)):
        kind = "hidden" if name == "hidden" else "draft"
        write_teacher_store(tmp_path / name, kind, top_k=top_k, tokens=VOCAB - 1)
    block = {"draft": "dspark", "ttt_steps": 0, "block_size": 3, "num_hidden_layers": 1, "markov_rank": 2}
    exact, expected = loss_and_gradients(tmp_path, "hidden", **block)
    whole, gradients = loss_and_gradients(tmp_path, "whole", **block)
    torch.testing.assert_close(whole.loss, exact.loss, rtol=1e-3, atol=0)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-2 * float(theirs.abs().max()) + 1e-6)
    some, _ = loss_and_gradients(tmp_path, "some", **block)
    most = 1.8 * float(some.tail_mass / some.tail_positions) * sum(0.7788**step for step in range(3))
    assert 1e-3 < float((exact.loss - some.loss).detach()) < most


@pytest.mark.parametrize("name", ["draft", "full", "hidden"])
def test_slices_change_neither_loss_nor_gradients(stores: Path, name: str) -> None:
    whole, sliced = (loss_and_gradients(stores, name, draft_vocab_size=SUBSET, loss_chunk=chunk) for chunk in (4096, 3))
    torch.testing.assert_close(sliced[0].loss, whole[0].loss)
    for mine, theirs in zip(sliced[1], whole[1], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_more_than_a_slice_of_verifier_logits_is_alive(stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = objective.exact_probabilities

    def watched(hidden: torch.Tensor, *head: Any) -> torch.Tensor:
        seen.append(hidden.shape[0])
        return original(hidden, *head)

    monkeypatch.setattr(objective, "exact_probabilities", watched)
    loss_and_gradients(stores, "hidden", loss_chunk=5)
    assert max(seen) == 5


def test_views_by_hand(stores: Path) -> None:
    """Ids and tails of each view against sets and sums."""
    for name, sizes in {"draft": (SUBSET,), "full": (DRAFT_VOCAB, SUBSET, OTHER)}.items():
        store = StoreReader(stores / name)
        stored, item = batch_of(store), store.read(0)
        kept = item.arrays["teacher_ids"].astype(np.int64)
        verifier_ids = kept if name == "full" else maps()[0].target_ids[kept]
        for size in sizes:
            chosen = next(item for item in maps() if len(item) == size)
            batch, count = batch_of(store, size), len(kept)
            expected = np.where(chosen.t2d[verifier_ids], np.searchsorted(chosen.target_ids, verifier_ids), -1)
            assert torch.equal(batch.teacher_ids[:count], torch.from_numpy(expected))
            assert batch.absent_entries
            p, tau = teacher_probabilities(batch.teacher_logits, batch.log_z_draft)
            assert torch.equal(p == 0, batch.teacher_ids < 0)
            torch.testing.assert_close(tau, 1 - p.sum(-1))
            assert torch.equal(batch.log_z_draft[:count], torch.from_numpy(item.arrays[log_z_name(size)]))
        if name == "draft":
            assert not stored.absent_entries


def log_z_name(size: int) -> str:
    return "log_z_draft" if size == DRAFT_VOCAB else f"log_z_draft_{size}"


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("kind", "size"), [("draft", 0), ("draft", SUBSET), ("full", 0), ("full", OTHER), ("hidden", 0), ("hidden", OTHER)]
)
def test_training_evaluation_and_export_with_each(tmp_path: Path, kind: str, size: int, bf16: bool) -> None:
    write_teacher_store(tmp_path / "store", kind, bf16=bf16, per_shard=6)
    settings = config(tmp_path, draft_vocab_size=size, epochs=2, loss_chunk=16)
    last = Trainer(settings).run()
    chosen = next(item for item in maps() if len(item) == (size or DRAFT_VOCAB))
    state = load_state(last)
    assert state.draft_vocab_hash == chosen.hash
    assert state.shape.draft_vocab_size == len(chosen)
    result = evaluate(store=tmp_path / "store", checkpoint=settings.output, splits=["val"], draft_tokens=3)
    assert result["splits"]["val"]["draft"]["acceptance_length"] >= 1
    tensors = load_file(export(settings.output, tmp_path / "export", engine="vllm") / "model.safetensors")
    assert np.array_equal(tensors["d2t"].numpy(), chosen.d2t)
    assert np.array_equal(tensors["t2d"].numpy(), chosen.t2d)
    assert tensors["lm_head.weight"].shape[0] == len(chosen)


def test_draft_starts_from_the_chosen_rows(stores: Path) -> None:
    trainer = Trainer(config(stores, store=stores / "hidden", draft_vocab_size=OTHER))
    rows = load_file(trainer.store.files.frozen)[f"lm_head_{OTHER}"]
    assert torch.equal(trainer.model.lm_head.weight, rows)


def test_vocabularies_that_cannot_be_trained_are_refused(stores: Path) -> None:
    with pytest.raises(InputError, match=r"sizes \[24, 10, 30\], found 12"):
        Trainer(config(stores, store=stores / "full", draft_vocab_size=12))
    with pytest.raises(InputError, match=r"subset of the main draft vocabulary of 24.*found 12 ids outside.*hidden"):
        Trainer(config(stores, store=stores / "draft", draft_vocab_size=OTHER))
    Trainer(config(stores, store=stores / "draft", draft_vocab_size=SUBSET))


def test_another_vocabulary_is_refused_by_resume_and_warm_start(stores: Path) -> None:
    first = config(stores, store=stores / "full", epochs=1)
    Trainer(first).run()
    Trainer(config(stores, store=stores / "full", epochs=1, draft_vocab_size=DRAFT_VOCAB)).run()  # 0 in other words
    for changes in ({}, {"output": stores / "second", "init_from": first.output}):
        with pytest.raises(CheckpointError, match="draft_vocab_size is 24, here it is 10"):
            Trainer(config(stores, store=stores / "full", epochs=1, draft_vocab_size=SUBSET, **changes)).run()


def test_a_checkpoint_of_a_vocabulary_that_is_not_declared_is_refused(stores: Path, tmp_path: Path) -> None:
    from support.synthetic import write_store

    Trainer(config(stores, store=stores / "full", epochs=1, draft_vocab_size=OTHER)).run()
    write_store(tmp_path / "main-only")
    with pytest.raises(CheckpointError, match="draft vocabulary"):
        evaluate(store=tmp_path / "main-only", checkpoint=stores / "run", splits=["val"])
    assert TOP_K < DRAFT_VOCAB
