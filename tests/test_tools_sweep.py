"""Sweeps: plans that are checked whole, trials equal to runs alone, early ends, kills, failures, results."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from draftcache.draft_train.checkpoint import checkpoints
from draftcache.draft_train.run_memory import fitting, side_by_side_bytes
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.common.files import read_json, write_json
from draftcache.store.common.stopping import StopRequest
from draftcache.tools.cli import main
from draftcache.tools.students_t import half_width
from draftcache.tools.sweep.launch import slots_of
from draftcache.tools.sweep.plan import PLAN_NAME, Asha, Sweep, read_sweep
from draftcache.tools.sweep.results import collect, format_results
from draftcache.tools.sweep.rungs import Rungs
from draftcache.tools.sweep.worker import FAILED, is_finished, train_group
from support.processes import wait_for
from support.ray_cluster import RAY_ENVIRONMENT, ray_cluster
from support.synthetic import VOCAB, write_store
from support.training_runs import metrics

CPU = [torch.device("cpu")]
TRAIN: dict[str, Any] = {
    "splits": ["train"], "eval_split": "val", "eval_every": 2, "epochs": 4, "batch_conversations": 2,
    "ttt_steps": 2, "sliding_window": 16, "head_dim": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "order_seed": 0,
}  # fmt: skip
AXES = {"learning-rate": [1e-3, 1e-2], "seed": [0, 1], "order": ["shuffle", "bucketed"]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_store(tmp_path / "store")
    return tmp_path


def written(root: Path, axes: dict[str, Any] | None = None, more: str = "", **changes: Any) -> Path:
    """Write a sweep's file over the synthetic store."""
    values = TRAIN | {"store": str(root / "store")} | changes
    lines = ["[train]", *(f"{name} = {json.dumps(value)}" for name, value in values.items()), "[axes]"]
    lines += [f"{name} = {json.dumps(value)}" for name, value in (axes or AXES).items()]
    path = root / "sweep.toml"
    path.write_text("\n".join([*lines, more, ""]))
    return path


def prepared(root: Path, **options: Any) -> Sweep:
    """Begin a sweep without running it."""
    sweep = read_sweep(written(root, **options), root / "out")
    write_json(root / "out" / PLAN_NAME, sweep.to_json())
    return sweep


def test_trials_are_the_runs_that_the_settings_make_alone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = {"loss": ["tail-kl", "tv"], "seed": [0, 1], "order": ["shuffle", "bucketed"]}
    path = written(root, axes)
    assert main(["sweep", str(path), "--output", str(root / "out"), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in found["trials"]] == ["finished"] * 8
    assert sorted(row["loss"] for row in found["means"]) == ["tail-kl", "tail-kl", "tv", "tv"]
    assert all(row["training_loss"] > 0 for row in [*found["trials"], *found["means"]])
    assert all(row["trials"] == 2 and row["half_width"] >= 0 for row in found["means"])
    sweep = Sweep.from_json(read_json(root / "out" / PLAN_NAME))
    assert sorted(len(group) for group in sweep.groups) == [4, 4]
    for trial in sweep.trials[::3]:
        alone = Trainer(replace_output(trial.config, root / "alone" / trial.name)).run()
        mine, theirs = (load_file(run / "model.safetensors") for run in (checkpoints(trial.config.output)[-1], alone))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for name in ("results.json", "results.csv", "sweep.png"):
        assert (root / "out" / name).stat().st_size > 0
    before = {path: path.stat().st_mtime_ns for path in (root / "out" / "runs").rglob("*") if path.is_file()}
    assert main(["sweep", str(path), "--output", str(root / "out"), "--device", "cpu"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (root / "out" / "runs").rglob("*") if path.is_file()}
    changed = written(root, axes, weight_decay=0.5)
    assert main(["sweep", str(changed), "--output", str(root / "out"), "--device", "cpu"]) == 2
    assert "expected weight_decay 0.0 in trial_0000" in capsys.readouterr().err


def test_architectures_are_an_axis_with_settings_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_store(tmp_path / "store", tokens=VOCAB - 1)
    shape = "num_hidden_layers = 1\nblock_size = 3\n"
    own = f"[train.eagle3]\nttt_steps = 2\n[train.dspark]\n{shape}markov_rank = 2\n[train.dflash]\n{shape}"
    axes = {"order": ["shuffle", "bucketed"], "draft": ["eagle3", "dspark", "dflash"]}
    path = written(tmp_path, axes, own, ttt_steps=0)
    assert main(["sweep", str(path), "--output", str(tmp_path / "out"), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["draft"], row["state"]) for row in found["trials"]] == [
        (name, "finished") for name in axes["draft"]
    ] * 2
    sweep = Sweep.from_json(read_json(tmp_path / "out" / PLAN_NAME))
    assert sweep.groups == [[0, 1, 2], [3, 4, 5]]  # one reading feeds three
    for trial in sweep.trials[:3]:
        alone = Trainer(replace_output(trial.config, tmp_path / "alone" / trial.name)).run()
        mine, theirs = (load_file(run / "model.safetensors") for run in (checkpoints(trial.config.output)[-1], alone))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with pytest.raises(
        InputError, match=r"\[train.dsparc\]: expected the name of an architecture.*did you mean dspark"
    ):
        read_sweep(written(tmp_path, more="[train.dsparc]\nblock_size = 3"), tmp_path / "other")


def replace_output(config: Any, output: Path) -> Any:
    from dataclasses import replace

    return replace(config, output=output, device="cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[axis]\nseed = [0]", r"expected the sections .*, found 'axis': did you mean axes\?"),
        ("[asha]\nfirts = 2", r"found 'firts': did you mean first\?"),
        ("[asha]\nreduction = 3", "expected first, the optimizer steps of the first rung"),
        ("[asha]\nfirst = 3", "expected a multiple of eval_every"),
        ("[asha]\nfirst = 2\nreduction = 1", "reduction: expected a whole number of at least 2, found 1"),
    ],
)
def test_sections_that_are_none_are_refused(root: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_sweep(written(root, more=text), root / "out")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"learning-rat": [1e-3]}, r"line 14, \[axes\]: .*found 'learning_rat': did you mean learning_rate\?"),
        ({"learning-rate": 1e-3}, "expected a list of values for learning-rate, found 0.001"),
        ({"learning-rate": []}, "expected a list of values"),
        ({"seed": [0, 0]}, "expected every value of seed once"),
        ({"output": ["a", "b"]}, "expected no output, which the sweep decides itself"),
        ({"learning-rate": [-1.0]}, r"with \{'learning_rate': -1.0\}: --learning-rate: expected above 0"),
        ({"top-k": [99]}, "--top-k: expected at most the"),
        ({"draft-vocab-size": [7]}, "expected one of the store's draft vocabularies, of sizes"),
        ({"loss": ["kl"]}, "--loss: expected one of"),
    ],
)
def test_axes_that_are_none_are_refused_before_anything_runs(root: Path, axes: dict[str, Any], message: str) -> None:
    with pytest.raises(DraftcacheError, match=message):
        read_sweep(written(root, axes=axes), root / "out")
    assert not (root / "out").exists()


def test_windows_beyond_the_store_are_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "store", window=8)
    with pytest.raises(DraftcacheError, match="expected a draft window of at most 8"):
        read_sweep(written(tmp_path, axes={"sliding-window": [8, 16]}), tmp_path / "out")


def test_a_sweep_needs_something_to_compare_by(root: Path) -> None:
    path = written(root)
    path.write_text(path.read_text().replace('eval_split = "val"\neval_every = 2\n', ""))
    with pytest.raises(InputError, match="expected eval_split, the split that trials are compared on"):
        read_sweep(path, root / "out")


def test_early_ends_are_those_of_a_plain_count(tmp_path: Path) -> None:
    rungs = Rungs(tmp_path, Asha(first=2, reduction=3))
    first = {f"trial_{number:04d}": 1 + number / 10 for number in range(6)}
    decided = rungs.decide(2, first)
    best = sorted(first, key=lambda name: -first[name])[:2]
    assert {name for name, goes_on in decided.items() if goes_on} == set(best)
    assert rungs.decide(2, first) == decided
    late = rungs.decide(2, {"late": 1.35})  # the third best of seven, of which two go on
    assert late == {"late": False}
    assert rungs.decide(2, {"good": 2.0}) == {"good": True}
    assert rungs.decide(2, {best[0]: 0.0}) == {best[0]: True}  # decided before
    assert set(rungs.ended()) == {*first, "late"} - set(best)
    assert rungs.decide(6, {"alone": 0.1}) == {"alone": True}
    assert Asha(first=2, reduction=3).rungs(20) == [2, 6, 18]


def test_trials_that_do_worse_end_early(root: Path) -> None:
    sweep = prepared(root, axes={"learning-rate": [1e-5, 1e-4, 3e-3, 1e-2]}, more="[asha]\nfirst = 2\nreduction = 2")
    train_group(root / "out", 0, CPU, 0, StopRequest())
    found = collect(sweep, root / "out")
    states = [row["state"] for row in found["trials"]]
    assert states.count("finished") >= 1
    assert states.count("ended early") >= 2
    for row, trial in zip(found["trials"], sweep.trials, strict=True):
        assert len(metrics(trial.config.output)) == row["steps"]
        assert (row["steps"] == 8) == (row["state"] == "finished")
    assert "ended early after" in format_results(found)
    before = [len(metrics(trial.config.output)) for trial in sweep.trials]
    train_group(root / "out", 0, CPU, 0, StopRequest())
    assert before == [len(metrics(trial.config.output)) for trial in sweep.trials]


def test_a_trial_that_fails_is_told_and_the_others_finish(root: Path) -> None:
    sweep = prepared(root, axes={"learning-rate": [1e-3, 1e30], "seed": [0]}, max_grad_norm=1e30, ttt_steps=3)
    train_group(root / "out", 0, CPU, 0, StopRequest())
    found = collect(sweep, root / "out")
    assert [row["state"][:6] for row in found["trials"]] == ["finish", "failed"]
    assert "expected a finite loss" in read_json(sweep.trials[1].config.output / FAILED)["error"]
    assert "failed: step" in format_results(found)


def test_fewer_trials_at_once_make_the_same_trials(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sweep = prepared(root, axes={"seed": [0, 1, 2]})
    train_group(root / "out", 0, CPU, 2, StopRequest())
    assert "3 trials train in 2 parts, as no more fit side by side" in capfd.readouterr().err
    alone = Trainer(replace_output(sweep.trials[2].config, root / "alone")).run()
    mine = load_file(checkpoints(sweep.trials[2].config.output)[-1] / "model.safetensors")
    assert all(torch.equal(mine[name], value) for name, value in load_file(alone / "model.safetensors").items())


def test_a_killed_worker_goes_on_and_runs_no_finished_trial_again(root: Path) -> None:
    axes = {"order": ["shuffle", "bucketed"], "seed": [0, 1]}
    sweep = prepared(root, axes=axes, epochs=60, eval_every=120, checkpoint_every=10)
    out, finished = root / "out", [sweep.trials[number].config.output for number in sweep.groups[0]]
    train_group(out, 0, CPU, 0, StopRequest())
    before = {path: path.stat().st_mtime_ns for run in finished for path in run.rglob("*") if path.is_file()}
    killed = [sweep.trials[number].config.output for number in sweep.groups[1]]
    words = [sys.executable, "-m", "draftcache.tools.sweep.worker", str(out), "1", "cpu", "0"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: bool(checkpoints(killed[0])))
        process.kill()
    assert not any(is_finished(trial) for trial in sweep.trials if trial.config.output in killed)
    for group in (0, 1):
        train_group(out, group, CPU, 0, StopRequest())
    assert before == {path: path.stat().st_mtime_ns for run in finished for path in run.rglob("*") if path.is_file()}
    for run in (*finished, *killed):
        assert [row["step"] for row in metrics(run)] == list(range(1, 121))


@pytest.mark.slow
def test_a_killed_sweep_runs_no_finished_trial_again(root: Path) -> None:
    path = written(
        root, axes={"order": ["shuffle", "bucketed"], "seed": [0, 1]}, epochs=30, eval_every=30, checkpoint_every=30
    )
    words = [sys.executable, "-m", "draftcache.tools.cli", "sweep", str(path), "--output", str(root / "out")]
    words += ["--device", "cpu", "--workers", "1"]
    first = [root / "out" / "runs" / f"trial_{number:04d}" for number in (0, 1)]

    def finished() -> bool:
        return all((run / "checkpoints" / "step_00000060").is_dir() for run in first)

    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not finished():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    before = {path: path.stat().st_mtime_ns for run in first for path in run.rglob("*") if path.is_file()}
    found = subprocess.run(words, capture_output=True, text=True, env=os.environ, check=True)
    assert before == {path: path.stat().st_mtime_ns for run in first for path in run.rglob("*") if path.is_file()}
    assert found.stdout.count("\n") == 3  # a header, and a mean for each order
    for number in range(4):
        steps = [row["step"] for row in metrics(root / "out" / "runs" / f"trial_{number:04d}")]
        assert steps == list(range(1, 61))


def test_a_sweep_that_is_asked_to_stop_saves_its_trials(root: Path) -> None:
    path = written(root, axes={"seed": [0, 1]}, epochs=4000, eval_every=1000, checkpoint_every=100_000)
    words = [sys.executable, "-m", "draftcache.tools.cli", "sweep", str(path), "--output", str(root / "out")]
    run = root / "out" / "runs" / "trial_0001"
    with subprocess.Popen([*words, "--device", "cpu"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").is_file() or len(metrics(run)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert len(checkpoints(run)) == 1


def test_groups_share_what_a_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    alone = slots_of(1, "cpu", 0)
    assert [slot.environment for slot in alone] == [{"OMP_NUM_THREADS": str(cores)}]
    assert len(slots_of(50, "cpu", 0)) == cores
    assert len(slots_of(50, "cpu", 1)) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setattr("draftcache.tools.sweep.launch.choose_device", lambda name: torch.device("cuda"))

    def shares(groups: int, workers: int) -> list[str]:
        return [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots_of(groups, "auto", workers)]

    assert shares(1, 0) == ["0,1,2"]
    assert shares(2, 0) == ["0,2", "1"]
    assert shares(9, 0) == ["0", "1", "2"]
    assert shares(9, 5) == ["0", "1", "2", "0", "1"]  # asked for: two share a GPU
    assert slots_of(1, "auto", 0)[0].devices == ("cuda:0", "cuda:1", "cuda:2")


def test_runs_are_cut_into_groups_that_fit() -> None:
    run = {"weights and optimizer": 4, "frozen weights": 1, "micro-batch": 1, "next micro-batch": 1, "working": 10}
    assert side_by_side_bytes([run]) == 17
    assert side_by_side_bytes([run, run]) == 24
    assert fitting([run] * 5, 24) == [[0, 1], [2, 3], [4]]
    assert fitting([run] * 2, 3) == [[0], [1]]


def test_intervals_are_students() -> None:
    """For 1, 2, 3: standard error 1 / sqrt(3), and 4.303 with two degrees of freedom."""
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)
    assert math.isnan(half_width([1.0]))


def test_ray_without_a_cluster_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(root, axes={"seed": [0]})
    code = main(["sweep", str(path), "--output", str(root / "out"), "--launcher", "ray"])
    assert code == 2
    assert "--launcher ray: expected " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")
def test_ray_tune_runs_the_same_trials(root: Path) -> None:
    path = written(root, axes={"order": ["shuffle", "bucketed"], "seed": [0, 1]})
    words = [sys.executable, "-m", "draftcache.tools.cli", "sweep", str(path), "--output", str(root / "out")]
    with ray_cluster() as address:
        subprocess.run(
            [*words, "--launcher", "ray", "--device", "cpu"],
            env={**RAY_ENVIRONMENT, "RAY_ADDRESS": address},
            check=True,
        )
    sweep = Sweep.from_json(read_json(root / "out" / PLAN_NAME))
    assert [row["state"] for row in collect(sweep, root / "out")["trials"]] == ["finished"] * 4
    alone = Trainer(replace_output(sweep.trials[3].config, root / "alone")).run()
    mine = load_file(checkpoints(sweep.trials[3].config.output)[-1] / "model.safetensors")
    assert all(torch.equal(mine[name], value) for name, value in load_file(alone / "model.safetensors").items())
