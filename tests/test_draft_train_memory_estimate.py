"""`draftcache size --train`: against peaks measured on a GPU, and against what the fused pass really keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.drafts.eagle3.choose_pass import pass_settings
from draftcache.draft_train.drafts.eagle3.fused_pass import FusedPass
from draftcache.draft_train.drafts.eagle3.fused_state import FusedPassSettings
from draftcache.draft_train.drafts.eagle3.memory import Work, batch_bytes, kept_bytes, parameters, peak_bytes
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.tools.bench.parts.train_cases import CASES, SHAPE, STEPS, TOP_K, Case, synthetic_batch
from draftcache.tools.cli import main
from support.draft_batches import MASKS, batch_of
from support.draft_models import EAGLE31, embeddings, make_model
from support.gradient_passes import objective
from support.synthetic import write_store

MEASURED = {
    "train-32k": 17.9349, "train-32k-flash": 17.9379,
    "train-32k-lean": 11.2743, "train-32k-lean-flash": 11.8613,
    "train-32k-90": 16.8111, "train-32k-90-flash": 16.8111,
    "train-32k-48": 12.0974, "train-32k-48-flash": 12.0974,
    "train-8k": 8.7586, "train-8k-flash": 8.7586,
    "train-8k-packed": 17.9370, "train-8k-packed-flash": 17.9370,
    "train-64k": 30.1745, "train-64k-flash": 30.1758,
    "train-64k-lean": 17.7788, "train-64k-lean-flash": 19.5368,
    "train-256k": 58.5508, "train-256k-flash": 65.5825,
    "loader-32k": 18.6191,
}  # fmt: skip
"""GiB at the peak by case of `tools/bench/train.py`, on one NVIDIA H100 80GB HBM3; -flash: with --attention flash."""


def work_of(case: Case, **changes: bool) -> Work:
    """What the benchmark runs: no second micro-batch waits there."""
    config = TrainConfig(store=Path(), output=Path(), splits=("train",), recompute_mlp=case.lean)
    starts, settings = sum(synthetic_starts(length, case.share) for length in case.lengths), pass_settings(config)
    work = Work(
        rows=sum(case.lengths), starts=starts, steps=STEPS, top_k=TOP_K, slice_rows=settings.rows,
        mlp_rows=settings.mlp_rows, recompute_mlp=case.lean, prefetched=False,
    )  # fmt: skip
    return replace(work, **changes)  # type: ignore[arg-type]


def synthetic_starts(length: int, share: float) -> int:
    return round(length * share)


def gib(work: Work) -> float:
    return sum(peak_bytes(SHAPE, work).values()) / 2**30


@pytest.mark.parametrize("name", CASES)
def test_peaks_are_near_what_was_measured(name: str) -> None:
    case = CASES[name]
    assert gib(work_of(case)) == pytest.approx(MEASURED[name], rel=0.03)
    if sum(case.lengths) >= 32_768:  # negative control: the other setting is told apart
        assert gib(work_of(case, recompute_mlp=not case.lean)) != pytest.approx(MEASURED[name], rel=0.1)


@pytest.mark.parametrize("name", CASES)
def test_peaks_with_flash_attention_are_measured_ones_or_a_little_more(name: str) -> None:
    """It counts as many copies of keys as turns can make; rows that all follow one another need none."""
    measured, most = MEASURED[f"{name}-flash"], 1.05 if CASES[name].lean else 1.03  # lean: little else is held
    assert measured <= gib(work_of(CASES[name], flash_attention=True)) < most * measured


def test_the_sums_of_flash_attention_count_where_little_else_is_held() -> None:
    lean = work_of(CASES["train-64k-lean"])
    assert gib(replace(lean, flash_attention=True)) > gib(lean)


def test_eagle31_takes_the_norms_inputs_more() -> None:
    work = work_of(CASES["train-32k"])
    more = sum(peak_bytes(replace(SHAPE, **EAGLE31), work).values()) - sum(peak_bytes(SHAPE, work).values())
    assert 0 < more < 0.03 * sum(peak_bytes(SHAPE, work).values())


def test_a_second_micro_batch_is_counted() -> None:
    assert gib(work_of(CASES["train-32k"], prefetched=True)) == pytest.approx(MEASURED["loader-32k"], rel=0.1)


def test_parameters_and_batch_are_the_real_ones() -> None:
    for model in (make_model(), make_model(**EAGLE31)):
        assert parameters(model.shape) == sum(value.numel() for value in model.parameters())
    batch = synthetic_batch(Case((300,)), torch.device("cpu"))
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    expected = sum(value.numel() * value.element_size() for value in tensors)
    assert batch_bytes(SHAPE, work_of(Case((300,)))) == expected


@pytest.mark.parametrize(("recompute", "switches"), [(False, {}), (True, {}), (False, EAGLE31)])
@torch.no_grad()
def test_what_is_kept_of_a_step_is_what_the_pass_keeps(recompute: bool, switches: dict[str, bool]) -> None:
    model = Eagle3Model(make_model(**switches).shape)
    training = FusedPass(model, objective(), embeddings().float(), FusedPassSettings(7, 7, recompute), torch.bfloat16)
    batch = batch_of(list(MASKS), 37)
    base, steps = training._base(batch), []
    for mask, starts, kept in training._step_masks(batch, base):
        steps.append(training._forward_step(base, mask, starts, kept, steps[-1] if steps else None))
    assert len(steps) > 1
    work = Work(rows=0, starts=0, steps=1, top_k=6, slice_rows=7, mlp_rows=7, recompute_mlp=recompute)
    for step in steps:
        held = step.attention
        tensors = [step.rows, step.key_rows, held.q, held.out, held.log_sum_exp, step.after, *step.gate_up, step.result]
        size = sum(value.numel() * value.element_size() for value in tensors)
        assert kept_bytes(model.shape, replace(work, starts=step.rows.numel())) == size


def test_the_command_takes_a_store_or_a_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path / "store")
    small = ["--head-dim", "4", "--num-attention-heads", "4"]
    assert main(["size", "--train", "--store", str(tmp_path / "store"), "--json", *small]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found["draft"]["hidden_size"], found["draft"]["vocab_size"]] == [8, 40]
    assert found["settings"]["default"]["tokens"] == 40
    assert (
        main(["size", "--train", "--store", str(tmp_path / "store"), "--batch-conversations", "9", "--json", *small])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["settings"]["default"]["tokens"] == 8192  # a whole pack
    shape = ["--hidden-size", "2688", "--vocab-size", "131072"]
    assert main(["size", "--train", "--length", "32768", *shape]) == 0
    lines = capsys.readouterr().out.splitlines()
    peak = next(line for line in lines if line.startswith("peak"))
    assert [float(part) for part in peak.split()[1:]] == pytest.approx([18.58, 18.58, 11.92])
    longest = next(line for line in lines if "80 GB" in line)
    fits = int(longest.split()[4].replace(",", ""))
    assert main(["size", "--train", "--length", str(fits), *shape, "--json"]) == 0
    total = json.loads(capsys.readouterr().out)["settings"]["default"]["total"] / 2**30
    assert 80 * 0.94 - 0.01 < total <= 80 * 0.94


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--train", "--length", "5"], "expected --store; or --length beside --verifier"),
        (["--train", "--tokens", "5"], "expected --store or --length, found --dataset or --tokens"),
        (["--train", "--length", "5", "--hidden-size", "8", "--vocab-size", "9", "--loss-fraction", "2"], "at most 1"),
        (["--hidden-size", "8"], "expected --dataset or --tokens"),
        (["--tokens", "8"], "expected --verifier or --hidden-size"),
    ],
)
def test_what_does_not_fit_together_is_named(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", *words]) == 2
    assert text in capsys.readouterr().err
