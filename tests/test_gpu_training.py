"""`draftcache train` on a GPU as users run it: the fused pass, reading ahead, SIGKILL and resume, several ranks."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from draftcache.draft_train.checkpoint import checkpoints, load_draft, load_state, resolve_checkpoint
from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.batches import build_batch
from draftcache.draft_train.data.frozen import FrozenWeights, TrainingSource
from draftcache.draft_train.drafts.eagle3.fused_pass import FusedPass
from draftcache.draft_train.drafts.eagle3.kernels.flash_attention import why_not_flash
from draftcache.draft_train.evaluate import evaluate
from draftcache.draft_train.ranks import Ranks
from draftcache.draft_train.side_by_side import read_ahead, train_side_by_side
from draftcache.draft_train.trainer import Trainer
from draftcache.draft_train.training_run import TrainingRun
from draftcache.store.reader import StoreReader
from support.rank_processes import TRAIN, WORKER, as_json, finish, start, weights
from support.synthetic import write_store
from support.training_runs import config, flags, metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of FlashAttention's own packages
]


def settings(root: Path, name: str, **changes: Any) -> TrainConfig:
    """A draft that the kernels take, and steps of several packs."""
    values = {"head_dim": 16, "epochs": 15, "device": "cuda", "batch_conversations": 4, "pack_tokens": 100}
    return config(root, output=root / name, **values | changes)


def command(made: TrainConfig, *words: str) -> list[str]:
    return [sys.executable, *TRAIN, *flags(made), "--pack-tokens", str(made.pack_tokens), *words]


def losses(made: TrainConfig) -> list[float]:
    return [row["loss"] for row in metrics(made.output)]


@pytest.mark.parametrize(
    ("mode", "words"),
    [("float32", ()), ("lossless", ("--recompute-mlp",)), ("int8", ("--order", "bucketed", "--loss", "lk"))],
)
def test_auto_trains_as_the_plain_pass_does(tmp_path: Path, mode: str, words: tuple[str, ...]) -> None:
    write_store(tmp_path / "store", per_shard=6, mode=mode)
    fused, plain = settings(tmp_path, "fused"), settings(tmp_path, "plain")
    ran = subprocess.run(command(fused, *words), check=True, capture_output=True, text=True)
    assert "plain pass" not in ran.stderr
    rest = [word for word in words if word != "--recompute-mlp"]
    subprocess.run(command(plain, "--compute", "plain", *rest), check=True, capture_output=True)
    np.testing.assert_allclose(losses(fused), losses(plain), rtol=0.05)


@pytest.mark.skipif(
    not torch.cuda.is_available() or why_not_flash(64, torch.device("cuda")) is not None,
    reason="needs FlashAttention 4",
)
def test_flash_attention_trains_as_the_plain_pass_does_and_the_same_every_time(tmp_path: Path) -> None:
    write_store(tmp_path / "store", per_shard=6, mode="lossless")
    flash, plain = (settings(tmp_path, name, head_dim=64) for name in ("flash", "plain"))
    subprocess.run(command(flash, "--attention", "flash"), check=True, capture_output=True)
    subprocess.run(command(plain, "--compute", "plain"), check=True, capture_output=True)
    np.testing.assert_allclose(losses(flash), losses(plain), rtol=0.05)
    again = settings(tmp_path, "again", head_dim=64)
    subprocess.run(command(again, "--attention", "flash"), check=True, capture_output=True)
    assert losses(again) == losses(flash)


def test_evaluation_in_the_kernels_counts_what_the_plain_one_does(tmp_path: Path) -> None:
    """In bfloat16 close choices fall otherwise, one in a hundred here; rows that are mixed up would change them all."""
    write_store(tmp_path / "store", per_shard=6, mode="lossless")
    run = settings(tmp_path, "run", epochs=60, eval_split="train", eval_every=100)
    Trainer(run).run()
    recorded = metrics(run.output)[-1]["eval_acceptance_length"]
    assert recorded > 1.2
    store = StoreReader(tmp_path / "store")
    frozen = FrozenWeights.load(store, torch.device("cuda"))
    path = resolve_checkpoint(run.output)
    draft = load_draft(path, load_state(path), torch.device("cuda"))
    items = [store.read(number, decode=False) for number in range(6)]
    batch = build_batch(items, store.codec, max_steps=5, window=draft.shape.sliding_window).to(torch.device("cuda"))
    fused, plain = (draft.proposer(frozen, compute)(batch, 5) for compute in ("fused", "plain"))
    assert torch.equal(fused < 0, plain < 0)
    assert float((fused == plain)[plain >= 0].float().mean()) > 0.95
    lengths = [
        evaluate(store=tmp_path / "store", checkpoint=run.output, splits=["train"], device="cuda", compute=compute)
        for compute in ("fused", "plain")
    ]
    found, expected = (result["splits"]["train"]["draft"]["acceptance_length"] for result in lengths)
    assert found == recorded
    assert found == pytest.approx(expected, rel=0.03)


def test_a_pass_that_keeps_old_weights_would_show(tmp_path: Path) -> None:
    """Negative control of the test above: fused AdamW changes weights without telling anyone."""
    write_store(tmp_path / "store", per_shard=6)
    plain, stale = settings(tmp_path, "plain", compute="plain"), settings(tmp_path, "stale")
    Trainer(plain).run()
    trainer = Trainer(stale)
    assert isinstance(trainer.learner.gradients, FusedPass)
    trainer.learner.gradients.weights.refresh()
    trainer.learner.gradients.weights.refresh = lambda: None  # type: ignore[method-assign]
    trainer.run()
    assert not np.allclose(losses(stale), losses(plain), rtol=0.05)


def test_sigkill_then_the_same_command_resumes_to_the_bit(tmp_path: Path) -> None:
    write_store(tmp_path / "store", per_shard=6, mode="lossless")
    whole, cut = (settings(tmp_path, name, epochs=60) for name in ("whole", "cut"))
    subprocess.run(command(whole), check=True, capture_output=True)
    with subprocess.Popen(command(cut), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (cut.output / "checkpoints").is_dir() or not checkpoints(cut.output):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not load_state(resolve_checkpoint(cut.output)).finished
    subprocess.run(command(cut), check=True, capture_output=True)
    for name in ("model.safetensors", "optimizer.safetensors"):
        mine, theirs = (load_file(checkpoints(run.output)[-1] / name) for run in (cut, whole))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert losses(cut) == losses(whole)
    other = settings(tmp_path, "other", epochs=60, seed=1)  # negative control
    Trainer(other).run()
    assert losses(other) != losses(whole)


def same_run(root: Path, alone: TrainConfig, ranks: int) -> None:
    """The ranks' weights are equal to the bit, and like those of one process; losses are like its own."""
    expected = weights(root / f"{alone.output.name}-0.safetensors")
    found = [weights(root / f"ranks-{rank}.safetensors") for rank in range(ranks)]
    for name, value in expected.items():
        assert all(torch.equal(rank[name], found[0][name]) for rank in found[1:])
        assert float((found[0][name] - value).norm()) < 0.05 * float(value.norm()), name
    np.testing.assert_allclose(losses(settings(root, "ranks")), losses(alone), rtol=0.02)


def test_two_ranks_that_share_a_gpu_train_the_same_run(tmp_path: Path) -> None:
    """Over gloo, as NCCL takes one rank per GPU: the fused pass tells of its gradients while others are made."""
    write_store(tmp_path / "store", per_shard=6)
    alone, ranks = settings(tmp_path, "alone", device="cuda:0"), settings(tmp_path, "ranks", device="cuda:0")
    for made, world in ((alone, 1), (ranks, 2)):
        ends = finish(start(world, [WORKER, as_json(made)]))
        assert all(code == 0 for code, *_ in ends), ends
    same_run(tmp_path, alone, 2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_gpu_for_each_rank_trains_the_same_run(tmp_path: Path) -> None:
    write_store(tmp_path / "store", per_shard=6)
    alone, ranks = settings(tmp_path, "alone"), settings(tmp_path, "ranks")
    for made, world in ((alone, 1), (ranks, 2)):
        ends = finish(start(world, [WORKER, as_json(made)]))
        assert all(code == 0 for code, *_ in ends), ends
    same_run(tmp_path, alone, 2)


def test_the_host_is_never_more_than_one_micro_batch_ahead(tmp_path: Path) -> None:
    write_store(tmp_path / "store", per_shard=6)
    ends = []
    with read_ahead([Trainer(settings(tmp_path, "run"))], 0) as data:
        for _ in range(2):
            data.next_batch()
            torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]  # about a second of work
            ends.append(torch.cuda.current_stream().record_event())
        assert not ends[0].query()  # negative control: the second was given while the first was worked on
        data.next_batch()
        assert [end.query() for end in ends] == [True, False]


@pytest.mark.parametrize("devices", [1, 2])
def test_runs_side_by_side_have_the_bits_of_their_runs_alone(tmp_path: Path, devices: int) -> None:
    if torch.cuda.device_count() < devices:
        pytest.skip(f"needs {devices} GPUs")
    write_store(tmp_path / "store", per_shard=6, mode="lossless")
    variants: list[dict[str, Any]] = [{}, {"learning_rate": 1e-3}, {"sliding_window": 7, "seed": 3}, {"ttt_steps": 2}]
    common = {"order_seed": 0, "eval_split": "val", "eval_every": 10}
    for number, changes in enumerate(variants):
        Trainer(settings(tmp_path, f"alone{number}", **common | changes)).run()
    source, runs = TrainingSource(tmp_path / "store"), []
    with ExitStack() as stack:
        for number, changes in enumerate(variants):
            device = torch.device("cuda", number % devices)
            made = settings(tmp_path, f"with{number}", **common | changes | {"device": str(device)})
            runs.append(TrainingRun(made, Ranks(device), None, source))
            stack.enter_context(runs[-1].started())
        assert isinstance(runs[0].learner.gradients, FusedPass)
        assert train_side_by_side(runs) == [None] * len(variants)
    for number in range(len(variants)):
        names = (f"with{number}", f"alone{number}")
        mine, theirs = (load_file(checkpoints(tmp_path / name)[-1] / "model.safetensors") for name in names)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs), number
        assert "eval_acceptance_length" in metrics(tmp_path / names[0])[-1]
    first, second = (load_file(checkpoints(tmp_path / f"with{number}")[-1] / "model.safetensors") for number in (0, 1))
    assert not torch.equal(first["fc.weight"], second["fc.weight"])  # negative control
