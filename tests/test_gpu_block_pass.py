"""The fused pass of block drafts through its kernels: on a GPU, or in Triton's interpreter in float32."""

from __future__ import annotations

import subprocess
import sys
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
from draftcache.draft_train.drafts.block.architecture import BlockDraft
from draftcache.draft_train.drafts.block.fused_forward import BlockSettings
from draftcache.draft_train.drafts.block.fused_pass import BlockPass
from draftcache.draft_train.drafts.block.model import BlockModel
from draftcache.draft_train.drafts.block.shape import BlockShape
from draftcache.draft_train.loss.objective import Objective
from draftcache.draft_train.ranks import Ranks
from draftcache.draft_train.side_by_side import train_side_by_side
from draftcache.draft_train.trainer import Trainer
from draftcache.draft_train.training_run import TrainingRun
from draftcache.store.common.triton_launch import INTERPRETED
from draftcache.store.reader import StoreReader
from support.block_models import SHAPES, batch_of, conversations, make_model, make_shape
from support.draft_models import embeddings
from support.gradient_passes import config as objective_config
from support.gradient_passes import near, objective, run
from support.kernel_device import BF16, DEVICE, DTYPES, F32, MARKS
from support.rank_processes import TRAIN, WORKER, as_json, finish, start, weights
from support.synthetic import VOCAB, vocab_map, write_store
from support.training_runs import config, metrics

pytestmark = MARKS
ON_GPU = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
SMALL = BlockSettings(slot_rows=40, rows=17)
TRIED = ["everything trained"] if INTERPRETED else list(SHAPES)


def objective_of(shape: BlockShape, **settings: object) -> Objective:
    """An objective on DEVICE over the synthetic vocabulary."""
    words = vocab_map()
    made = objective_config(**{"draft": "dspark", "ttt_steps": 0, "block_size": shape.block_size} | settings)
    inside = torch.from_numpy(words.padded(VOCAB).t2d)
    return Objective(made, torch.from_numpy(words.target_ids).to(DEVICE), inside.to(DEVICE))


def joined(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One vector of all gradients, by name."""
    return {"all": torch.cat([gradients[name].flatten() for name in sorted(gradients)])}


@pytest.mark.parametrize("name", TRIED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_pass_through_its_kernels_equals_autograd_in_float64(dtype: torch.dtype, name: str) -> None:
    bound = {F32: 1e-4, BF16: 6e-2}[dtype]
    shape = make_shape(**SHAPES[name], head_dim=16)
    expected_model = make_model(shape).float()
    model = BlockModel(shape).to(DEVICE)
    model.load_state_dict(expected_model.state_dict())
    batch = batch_of(shape, conversations())
    own = objective(draft="dspark", ttt_steps=0, block_size=shape.block_size)
    frozen: Any = type("Frozen", (), {"embed_tokens": embeddings()})
    plain = BlockDraft("dspark", shape, expected_model.double()).plain_pass(own.config, own, frozen)
    expected = run(plain, expected_model, batch)
    training = BlockPass(model, objective_of(shape), embeddings().float().to(DEVICE), SMALL, dtype=dtype)
    found = run(training, model, batch.to(DEVICE))
    torch.testing.assert_close(found[0][0].cpu(), expected[0][0], rtol=bound, atol=0)
    gradients = {name: value.cpu().double() for name, value in found[1].items()}
    if dtype == BF16:  # of so few rows, a parameter's gradient can nearly cancel out; that of all of them does not
        gradients, expected = joined(gradients), (expected[0], joined(expected[1]))
    assert near(gradients, expected[1], bound)
    if not INTERPRETED:
        again = run(training, model, batch.to(DEVICE))
        assert all(torch.equal(again[1][name], value) for name, value in found[1].items())


@ON_GPU
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("settings", [{}, {"step_weights": "d-pace"}, {"loss": "tail-kl"}])
def test_the_pass_waits_for_nothing(settings: dict[str, Any]) -> None:
    shape = make_shape(**SHAPES["everything trained"], head_dim=64)
    model = BlockModel(shape).to(DEVICE)
    training = BlockPass(model, objective_of(shape, **settings), embeddings().float().to(DEVICE), SMALL, dtype=BF16)
    batch = batch_of(shape, conversations()).to(DEVICE)
    training(batch)  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        training(batch)
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.nonzero(batch.steps)  # negative control
    finally:
        torch.cuda.set_sync_debug_mode("default")


def settings_of(root: Path, name: str, draft: str = "dspark", **changes: Any) -> TrainConfig:
    """A draft that the kernels take, and steps of several packs."""
    values: dict[str, Any] = {
        "draft": draft, "ttt_steps": 0, "head_dim": 16, "epochs": 15, "device": "cuda", "batch_conversations": 4,
        "pack_tokens": 100, "num_hidden_layers": 2, "block_size": 5,
    }  # fmt: skip
    return config(root, output=root / name, **values | changes)


@ON_GPU
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recompute_mlp": True, "loss": "tail-kl"},
        {"draft": "dflash", "anchor_share": 0.5},
        {"attention_sinks": True},
    ],
)
def test_auto_trains_as_the_plain_pass_does_and_the_same_every_time(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_store(tmp_path / "store", per_shard=6, mode="lossless", tokens=VOCAB - 1)
    found = {}
    for name in ("fused", "again", "plain"):
        rest = {key: value for key, value in changes.items() if key != "recompute_mlp" or name != "plain"}
        made = settings_of(tmp_path, name, **rest | ({"compute": "plain"} if name == "plain" else {}))
        trainer = Trainer(made)
        assert isinstance(trainer.learner.gradients, BlockPass) == (name != "plain")
        trainer.run()
        found[name] = [row["loss"] for row in metrics(made.output)]
    np.testing.assert_allclose(found["fused"], found["plain"], rtol=0.05)
    assert found["fused"] == found["again"]


@ON_GPU
def test_a_command_is_resumed_to_the_bit(tmp_path: Path) -> None:
    write_store(tmp_path / "store", per_shard=6, mode="lossless", tokens=VOCAB - 1)
    made = settings_of(tmp_path, "whole", checkpoint_every=5, anchor_share=0.7)
    last = Trainer(made).run()
    before = load_file(last / "model.safetensors")
    for path in checkpoints(made.output)[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    words = [
        "--store", str(made.store), "--output", str(made.output), "--splits", "train", "--draft", "dspark",
        "--head-dim", "16", "--epochs", "15", "--batch-conversations", "4", "--pack-tokens", "100",
        "--num-hidden-layers", "2", "--block-size", "5", "--checkpoint-every", "5", "--anchor-share", "0.7",
        "--learning-rate", "1e-2", "--sliding-window", "16", "--num-attention-heads", "4", "--num-key-value-heads",
        "2", "--device", "cuda",
    ]  # fmt: skip
    subprocess.run([sys.executable, *TRAIN, *words], check=True, capture_output=True)
    again = load_file(checkpoints(made.output)[-1] / "model.safetensors")
    assert all(torch.equal(before[name], again[name]) for name in before)


@ON_GPU
def test_evaluation_in_the_kernels_counts_what_the_plain_one_does(tmp_path: Path) -> None:
    write_store(tmp_path / "store", per_shard=6, mode="lossless", tokens=VOCAB - 1)
    made = settings_of(tmp_path, "run", epochs=60)
    Trainer(made).run()
    store = StoreReader(tmp_path / "store")
    frozen = FrozenWeights.load(store, DEVICE)
    path = resolve_checkpoint(made.output)
    draft = load_draft(path, load_state(path), DEVICE)
    items = [store.read(number, decode=False) for number in range(6)]
    batch = build_batch(items, store.codec, max_steps=5, window=draft.shape.sliding_window).to(DEVICE)
    fused, plain = (draft.proposer(frozen, compute)(batch, 5) for compute in ("fused", "plain"))
    assert torch.equal(fused < 0, plain < 0)
    assert float((fused == plain)[plain >= 0].float().mean()) > 0.95


@ON_GPU
def test_architectures_side_by_side_have_the_bits_of_their_runs_alone(tmp_path: Path) -> None:
    write_store(tmp_path / "store", per_shard=6, mode="lossless", tokens=VOCAB - 1)
    common = {"order_seed": 0, "eval_split": "val", "eval_every": 10}
    eagle3 = {"draft": "eagle3", "ttt_steps": 3, "num_hidden_layers": 0, "block_size": 0}
    variants: list[dict[str, Any]] = [{}, {"draft": "dflash"}, eagle3]
    for number, changes in enumerate(variants):
        Trainer(settings_of(tmp_path, f"alone{number}", **common | changes)).run()
    source, runs = TrainingSource(tmp_path / "store"), []
    with ExitStack() as stack:
        for number, changes in enumerate(variants):
            made = settings_of(tmp_path, f"with{number}", **common | changes)
            runs.append(TrainingRun(made, Ranks(torch.device("cuda", 0)), None, source))
            stack.enter_context(runs[-1].started())
        assert train_side_by_side(runs) == [None] * len(variants)
    for number in range(len(variants)):
        names = (f"with{number}", f"alone{number}")
        mine, theirs = (load_file(checkpoints(tmp_path / name)[-1] / "model.safetensors") for name in names)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs), number


@ON_GPU
def test_two_ranks_that_share_a_gpu_train_the_same_run(tmp_path: Path) -> None:
    """Over gloo, as NCCL takes one rank per GPU: the pass tells of its gradients while others are made."""
    write_store(tmp_path / "store", per_shard=6, tokens=VOCAB - 1)
    changes = {"device": "cuda:0", "learning_rate": 1e-3}  # larger steps make much of bf16's rounding
    alone, ranks = (settings_of(tmp_path, name, **changes) for name in ("alone", "ranks"))
    for made, world in ((alone, 1), (ranks, 2)):
        ends = finish(start(world, [WORKER, as_json(made)]))
        assert all(code == 0 for code, *_ in ends), ends
    expected = weights(tmp_path / "alone-0.safetensors")
    found = [weights(tmp_path / f"ranks-{rank}.safetensors") for rank in range(2)]
    for name, value in expected.items():
        assert torch.equal(found[0][name], found[1][name])
        assert float((found[0][name] - value).norm()) < 0.05 * float(value.norm()), name
