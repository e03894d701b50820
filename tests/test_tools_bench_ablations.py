"""The ablations' commands, settings and rows: by hand, and as the commands read them."""

from __future__ import annotations

import statistics
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from draftcache.draft_train.config import TrainConfig
from draftcache.store.common.errors import InputError, WorkerError
from draftcache.tools.bench.ablations import family_rows, measure, parse_arguments, setup_of
from draftcache.tools.bench.parts.ablation_bench import DEFAULTS, Bench, flags, settings_of, sweep_file
from draftcache.tools.bench.parts.ablation_families import FAMILIES
from draftcache.tools.bench.parts.ablation_jobs import Jobs
from draftcache.tools.students_t import half_width
from draftcache.tools.sweep.plan import read_sweep
from support.synthetic import write_store


def test_rows_are_means_over_seeds_and_differences_in_pairs() -> None:
    lengths = {"window=64": [1.5, 1.7, 1.6], "window=full": [1.6, 1.9, 1.7]}
    cases = {name: [{"acceptance_length": value, "steps": 7} for value in values] for name, values in lengths.items()}
    found = {(row["case"], row["metric"]): row["value"] for row in family_rows(cases, "window=full", "cpu")}
    assert found["window=64", "acceptance_length"] == pytest.approx(1.6)
    assert found["window=64", "half_width"] == pytest.approx(4.303 * statistics.stdev(lengths["window=64"]) / 3**0.5)
    assert found["window=64", "difference"] == pytest.approx(-0.4 / 3)
    assert found["window=64", "difference_half_width"] == pytest.approx(half_width([-0.1, -0.2, -0.1]))
    assert (found["window=full", "trials"], found["window=full", "optimizer_steps"]) == (3, 7)
    assert ("window=full", "difference") not in found


def test_sweep_files_are_sweeps_and_defaults_settings_of_a_run(tmp_path: Path) -> None:
    text = sweep_file({"splits": ["a", "b"], "learning_rate": 2e-3, "out": 'C:"x'}, {"loss": ("tv", "lk"), "seed": [1]})
    assert tomllib.loads(text) == {
        "train": {"splits": ["a", "b"], "learning_rate": 2e-3, "out": 'C:"x'},
        "axes": {"loss": ["tv", "lk"], "seed": [1]},
    }
    write_store(tmp_path / "store")
    shared = {"store": str(tmp_path / "store"), "splits": ["train"], "eval_split": "val", **DEFAULTS}
    shared |= {"sliding_window": 16, "top_k": 0, "num_attention_heads": 4, "head_dim": 4}
    path = tmp_path / "sweep.toml"
    path.write_text(sweep_file(shared, {"order": ("shuffle", "bucketed"), "seed": [2]}))
    sweep = read_sweep(path, tmp_path / "out")
    assert [(trial.config.order, trial.config.seed) for trial in sweep.trials] == [("shuffle", 2), ("bucketed", 2)]
    assert set(DEFAULTS) <= set(TrainConfig.__dataclass_fields__)


def test_values_of_the_command_line() -> None:
    texts = ["batch-conversations=4", "loss=tv", "allow_fallback=true", "recompute_mlp=false"]
    found = settings_of(texts, "--train")
    assert found == {"batch_conversations": 4, "loss": "tv", "allow_fallback": True, "recompute_mlp": False}
    assert flags(found) == ["--batch-conversations", "4", "--loss", "tv", "--allow-fallback", "--no-recompute-mlp"]
    with pytest.raises(InputError, match=r"expected KEY=VALUE.*found 'epochs'"):
        settings_of(["epochs"], "--train")


def test_urgent_commands_go_first_and_no_more_at_once_than_jobs(tmp_path: Path) -> None:
    jobs, ended, running, most = Jobs(2, tmp_path), list[int](), list[int](), list[int]()

    def turn(priority: int) -> None:
        with jobs._turn(priority):
            running.append(priority)
            most.append(len(running))
            time.sleep(0.05)
            running.remove(priority)
            ended.append(priority)

    with jobs._turn(0), jobs._turn(0):
        threads = [threading.Thread(target=turn, args=(priority,)) for priority in (5, 4, 3, 2, 1)]
        for thread in threads:
            thread.start()
        while len(jobs._waiting) < len(threads):
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert (sorted(ended[:2]), sorted(ended[2:4]), ended[4]) == ([1, 2], [3, 4], 5)
    assert max(most) == 2


def test_a_failed_command_says_so_with_the_end_of_its_log(tmp_path: Path) -> None:
    jobs = Jobs(1, tmp_path / "logs")
    assert jobs.run("fine", 0, "--help").startswith("usage: draftcache")
    with pytest.raises(WorkerError, match=r"inspect \(bad\): expected exit code 0, found 2; .*bad.log ends with.*none"):
        jobs.run("bad", 0, "inspect", tmp_path / "none")
    jobs.stop()
    with pytest.raises(WorkerError, match="expected no stop"):
        jobs.run("late", 0, "--help")


def test_a_family_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.json").write_text('{"vocab_size": 4096}')
    words = (
        f"--verifier v --dataset {tmp_path} --train-split a --eval-split b --work {tmp_path} --output o --device cpu"
    )
    setup = setup_of(parse_arguments([*words.split(), "--train", "epochs=2"]))
    assert (setup.first_split, setup.draft_vocab_size, setup.train["epochs"]) == ("a", 3072, 2)

    def swept(bench: Bench, name: str, seed: int, store: Path, axes: Any = None, **settings: Any) -> Any:
        if name == "unroll":
            raise WorkerError("expected a finished trial_0000, found it waiting")
        values = axes["sliding_window"]
        return [{"axes": {"sliding_window": value}, "acceptance_length": 1.0 + seed, "steps": 1} for value in values]

    monkeypatch.setattr(Bench, "store", lambda *_: tmp_path)
    monkeypatch.setattr(Bench, "swept", swept)
    assert measure(setup, ["unroll", "window"], 1, tmp_path / "rows.json") == 3
    text = (tmp_path / "rows.json").read_text()
    assert "window=full" in text
    assert "unroll" not in text
    with pytest.raises(InputError, match=r"expected train=FILE and eval=FILE.*found \[\]"):
        FAMILIES["turns"].measure(Bench(setup, Jobs(1, tmp_path)))
