"""Training runs on synthetic stores: exact resume after SIGKILL, warm start, refusals, metrics."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import draftcache.draft_train.training_run as training_run_module
from draftcache.draft_train import run_log, side_by_side
from draftcache.draft_train.checkpoint import checkpoints, load_state, resolve_checkpoint
from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.optimizer import learning_rate
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import CheckpointError, InputError, ManifestMismatchError
from support.synthetic import vocab_map, write_store
from support.training_runs import config, flags, metrics, rewrite_state


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", per_shard=6)
    return tmp_path


def test_loss_falls_and_every_step_is_logged_once(store: Path) -> None:
    settings = config(store, epochs=30, eval_split="val", eval_every=30)
    last = Trainer(settings).run()
    rows = metrics(settings.output)
    assert [row["step"] for row in rows] == list(range(1, 91))
    assert np.mean([row["loss"] for row in rows[-9:]]) < 0.8 * np.mean([row["loss"] for row in rows[:3]])
    assert [row["step"] for row in rows if "eval_acceptance_length" in row] == [30, 60, 90]
    assert load_state(last).finished
    assert len(checkpoints(settings.output)) == 3


@pytest.mark.parametrize("changes", [{}, {"order": "bucketed", "batch_conversations": 4, "pack_tokens": 100}])
def test_resume_after_a_stop_is_exact_to_the_bit(store: Path, changes: dict[str, object]) -> None:
    whole, cut = config(store, output=store / "whole", **changes), config(store, output=store / "cut", **changes)
    Trainer(whole).run()
    stopped = Trainer(cut)
    steps = 0

    class StopError(Exception):
        pass

    original = stopped.end_step

    def stop_after_seven(*arguments: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise StopError
        return original(*arguments)  # type: ignore[arg-type]

    stopped.end_step = stop_after_seven  # type: ignore[method-assign, assignment]
    with pytest.raises(StopError):
        stopped.run()
    assert checkpoints(cut.output)[-1].name == "step_00000006"
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("prefetch", "read"))]
    Trainer(cut).run()
    for name in ("model.safetensors", "optimizer.safetensors"):
        mine, theirs = (load_file(checkpoints(run.output)[-1] / name) for run in (cut, whole))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert [row["loss"] for row in metrics(cut.output)] == [row["loss"] for row in metrics(whole.output)]


def test_packing_changes_no_step_and_an_order_does(store: Path) -> None:
    """Batches of 4 in one pack, in packs of at most two conversations, and one by one; then the negative control."""
    runs = {}
    settings = {"all": {}, "two": {"pack_tokens": 100}, "one": {"pack_tokens": 0}, "order": {"seed": 1}}
    for name, changes in settings.items():
        trainer = Trainer(config(store, output=store / name, batch_conversations=4, **changes))
        if name == "order":
            trainer.model.load_state_dict(Trainer(config(store)).model.state_dict())
        trainer.run()
        runs[name] = np.array([row["loss"] for row in metrics(store / name)])
    assert len(runs["all"]) == 8
    np.testing.assert_allclose(runs["two"], runs["all"], rtol=1e-4)
    np.testing.assert_allclose(runs["one"], runs["all"], rtol=1e-4)
    assert not np.allclose(runs["order"], runs["all"], rtol=1e-4)


def test_another_seed_gives_other_weights(store: Path) -> None:
    """Negative control of the test above."""
    runs = [Trainer(config(store, output=store / str(seed), seed=seed)).run() for seed in (0, 1)]
    first, second = (load_file(run / "model.safetensors") for run in runs)
    assert not torch.equal(first["fc.weight"], second["fc.weight"])


def test_sigkill_then_the_same_command_resumes(store: Path) -> None:
    whole, cut = config(store, output=store / "whole", epochs=40), config(store, output=store / "cut", epochs=40)
    Trainer(whole).run()
    command = [sys.executable, "-m", "draftcache.tools.cli", "train", *flags(cut)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (cut.output / "checkpoints").is_dir() or not checkpoints(cut.output):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not load_state(resolve_checkpoint(cut.output)).finished
    subprocess.run(command, check=True, capture_output=True)
    mine, theirs = (load_file(checkpoints(run.output)[-1] / "model.safetensors") for run in (cut, whole))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert [row["loss"] for row in metrics(cut.output)] == [row["loss"] for row in metrics(whole.output)]


def evaluated(monkeypatch: pytest.MonkeyPatch, settings: TrainConfig, lengths: dict[int, float]) -> Trainer:
    """A trainer whose evaluations find these acceptance lengths, by step."""
    trainer = Trainer(settings)
    monkeypatch.setattr(side_by_side, "acceptance_lengths", lambda trainers: [lengths[item.step] for item in trainers])
    return trainer


LENGTHS = {2: 1.5, 4: 1.8, 6: 1.7, 8: 1.8}


def test_best_checkpoint_survives_pruning_and_is_found(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 3, 6, 8 save anyway, step 4 because it is the best; a tie changes nothing."""
    settings = config(store, eval_split="val", eval_every=2, epochs=3, keep_checkpoints=1, batch_conversations=2)
    last = evaluated(monkeypatch, settings, LENGTHS | {9: 1.2}).run()
    assert [path.name for path in checkpoints(settings.output)] == ["step_00000004", "step_00000009"]
    assert resolve_checkpoint(settings.output) == last
    best = resolve_checkpoint(settings.output / "best")
    assert best.name == "step_00000004"
    assert load_state(best).metrics["eval_acceptance_length"] == 1.8
    command = [sys.executable, "-m", "draftcache.tools.cli", "export", "--checkpoint", str(settings.output / "best")]
    subprocess.run([*command, "--engine", "vllm", "--output", str(store / "draft")], check=True, capture_output=True)
    exported, theirs = (load_file(path / "model.safetensors") for path in (store / "draft", best))
    name = "fc.weight"
    assert torch.equal(exported[name].float(), theirs[name].to(exported[name].dtype).float())
    shutil.rmtree(best)
    with pytest.raises(CheckpointError, match=r"best\.json: expected step_00000004, which it names, found none"):
        resolve_checkpoint(settings.output / "best")


def test_a_kill_between_a_checkpoint_and_its_record_forgets_no_best(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    def killed(*_: object) -> None:
        raise KilledError

    settings = config(store, eval_split="val", eval_every=2, epochs=3, keep_checkpoints=1)
    lengths = LENGTHS | {9: 1.2}
    with monkeypatch.context() as patch:
        original = training_run_module.note_best
        patch.setattr(training_run_module, "note_best", lambda *a: killed() if a[1] == 4 else original(*a))
        with pytest.raises(KilledError):
            evaluated(patch, settings, lengths).run()
    assert json.loads((settings.output / "best.json").read_text())["step"] == 2
    evaluated(monkeypatch, settings, lengths).run()
    assert resolve_checkpoint(settings.output / "best").name == "step_00000004"


def test_without_evaluation_there_is_no_best(store: Path) -> None:
    Trainer(config(store)).run()
    with pytest.raises(CheckpointError, match="best in one that was evaluated by --eval-every"):
        resolve_checkpoint(store / "run" / "best")


def test_finished_run_is_left_alone(store: Path) -> None:
    settings = config(store)
    last = Trainer(settings).run()
    before = (last / "model.safetensors").stat().st_mtime_ns, len(metrics(settings.output))
    assert Trainer(settings).run() == last
    assert ((last / "model.safetensors").stat().st_mtime_ns, len(metrics(settings.output))) == before


def test_stage_two_starts_from_stage_one_weights_only(store: Path) -> None:
    first = Trainer(config(store)).run()
    second = Trainer(config(store, output=store / "two", init_from=store / "run"))
    second._restore()
    assert torch.equal(second.model.fc.weight, load_file(first / "model.safetensors")["fc.weight"])
    assert second.step == 0
    assert not second.optimizer.state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ttt_steps": 2}, "its ttt_steps is 3, here it is 2"),
        ({"out_of_vocab": "drop"}, "its out_of_vocab is 'weight'"),
        ({"order": "bucketed"}, "its order is 'shuffle'"),
        ({"batch_conversations": 3}, "its batch_conversations is 2"),
        ({"seed": 1}, "its seed is 0"),
        ({"splits": ("val",)}, r"its splits is \['train'\]"),
        ({"intermediate_size": 8}, "its draft intermediate_size is 24"),
    ],
)
def test_resume_under_other_settings_is_refused_by_name(store: Path, change: dict[str, object], message: str) -> None:
    Trainer(config(store)).run()
    with pytest.raises(CheckpointError, match=message):
        Trainer(replace(config(store), **change)).run()  # type: ignore[arg-type]


def test_what_shapes_no_step_may_change(store: Path) -> None:
    Trainer(config(store)).run()
    Trainer(replace(config(store), pack_tokens=0, prefetch_gb=0.1, loss_chunk=7, keep_checkpoints=1)).run()


def test_a_setting_that_a_checkpoint_does_not_know_counts_as_its_default(store: Path) -> None:
    """Checkpoints of before there was --order."""
    last = Trainer(config(store)).run()
    rewrite_state(last, lambda body: body["objective"].pop("order"))
    Trainer(config(store)).run()
    with pytest.raises(CheckpointError, match="its order is 'shuffle', here it is 'bucketed'"):
        Trainer(config(store, order="bucketed")).run()


def test_another_vocabulary_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainer(config(store)).run()
    other = vocab_map(seed=1)
    monkeypatch.setattr("support.synthetic.vocab_map", lambda seed=0: other)
    write_store(store / "other", draft_vocab_hash=other.hash)
    with pytest.raises(CheckpointError, match="its draft vocabulary is"):
        Trainer(config(store, store=store / "other", output=store / "two", init_from=store / "run")).run()


def test_another_verifier_is_refused(store: Path) -> None:
    from support.synthetic import manifest

    Trainer(config(store)).run()
    write_store(store / "other", verifier=manifest().verifier | {"weights_hash": "1" * 32})
    with pytest.raises(CheckpointError, match="its verifier weights is"):
        Trainer(config(store, store=store / "other", output=store / "two", init_from=store / "run")).run()


def test_window_beyond_the_kept_reach_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "store", window=8)
    Trainer(config(tmp_path, sliding_window=8, epochs=1)).run()
    for window in (9, 0):
        with pytest.raises(ManifestMismatchError, match="at most 8"):
            Trainer(config(tmp_path, sliding_window=window))


def test_damaged_and_incomplete_checkpoints_are_refused(store: Path) -> None:
    last = Trainer(config(store)).run()
    data = bytearray((last / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (last / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected xxh3-128"):
        load_state(last)
    (last / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        load_state(last)
    with pytest.raises(CheckpointError, match="found none of them"):
        resolve_checkpoint(store)


def test_damaged_lines_of_the_log_are_left_out_and_counted(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(store, epochs=2)
    Trainer(replace(settings, epochs=1)).run()
    log = settings.output / "metrics.jsonl"
    first, second, *rest = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([first, b"\xff" + second, b"[]\n", *rest, b'{"step": 4']))
    run_log._trim_metrics(log, 2)
    assert [row["step"] for row in metrics(settings.output)] == [1]
    assert f"{log}: 2 lines are no records of steps" in capsys.readouterr().err
    log.write_bytes(first.rstrip(b"\n"))  # cut between a record and its end of line
    run_log._trim_metrics(log, 2)
    assert log.read_bytes() == first
    assert capsys.readouterr().err == ""


def test_exploding_loss_stops_the_run(store: Path) -> None:
    trainer = Trainer(config(store))
    with torch.no_grad():
        trainer.model.fc.weight.fill_(math.inf)
    trainer._restore = lambda: None  # type: ignore[method-assign]
    with pytest.raises(InputError, match="expected a finite loss"):
        trainer.run()


def test_bad_settings_name_their_flag(tmp_path: Path) -> None:
    for change, flag in (
        ({"epochs": 0}, "--epochs"),
        ({"out_of_vocab": "x"}, "--out-of-vocab"),
        ({"splits": ()}, "--splits"),
        ({"order": "sorted"}, "--order"),
        ({"pack_tokens": -1}, "--pack-tokens"),
        ({"prefetch_gb": 0}, "--prefetch-gb"),
        ({"learning_rate": math.inf}, "--learning-rate: expected a finite number, found inf"),
        ({"weight_decay": math.nan}, "--weight-decay: expected a finite number"),
        ({"beta1": -0.1}, "--beta1"),
        ({"beta2": 1.0}, "--beta2"),
        ({"seed": -1}, "--seed"),
    ):
        with pytest.raises(InputError, match=flag):
            config(tmp_path, **change)
    with pytest.raises(InputError, match="--eval-split"):
        config(tmp_path, eval_every=5)


def test_learning_rate_warms_up_and_ends_at_the_floor(tmp_path: Path) -> None:
    settings = config(tmp_path, warmup_ratio=0.1, final_lr_ratio=0.1, learning_rate=1.0)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[99] == pytest.approx(0.1, abs=1e-3)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
