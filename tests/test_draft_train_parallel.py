"""Training on several ranks, as real processes that talk over gloo: the same run, and what happens when one dies."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from draftcache.draft_train.checkpoint import checkpoints, load_state
from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.ranks import joined_ranks
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import InputError
from draftcache.store.writer import StoreWriter
from support.rank_processes import TRAIN, WORKER, as_json, finish, free_port, start, weights
from support.synthetic import VOCAB, conversation, manifest, turns, write_files, write_store
from support.training_runs import config, flags, metrics


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Nine conversations of many lengths: with steps of 4, the last one of an epoch has a single one."""
    made = manifest(shards=2)
    rng = np.random.default_rng(0)
    with StoreWriter(tmp_path / "store", made, write_files) as writer:
        for shard in range(2):
            masks = [turns(30 + 5 * number, (6, 16), (22, 28 + 4 * number)) for number in range(9)]
            items = [conversation(rng, mask, number=number, split=shard) for number, mask in enumerate(masks)]
            writer.write_shard(shard, items, {"quarantined": [], "gates": {}})
        writer.finish()
    return tmp_path


def settings(root: Path, name: str, **changes: Any) -> TrainConfig:
    return config(root, output=root / name, batch_conversations=4, epochs=2, **changes)


def untrained_weights(root: Path) -> dict[str, torch.Tensor]:
    return Trainer(settings(root, "untrained")).model.state_dict()


def test_any_number_of_ranks_trains_the_same_run(store: Path) -> None:
    """1, 2 and 3 ranks: the same steps, losses and weights but for the order of sums, and ranks equal to the bit."""
    changes = {"eval_split": "val", "eval_every": 3, "eval_conversations": 5, "order": "bucketed", "pack_tokens": 90}
    for world in (1, 2, 3):
        made = settings(store, str(world), **changes)
        ends = finish(start(world, [WORKER, as_json(made)]))
        assert all(code == 0 for code, *_ in ends), ends
        if world == 3:
            assert "some wait for others" in ends[0][2]
    alone = metrics(store / "1")
    assert 70 in [row["tokens"] for row in alone]  # a step of one conversation, so ranks with none
    for world in (2, 3):
        rows = metrics(store / str(world))
        for name in ("step", "tokens", "learning_rate"):
            assert [row[name] for row in rows] == [row[name] for row in alone]
        for name in ("loss", "grad_norm", "tail_mass", "step_loss", "step_accuracy"):
            np.testing.assert_allclose([row[name] for row in rows], [row[name] for row in alone], rtol=1e-4)
        key = "eval_acceptance_length"
        found = [row[key] for row in rows if key in row]
        assert found == pytest.approx([row[key] for row in alone if key in row], rel=1e-3)
        assert len(found) == 2
        ranks = [weights(store / f"{world}-{rank}.safetensors") for rank in range(world)]
        for name, expected in weights(store / "1-0.safetensors").items():
            assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks[1:])
            torch.testing.assert_close(ranks[0][name], expected, rtol=1e-3, atol=1e-5)


def test_ranks_train_the_same_block_draft(tmp_path: Path) -> None:
    """Two ranks as one, in float32; they look for the mask token together, and resume with it."""
    write_store(tmp_path / "store", tokens=VOCAB - 2)
    own = {"draft": "dspark", "ttt_steps": 0, "num_hidden_layers": 1, "block_size": 4, "markov_rank": 4}
    for world in (1, 2):
        made = settings(tmp_path, str(world), **own)
        ends = finish(start(world, [WORKER, as_json(made)]))
        assert all(code == 0 for code, *_ in ends), ends
        assert load_state(checkpoints(made.output)[-1]).objective["mask_token_id"] == VOCAB - 1
    alone, both = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert len(alone) == len(both) > 1
    np.testing.assert_allclose([row["loss"] for row in both], [row["loss"] for row in alone], rtol=1e-4)
    for name, expected in weights(tmp_path / "1-0.safetensors").items():
        torch.testing.assert_close(weights(tmp_path / "2-0.safetensors")[name], expected, rtol=1e-3, atol=1e-5)
    ends = finish(start(2, [WORKER, as_json(made)]))
    assert all(code == 0 for code, *_ in ends), ends
    assert "looking for a mask token" not in ends[0][2]


def test_a_rank_that_is_left_out_would_show(store: Path) -> None:
    """Negative control of the test above: the first rank's part alone is another run."""
    alone, half = settings(store, "alone"), settings(store, "half")
    half = dataclasses.replace(half, batch_conversations=2)
    for made in (alone, half):
        assert finish(start(1, [WORKER, as_json(made)]))[0][0] == 0
    first, second = weights(store / "alone-0.safetensors"), weights(store / "half-0.safetensors")
    assert any(not torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-5) for name in first)


def test_sigkill_of_a_rank_ends_the_others_and_the_same_command_resumes(store: Path) -> None:
    """To the bit as if nothing had happened; one rank alone is not, so the comparison can fail."""
    whole, cut = (dataclasses.replace(settings(store, name), epochs=16) for name in ("whole", "cut"))
    words = [*TRAIN, *flags(cut)]
    processes = start(2, words)
    deadline = time.monotonic() + 90
    while not (cut.output / "checkpoints").is_dir() or not checkpoints(cut.output):
        assert time.monotonic() < deadline
        assert processes[1].poll() is None
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    (code, _, errors), _ = finish(processes)
    assert time.monotonic() - killed < 5  # 0.05 s: no time-out is waited for
    assert code == 3
    assert "expected an answer from every rank, found one gone" in errors
    assert not load_state(checkpoints(cut.output)[-1]).finished
    for words_of in (words, [*TRAIN, *flags(whole)]):
        ends = finish(start(2, words_of))
        assert [code for code, *_ in ends] == [0, 0], ends
        assert "checkpoint: " in ends[0][1]
        assert ends[1][1] == ""
    last = [checkpoints(run.output)[-1] for run in (cut, whole)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        mine, theirs = (weights(path / name) for path in last)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert [row["loss"] for row in metrics(cut.output)] == [row["loss"] for row in metrics(whole.output)]
    single = dataclasses.replace(settings(store, "single"), epochs=16)
    assert finish(start(1, [*TRAIN, *flags(single)]))[0][0] == 0
    assert [row["loss"] for row in metrics(single.output)] != [row["loss"] for row in metrics(whole.output)]


def test_what_is_not_finite_on_one_rank_ends_all_before_a_weight_changes(store: Path) -> None:
    ends = finish(start(2, [WORKER, as_json(settings(store, "run")), "1"]))
    for code, _, errors in ends:
        assert code == 1
        assert "expected a finite loss and gradient, found" in errors
    assert not checkpoints(store / "run")
    begun = untrained_weights(store)
    for rank, is_broken in enumerate((False, True)):
        found = weights(store / f"run-{rank}.safetensors")
        assert all(torch.equal(found[name], begun[name]) for name in begun if name != "fc.weight")
        assert (
            torch.isinf(found["fc.weight"]).all() if is_broken else torch.equal(found["fc.weight"], begun["fc.weight"])
        )


def test_ranks_with_other_settings_are_refused_by_name(store: Path) -> None:
    words = [*TRAIN, *flags(settings(store, "run"))]
    for code, _, errors in finish(start(2, words, ["--seed", "0"], ["--seed", "1"])):
        assert code == 2
        assert "expected the same seed on all ranks, found" in errors


def test_what_rank_0_refuses_ends_the_others(store: Path) -> None:
    made = settings(store, "run")
    assert finish(start(1, [*TRAIN, *flags(made)]))[0][0] == 0
    ends = finish(start(2, [*TRAIN, *flags(dataclasses.replace(made, ttt_steps=2))]))
    assert [code for code, *_ in ends] == [2, 2], ends
    assert "its ttt_steps is 3, here it is 2" in ends[0][2]
    assert "rank 1: another rank refused the run" in ends[1][2]


def test_torchrun_starts_it_and_sigterm_saves_the_step(store: Path) -> None:
    made = dataclasses.replace(settings(store, "run"), epochs=3000)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen([*command, *TRAIN, *flags(made)], stderr=subprocess.PIPE, text=True) as process:
        path, deadline = made.output / "metrics.jsonl", time.monotonic() + 90
        while not path.is_file() or not path.read_text():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=60)[1]
    state = load_state(checkpoints(made.output)[-1])
    assert not state.finished
    assert f"stopped after step {state.step}, which is saved" in errors
    assert [row["step"] for row in metrics(made.output)] == list(range(1, state.step + 1))


@pytest.mark.slow
def test_two_nodes_train_the_same_run(store: Path) -> None:
    """Two of torchrun's agents, each with two ranks: ranks 2 and 3 are ranks 0 and 1 of their node."""
    alone, nodes = settings(store, "alone"), settings(store, "nodes")
    assert finish(start(1, [WORKER, as_json(alone)]))[0][0] == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", free_port()]
    agents = [
        subprocess.Popen(
            [*command, "--node-rank", node, WORKER, as_json(nodes)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for node in ("0", "1")
    ]  # fmt: skip
    ends = finish(agents)
    assert [code for code, *_ in ends] == [0, 0], ends
    ranks = [weights(store / f"nodes-{rank}.safetensors") for rank in range(4)]
    for name, expected in weights(store / "alone-0.safetensors").items():
        assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks[1:])
        torch.testing.assert_close(ranks[0][name], expected, rtol=1e-3, atol=1e-5)
    losses = [[row["loss"] for row in metrics(made.output)] for made in (nodes, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_more_ranks_than_conversations_of_a_step_are_refused(store: Path) -> None:
    made = dataclasses.replace(settings(store, "run"), batch_conversations=1)
    for code, _, errors in finish(start(2, [*TRAIN, *flags(made)])):
        assert code == 2
        assert "--batch-conversations: expected at least one for each of the 2 ranks, found 1" in errors


def test_variables_that_are_half_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="RANK and LOCAL_RANK"), joined_ranks("cpu"):
        pass
