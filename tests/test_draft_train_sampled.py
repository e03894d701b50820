"""Bounds of acceptance under speculative sampling, against full logits and against sampling itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from draftcache.draft_train import overlap
from draftcache.draft_train.acceptance import walk_chain
from draftcache.draft_train.data.batches import build_batch
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.data.teacher import TeacherView
from draftcache.draft_train.drafts.eagle3.architecture import ARCHITECTURE
from draftcache.draft_train.drafts.sizes import VerifierShape
from draftcache.draft_train.evaluate import evaluate
from draftcache.draft_train.overlap import TeacherRows, overlap_bounds
from draftcache.draft_train.sampled import SampledCounts, draft_overlaps, expected_steps, require_temperature
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import InputError
from draftcache.store.format.bf16 import bf16_to_float32, float32_to_bf16
from draftcache.store.reader import StoreReader
from support.synthetic import HIDDEN
from support.teacher_stores import head, write_teacher_store
from support.training_runs import config

CPU = torch.device("cpu")
TEMPERATURES = (0.2, 0.7, 1.0, 1.6, 5.0)
VOCAB, DRAFT, KEPT, ROWS = 60, 40, 5, 400


def softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.softmax(logits.double() / temperature, dim=-1)


def random_rows() -> Iterator[tuple[torch.Tensor, torch.Tensor, TeacherRows]]:
    """Yield draft logits [ROWS, DRAFT], full logits [ROWS, VOCAB] and what a store keeps of them, flat to sharp."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.3, 2.0, 6.0):
        full = scale * torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)
        near = full[:, :DRAFT] + torch.randn(ROWS, DRAFT, generator=generator, dtype=torch.float64)
        best = full[:, :DRAFT].topk(KEPT)
        gaps = (best.values[:, :1] - best.values).half().double()
        log_z = torch.logsumexp(full, -1)
        kept = TeacherRows(
            ids=best.indices,
            log_p=best.values[:, :1] - gaps - log_z[:, None],
            log_mass=torch.logsumexp(full[:, :DRAFT], -1) - log_z,
            argmax_inside=full.argmax(-1) < DRAFT,
            vocab_size=VOCAB,
        )
        yield near.float(), full, kept


def exact(draft: torch.Tensor, full: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.minimum(softmax(full, temperature)[:, :DRAFT], softmax(draft, temperature)).sum(-1)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_bounds_hold_for_full_logits(temperature: float) -> None:
    widths = []
    for draft, full, kept in random_rows():
        low, high = overlap_bounds(draft, kept, temperature)
        alpha = exact(draft, full, temperature)
        assert bool((low <= alpha).all())
        assert bool((alpha <= high).all())
        widths.append(float((high - low).mean()))
    assert widths[0] > 0.1
    if temperature in (0.7, 1.0):  # sharp teachers have little in the tail, so that the bounds say much
        assert widths[2] < 0.06


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_bounds_without_the_tail_fail(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: as if the stored entries were all that the verifier may say, renormalised or not."""
    monkeypatch.setattr(overlap, "_groups", lambda *_: ((0.0 * kept.log_mass,) * 2,) * 2)
    wrong = 0
    for draft, full, kept in random_rows():
        low, high = overlap_bounds(draft, kept, temperature)
        alpha = exact(draft, full, temperature)
        wrong += int(((alpha < low) | (alpha > high)).sum())
    assert wrong > ROWS / 2


@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.6, 5.0])
def test_the_sums_of_powers_lie_in_their_bounds_and_not_in_exchanged_ones(temperature: float) -> None:
    """The negative control is the bound for the other side of T = 1."""
    power, wrong = 1 / temperature, 0
    generator = np.random.default_rng(0)
    for _ in range(200):
        p = generator.dirichlet(np.full(30, generator.choice([0.05, 0.5, 5.0]))) * generator.uniform(0.01, 1)
        mass, cap = torch.tensor([p.sum()]), torch.tensor([p.max()])
        low, high = overlap._power_bounds(mass, mass, cap, torch.tensor([30]), power)
        total = (p**power).sum()
        assert float(low) * (1 - 1e-9) <= total <= float(high) * (1 + 1e-9)
        wrong += not float(high) <= total <= float(low)
    assert wrong > 190


@pytest.mark.parametrize("kind", ["draft", "full", "hidden"])
@pytest.mark.parametrize("size", [0, 10])
def test_the_bounds_hold_for_stores_of_every_form(tmp_path: Path, kind: str, size: int) -> None:
    """Alphas of a draft, from a store and from the states that its teacher was made of."""
    write_teacher_store(tmp_path / "store", kind, bf16=True, mode="bf16")
    store = StoreReader(tmp_path / "store")
    vocab = store.manifest.teacher_form.choose(size)
    frozen = FrozenWeights.load(store, CPU, vocab)
    draft = ARCHITECTURE.build(ARCHITECTURE.shape_for(config(tmp_path), VerifierShape.of(store, size)), CPU)
    draft.initialize(0, frozen, "verifier")
    item = store.read(0, decode=False)
    view = TeacherView.of(store, vocab)
    batch = build_batch([item], store.codec, max_steps=3, window=16, teacher=view)
    states = np.random.default_rng([5, item.split, item.dataset_index]).normal(
        size=(item.arrays["teacher_positions"].size, HIDDEN)
    )
    logits = torch.from_numpy(bf16_to_float32(float32_to_bf16(states.astype(np.float32))).astype(np.float64) @ head().T)
    for temperature in TEMPERATURES:
        overlaps = draft_overlaps(draft, frozen, store, draft_tokens=3, temperature=temperature, compute="plain")
        bounds = overlaps(batch)
        seen, widest = 0, 0.0
        for number, rows, proposed in draft.step_logits(frozen, batch, 3):
            p = softmax(logits[batch.teacher_index[rows, number]], temperature)[:, store.vocab_map(size).target_ids]
            alpha = torch.minimum(p, softmax(proposed.detach(), temperature)).sum(-1)
            low, high = bounds[rows, number].unbind(-1)
            assert bool((low <= alpha + 1e-12).all())
            assert bool((alpha <= high + 1e-12).all())
            seen += len(alpha)
            widest = max(widest, float((high - low).max()))
        assert seen > 40
        if kind == "hidden" and size == 0 and temperature == 1.0:
            assert widest < 2e-4  # a state leaves nothing out
        if kind != "hidden":
            assert widest > 0.02


def test_expected_steps_of_certain_acceptances_are_the_walked_ones() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = int(rng.integers(1, 40))
        hits = rng.random((rows, 4)) < 0.7
        left = np.arange(rows, 0, -1)
        bounds = np.repeat(hits[..., None], 2, axis=2).astype(float)
        visited, _, _ = walk_chain(left, hits)
        assert expected_steps(bounds, most=True) == expected_steps(bounds, most=False) == len(visited)


def test_expected_steps_are_the_mean_of_drawn_ones_and_lie_between_the_bounds() -> None:
    rng = np.random.default_rng(1)
    alpha = rng.random((30, 3))
    left = np.arange(30, 0, -1)
    drawn = [len(walk_chain(left, rng.random((30, 3)) < alpha)[0]) for _ in range(4000)]
    exactly = expected_steps(np.stack((alpha, alpha), axis=-1), most=True)
    assert abs(np.mean(drawn) - exactly) < 4 * np.std(drawn) / np.sqrt(4000)
    bounds = np.stack((alpha - 0.05 * rng.random((30, 3)), alpha + 0.05 * rng.random((30, 3))), axis=-1).clip(0, 1)
    assert expected_steps(bounds, most=False) < exactly < expected_steps(bounds, most=True)
    for _ in range(200):  # whichever alphas within the bounds are the true ones
        some = rng.uniform(bounds[..., 0], bounds[..., 1])
        steps = expected_steps(np.stack((some, some), axis=-1), most=True)
        assert expected_steps(bounds, most=False) <= steps <= expected_steps(bounds, most=True)


def test_turns_and_conversations_are_kept_apart() -> None:
    counts = SampledCounts(2, 1.0, 2)
    bounds = np.full((5, 2, 2), 1.0)
    counts.add(np.array([2, 1, 3, 2, 1]), bounds, np.array([0, 0, 1, 1, 1]))
    assert counts.by_conversation.tolist() == [[2, 1, 1], [3, 1, 1]]
    assert counts.overlap[:, 0].tolist() == [5, 3]
    assert counts.to_json()["acceptance_length"] == [2.5, 2.5]


def test_an_evaluation_reports_the_interval(tmp_path: Path) -> None:
    write_teacher_store(tmp_path / "store", "full", per_shard=6)
    Trainer(config(tmp_path, epochs=1)).run()
    asked = {"store": tmp_path / "store", "checkpoint": tmp_path / "run", "splits": ["val"], "draft_tokens": 3}
    found = evaluate(**asked, device="cpu", temperature=0.8, resamples=100)["splits"]["val"]  # type: ignore[arg-type]
    sampled = found["draft"]["sampled"]
    low, high = sampled["acceptance_length"]
    assert 1.0 <= low < high < 4.0
    assert sampled["interval"][0] < low < high < sampled["interval"][1]
    assert [0 <= a < b <= 1 for a, b in sampled["overlap"]] == [True] * 3
    assert sampled["tokens"] == found["draft"]["tokens"]
    greedy = evaluate(**asked, device="cpu", resamples=100)["splits"]["val"]["draft"]  # type: ignore[arg-type]
    assert "sampled" not in greedy
    assert found["draft"] | {"sampled": None} == greedy | {"sampled": None}


@pytest.mark.parametrize("temperature", [0.0, -1.0, 0.01, 50.0, float("nan")])
def test_temperatures_that_mean_nothing_are_refused(temperature: float) -> None:
    with pytest.raises(InputError, match=r"--temperature: expected 0\.05 to 20"):
        require_temperature(temperature)
