"""Logits that a verifier scales or caps: the form is found, proved in nats, and used wherever logits are made again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from draftcache.capture.job.worker_job import CaptureJob
from draftcache.capture.verifier.head import candidate_forms, float32_head, head_logits
from draftcache.capture.verifier.load import Verifier, find_modules, load_verifier
from draftcache.capture.verifier.self_check import TOKENS, self_check
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.data.teacher import exact_probabilities
from draftcache.draft_train.side_by_side import read_ahead
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import InputError, StoreError
from draftcache.store.common.products import scale_and_cap
from draftcache.store.format.head_form import IDENTITY, HeadForm
from draftcache.store.reader import StoreReader
from draftcache.tools.reports.shown_teacher import shown_teacher
from support.capture_jobs import config, small_dataset
from support.scaled_models import make_scaled, save_scaled
from support.tiny_models import VOCAB
from support.training_runs import config as training

CPU = torch.device("cpu")
IDS = torch.randint(3, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1))
DTYPES = (torch.float32, torch.bfloat16)
FORMS = {
    "llama": IDENTITY,
    "gemma2": HeadForm(cap=8.0),
    "nanochat": HeadForm(cap=8.0),
    "cohere": HeadForm(scale=0.0625),
    "granite": HeadForm(scale=1 / 7),
    "minicpm3": HeadForm(scale=10 / 32),
    "falcon_h1": HeadForm(scale=0.04),
}


def load(path: Path, dtype: torch.dtype) -> Verifier:
    return load_verifier(path, device=CPU, dtype=dtype, trust_remote_code=False)


def plain_logits(verifier: Verifier, token_ids: torch.Tensor) -> torch.Tensor:
    """[L, V] float32 of the model's own code without anything of ours."""
    with torch.inference_mode():
        return verifier.model(input_ids=token_ids[None], use_cache=False).logits[0].float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMS)
def test_the_form_is_found_and_gives_the_models_logits(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    verifier = load(save_scaled(tmp_path, kind), dtype)
    assert verifier.head_form.to_json() == pytest.approx(FORMS[kind].to_json())
    found = self_check(verifier, (1,), IDS)
    rounds_before_the_head = kind == "minicpm3" and dtype == torch.bfloat16
    assert max(found[name] for name in ("logits", "log_z", "argmax")) < (0.1 if rounds_before_the_head else 1e-4)
    final, logits = verifier.forward(IDS, (1,)).final, plain_logits(verifier, IDS)
    ours = head_logits(final, verifier.head, verifier.head_form)
    largest = float(logits.abs().max())
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-4 if dtype == torch.float32 else largest / 64)
    if kind != "llama":  # negative control: the head's output alone is far off
        assert float((head_logits(final, verifier.head) - logits).abs().max()) > 10 * largest / 64


def relative_norm(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """What earlier versions bounded by 0.02 in bfloat16."""
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cap_that_few_logits_reach_is_seen_in_nats_and_not_in_a_norm(dtype: torch.dtype) -> None:
    """A norm over the vocabulary, the check of earlier versions, lets pass what moves log Z by nats."""
    model = make_scaled("gemma2", final_logit_softcapping=15.0)
    with torch.inference_mode():
        states = find_modules(model, CPU).forward(IDS, (1,)).final
    rows = 0.12 * model.lm_head.weight.detach()
    rows[5] = 40 * states[7] / states[7].square().sum()  # one word that stands out in row 7 and those like it
    model.lm_head.weight = torch.nn.Parameter(rows, requires_grad=False)  # no longer the embeddings'
    verifier = replace(find_modules(model.to(dtype), CPU), head_form=HeadForm(cap=15.0))
    self_check(verifier, (1,), IDS)
    logits = plain_logits(verifier, IDS)
    uncapped = head_logits(verifier.forward(IDS, (1,)).final, verifier.head)
    off = (uncapped.logsumexp(-1) - logits.logsumexp(-1)).abs()
    assert float(off.max()) > 10
    assert relative_norm(uncapped, logits) < 2e-2
    for wrong in (IDENTITY, HeadForm(cap=16.0), HeadForm(scale=0.99, cap=15.0)):
        with pytest.raises(InputError, match=r"differences of .*log_z.* nats; .* nearest is scale 1, cap 15 with"):
            self_check(replace(verifier, head_form=wrong), (1,), IDS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_no_number_of_the_configuration_explains_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    verifier = load(save_scaled(tmp_path, "granite"), dtype)
    verifier.model.config.logits_scaling = 7.7  # what the model computes from now on, and what was found before
    with pytest.raises(InputError, match=r"by scale 0\.142857, no cap, found .* nearest is scale 0\.12987"):
        self_check(verifier, (1,), IDS)
    original = verifier.model.forward

    def other(*arguments: Any, **named: Any) -> Any:
        output = original(*arguments, **named)
        output.logits = output.logits + 0.5 * output.logits.sign()
        return output

    verifier.model.forward = other
    found = replace(verifier, head_form=HeadForm(scale=1 / 7.7))
    with pytest.raises(InputError, match=r"this model's logits are not supported"):
        self_check(found, (1,), IDS)


def test_a_head_that_is_no_product_is_refused() -> None:
    model = make_scaled("llama")

    class Scaled(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs) * torch.linspace(0.9, 1.1, VOCAB)

    model.lm_head.__class__ = Scaled
    with pytest.raises(InputError, match=r"found differences of \{'head'"):
        self_check(find_modules(model, CPU), (1,), IDS)


def test_a_model_that_goes_round_its_heads_module_is_compared_as_it_rounds(tmp_path: Path) -> None:
    model = make_scaled("gemma2").to(torch.bfloat16)
    inner, head = model.lm_head.forward, model.lm_head

    class Other(torch.nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return inner(states)  # type: ignore[no-any-return]

    verifier = replace(find_modules(model, CPU), head_form=HeadForm(cap=8.0))
    model.lm_head = Other()
    assert verifier.head is head
    found = self_check(verifier, (1,), IDS)
    assert "head" not in found
    assert 1e-3 < found["logits"] < 0.1
    with pytest.raises(InputError, match=r"limit 0\.\d+\)"):
        self_check(replace(verifier, head_form=HeadForm(cap=9.0)), (1,), IDS)


def test_candidates_are_the_configurations_numbers_each_way() -> None:
    made = make_scaled("minicpm3").config
    assert [form.scale for form in candidate_forms(made)] == pytest.approx([1.0, 10 / 32, 3.2])
    gemma = candidate_forms(make_scaled("gemma2").config)  # its cap of attention's scores is none of the head's
    assert gemma == [IDENTITY, HeadForm(cap=8.0)]
    assert candidate_forms(make_scaled("llama").config) == [IDENTITY]


def test_scale_and_cap_are_what_the_formula_says() -> None:
    values = torch.linspace(-40, 40, 801)
    for form in (IDENTITY, HeadForm(0.3), HeadForm(1.0, 15.0), HeadForm(0.5, 30.0)):
        scaled = form.scale * values.double()
        expected = scaled if form.cap is None else form.cap * torch.tanh(scaled / form.cap)
        found = scale_and_cap(values.clone(), form.scale, form.cap)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert scale_and_cap(values, 1.0, None) is values
    assert HeadForm.of({}) == IDENTITY
    assert IDENTITY.to_json() == {}
    assert HeadForm.of(HeadForm(0.5, 30.0).to_json()) == HeadForm(0.5, 30.0)
    for wrong in ({"logit_scale": 0}, {"logit_cap": -1.0}, {"logit_scale": float("nan")}, {"logit_cap": "30"}):
        with pytest.raises(StoreError, match="expected logit_"):
            HeadForm.of(wrong)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return small_dataset(tmp_path_factory.mktemp("dataset"), tokenizer_dir)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("kind", "dtype"), [("gemma2", "bfloat16"), ("granite", "float32")])
def test_every_teacher_and_the_trainer_make_the_models_logits(
    dataset: Path, tmp_path: Path, kind: str, dtype: str
) -> None:
    path, item = save_scaled(tmp_path / "verifier", kind), {}
    for teacher in ("draft", "hidden"):
        root = tmp_path / teacher / "store"
        job = CaptureJob(config(path, dataset, root, teacher=teacher, compute_dtype=dtype, batch_tokens=1))
        job.run()
        item[teacher] = StoreReader(root).read(0)
    store, verifier = StoreReader(root), job.verifier
    assert HeadForm.of(store.manifest.verifier) == verifier.head_form
    arrays = item["hidden"].arrays
    ids = torch.from_numpy(arrays["token_ids"].astype(np.int64))
    with float32_head(verifier.head):  # so that bfloat16 does not round what is compared
        logits = plain_logits(verifier, ids)[arrays["teacher_positions"].astype(np.int64)]
    in_draft = logits[:, torch.from_numpy(store.vocab_map().target_ids)]
    for found in item.values():
        for name, expected in {
            "log_z_full": logits.logsumexp(-1),
            "log_z_draft": in_draft.logsumexp(-1),
            "teacher_max": in_draft.amax(-1),
        }.items():
            np.testing.assert_allclose(found.arrays[name], expected, atol=1e-4, rtol=0)
    kept = in_draft.topk(16).values
    restored = item["draft"].arrays["teacher_max"][:, None] - item["draft"].arrays["teacher_gaps"].astype(np.float32)
    np.testing.assert_allclose(restored, kept, atol=8e-3, rtol=0)

    frozen = FrozenWeights.load(store, CPU)
    states = torch.from_numpy(arrays["teacher_hidden"])
    states = states if dtype == "float32" else states.view(torch.bfloat16)
    exact = torch.softmax(in_draft, -1)
    torch.testing.assert_close(exact_probabilities(states, frozen.lm_head, frozen.head_form), exact, rtol=0, atol=1e-5)
    assert (exact_probabilities(states, frozen.lm_head) - exact).abs().max() > 0.1  # negative control
    shown = {name: shown_teacher(StoreReader(tmp_path / name / "store"), item[name], None) for name in item}
    for position, of_states in shown["hidden"].items():
        for ours, theirs in zip(of_states["choices"], shown["draft"][position]["choices"], strict=True):
            assert ours["probability"] == pytest.approx(theirs["probability"], rel=0.02)

    trainer = Trainer(training(tmp_path / "hidden", head_dim=8, epochs=1))
    assert trainer.learner.objective.head_form == verifier.head_form
    rows = load_file(store.files.frozen)["lm_head"].float()
    assert torch.equal(trainer.model.lm_head.weight, rows * verifier.head_form.scale)
    assert torch.equal(trainer.model.norm.weight, verifier.norm.weight)
    trainer.run()


def test_the_trainers_loss_of_stored_states_is_that_of_the_scaled_and_capped_teacher(tmp_path: Path) -> None:
    from support.synthetic import manifest
    from support.teacher_stores import write_teacher_store

    losses = {}
    for form in (IDENTITY, HeadForm(scale=0.5), HeadForm(cap=2.0)):
        root = tmp_path / str(form)
        write_teacher_store(root / "store", "hidden", verifier=manifest().verifier | form.to_json())
        trainer = Trainer(training(root, head_init="random"))
        with read_ahead([trainer], 0) as data:
            found = data.next_batch()
        rows = torch.arange(found.argmax.shape[0])
        teacher = trainer.learner.objective.row_teacher(found, rows).p
        products = found.teacher_hidden.double() @ trainer.frozen.lm_head.double().T
        expected = form.scale * products if form.cap is None else form.cap * torch.tanh(products / form.cap)
        torch.testing.assert_close(teacher.double(), torch.softmax(expected, -1), rtol=1e-5, atol=1e-6)
        losses[form] = teacher
    assert not torch.allclose(losses[IDENTITY], losses[HeadForm(scale=0.5)], atol=1e-2)
    assert not torch.allclose(losses[IDENTITY], losses[HeadForm(cap=2.0)], atol=1e-2)
