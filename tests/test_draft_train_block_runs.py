"""Runs of block drafts: trained, resumed, evaluated and exported; the mask token; anchors drawn for each epoch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from draftcache.draft_train import mask_token
from draftcache.draft_train.checkpoint import checkpoints, load_state
from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.loss_rows import AnchorDraw
from draftcache.draft_train.data.packed_batch import BatchLoader
from draftcache.draft_train.drafts.block import served
from draftcache.draft_train.drafts.block.model import BlockModel
from draftcache.draft_train.drafts.protocol import CheckpointState
from draftcache.draft_train.drafts.serving_target import ServingTarget
from draftcache.draft_train.evaluate import evaluate
from draftcache.draft_train.export import export
from draftcache.draft_train.mask_token import with_mask_token
from draftcache.draft_train.ranks import Ranks
from draftcache.draft_train.trainer import Trainer, train
from draftcache.store.common.errors import CheckpointError, InputError
from draftcache.store.format.vocab_map import VocabMap
from draftcache.store.reader import StoreReader
from draftcache.tools.cli import main
from support.block_models import make_shape
from support.synthetic import DRAFT_VOCAB, LAYERS, VOCAB, write_store
from support.training_runs import config, metrics

TOKENS = VOCAB - 2
"""Token ids that occur in the data."""
KINDS = {"dspark": {"markov_rank": 4, "attention_sinks": True}, "dflash": {"block_attention": "bidirectional"}}


def settings(tmp_path: Path, draft: str, **changes: Any) -> TrainConfig:
    """A short run of a block draft with two layers."""
    own: dict[str, Any] = {"draft": draft, "ttt_steps": 0, "num_hidden_layers": 2, "block_size": 4}
    return config(tmp_path, **own | KINDS[draft] | changes)


@pytest.mark.parametrize("draft", KINDS)
def test_a_block_draft_trains_resumes_and_is_evaluated_and_exported(draft: str, tmp_path: Path) -> None:
    write_store(tmp_path / "store", per_shard=6, tokens=TOKENS)
    whole = settings(tmp_path, draft, epochs=12, eval_split="val", eval_every=12, anchor_share=0.6)
    last = Trainer(whole).run()
    losses = [row["loss"] for row in metrics(whole.output)]
    assert losses[-1] < 0.9 * losses[0]
    assert "eval_acceptance_length" in metrics(whole.output)[-1]
    state = load_state(last)
    assert (state.architecture, state.objective["block_size"]) == (draft, 4)
    assert state.objective["mask_token_id"] == TOKENS + 1

    before = load_file(last / "model.safetensors")
    (whole.output / "best.json").unlink()
    for path in checkpoints(whole.output)[1:]:
        shutil.rmtree(path)
    resumed = Trainer(whole).run()  # from the oldest checkpoint that was kept
    again = load_file(resumed / "model.safetensors")
    assert all(torch.equal(before[name], again[name]) for name in before)

    figures = evaluate(store=tmp_path / "store", checkpoint=whole.output, splits=["train"], draft_tokens=3)
    found = figures["splits"]["train"]
    assert found["draft"]["acceptance_length"] > found["untrained"]["acceptance_length"]

    export(whole.output, tmp_path / "draft", engine="vllm", dtype="float32")
    written = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert written["architectures"] == [{"dspark": "Qwen3DSparkModel", "dflash": "DFlashDraftModel"}[draft]]
    assert written["target_layer_ids"] == written["dflash_config"]["target_layer_ids"] == list(LAYERS)
    assert written["dflash_config"]["mask_token_id"] == TOKENS + 1
    assert written["layer_types"] == ["sliding_attention"] * 2
    assert written["dflash_config"].get("causal") == (None if draft == "dspark" else False)
    assert written["dflash_config"].get("attention_sink_bias") == (True if draft == "dspark" else None)
    assert written.get("dspark_bonus_anchor") == (False if draft == "dspark" else None)
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    assert set(tensors) == {*again, "d2t", "t2d"}
    assert all(torch.equal(tensors[name], again[name].float()) for name in again)
    assert tensors["lm_head.weight"].shape == (DRAFT_VOCAB, 8)


def test_a_whole_vocabulary_shares_the_verifiers_head_and_only_that_suits_sglang() -> None:
    verifier = {
        "name": "v", "weights_hash": "0", "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 0, "layers": 6, "hidden_size": 8, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    taps = [{"layer": layer, "point": "output"} for layer in LAYERS]

    def form(engine: str, version: str | None = "0.5.14", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
        shape = make_shape(**{"bonus_anchor": True, "draft_vocab_size": VOCAB} | changes)
        state = CheckpointState(
            architecture="dflash", step=1, finished=True, objective={}, shape=shape, store_hash="", draft_vocab_hash="",
            verifier=verifier, taps=taps, metrics={},
        )  # fmt: skip
        words = VocabMap(target_ids=np.arange(shape.draft_vocab_size), vocab_size=VOCAB)
        return served.served_form(
            "dflash", shape, BlockModel(shape), state, words, dtype=dtype,
            target=ServingTarget(engine=engine, version=version),
        )  # fmt: skip

    shared = form("sglang")
    assert not {"lm_head.weight", "d2t", "t2d", "embed_tokens.weight"} & shared.tensors.keys()
    for changes in (
        {"draft_vocab_size": DRAFT_VOCAB}, {"train_head": True}, {"train_embeddings": True}, {"attention_sinks": True},
        {"causal": (False, False)},
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="--engine sglang: expected a draft that proposes by the verifier's"):
            form("sglang", **changes)
        assert form("vllm", **changes).config["num_hidden_layers"] == 2
    full: dict[str, Any] = {"layer_types": ("full", "full"), "causal": (False, False), "window": None}
    for version in (None, "0.5.13.post1"):
        with pytest.raises(InputError, match=f"0.5.14 or later .* layer_types .* found {version or 'none'}: earlier"):
            form("sglang", version)
    for version in (None, "0.5.12.post1"):
        with pytest.raises(
            InputError, match=f"0.5.13 or later .* rope_theta .* found {version or 'none'}: .* 1,000,000"
        ):
            form("sglang", version, **full)
        assert form("sglang", version, **full, rope_theta=1e6).config["rope_theta"] == 1e6
    assert form("sglang", "0.5.13", **full).config["layer_types"] == ["full_attention"] * 2
    with pytest.raises(InputError, match=r"--dtype: expected bfloat16 for a DFlash draft in SGLang.* found float32"):
        form("sglang", dtype=torch.float32)
    assert form("vllm", dtype=torch.float32).config["dtype"] == "float32"


def test_the_mask_token_is_one_that_no_conversation_has(tmp_path: Path) -> None:
    write_store(tmp_path / "store", tokens=TOKENS)
    store = StoreReader(tmp_path / "store")
    assert with_mask_token(settings(tmp_path, "dflash"), store).mask_token_id == VOCAB - 1
    given = settings(tmp_path, "dflash", mask_token_id=TOKENS)
    assert with_mask_token(given, store) == given
    with pytest.raises(InputError, match=r"--mask-token-id 3: expected a token that no conversation has, found it \d+"):
        Trainer(settings(tmp_path, "dflash", mask_token_id=3))
    assert with_mask_token(config(tmp_path), store) == config(tmp_path)
    write_store(tmp_path / "full")
    with pytest.raises(InputError, match="found all 40 in use"):
        with_mask_token(settings(tmp_path, "dflash"), StoreReader(tmp_path / "full"))


def test_a_run_that_goes_on_keeps_its_mask_token_and_looks_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(tmp_path / "store", tokens=TOKENS)
    store = StoreReader(tmp_path / "store")
    asked = settings(tmp_path, "dflash")
    train(asked)

    def refuse(*_arguments: Any) -> None:
        raise AssertionError("the store was looked through")

    monkeypatch.setattr(mask_token, "token_counts", refuse)
    assert with_mask_token(asked, store).mask_token_id == VOCAB - 1
    with pytest.raises(AssertionError):  # another token was not looked for
        with_mask_token(replace(asked, mask_token_id=TOKENS), store)
    write_store(tmp_path / "other", tokens=TOKENS, dataset_hash="another")
    with pytest.raises(AssertionError):  # nor was this one in another store
        with_mask_token(asked, StoreReader(tmp_path / "other"))


def test_ranks_look_through_parts_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "store", tokens=TOKENS)
    monkeypatch.setattr(mask_token, "_PART", 3)
    whole = mask_token.token_counts(StoreReader(tmp_path / "store"))
    assert whole.sum() == StoreReader(tmp_path / "store").index["tokens"].sum()
    parts: list[NDArray[Any]] = []

    class Rank(Ranks):
        def add_up(self, values: torch.Tensor) -> torch.Tensor:
            parts.append(values.numpy().copy())
            return values

    for rank in range(2):
        mask_token.token_counts(StoreReader(tmp_path / "store"), Rank(torch.device("cpu"), rank, 2))
    assert np.array_equal(sum(parts), whole)
    assert all(0 < part.sum() < whole.sum() for part in parts)


def test_every_epoch_draws_its_anchors_by_seed_and_content(tmp_path: Path) -> None:
    write_store(tmp_path / "store", tokens=TOKENS)
    store = StoreReader(tmp_path / "store")
    trainer = Trainer(settings(tmp_path, "dspark", anchor_share=0.4))

    def anchors(numbers: list[int], epoch: int, **changes: Any) -> list[set[int]]:
        """The start rows, by conversation."""
        needs = replace(trainer.learner.needs, **changes)
        loader = BatchLoader(store, needs=needs, teacher=trainer.teacher)
        members = np.array(numbers)
        memory = torch.empty(loader.most_bytes(members), dtype=torch.uint8)
        host = loader.read(store, members, 1.0, memory, epoch).columns
        positions = host.tensors["key_positions"][host.tensors["start_index"]]
        owner = host.tensors["conversation"].numpy()
        return [set((positions.numpy() - host.shifts[number])[owner == number]) for number in range(len(numbers))]

    every = anchors([0, 1], 0, anchor_share=1.0)
    drawn = anchors([0, 1], 0)
    assert [len(some) for some in drawn] == [int(np.ceil(0.4 * len(all_))) for all_ in every]
    assert all(some < all_ for some, all_ in zip(drawn, every, strict=True))
    assert anchors([1, 0], 0) == drawn[::-1]  # whatever it is packed with
    assert anchors([0, 1], 1) != drawn
    assert anchors([0, 1], 0, anchor_seed=1) != drawn
    # Over many epochs every anchor has its turn.
    draws = [AnchorDraw(0.4, 0, epoch).taken("ab" * 16, 20) for epoch in range(40)]
    assert set(np.concatenate(draws)) == set(range(20))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--draft", "eagle3", "--block-size", "8"], "--block-size: expected it with --draft dflash or dspark"),
        (["--draft", "dflash", "--markov-rank", "8"], "--markov-rank: expected it with --draft dspark"),
        (["--draft", "dspark", "--ttt-steps", "6"], "--ttt-steps: expected it with --draft eagle3"),
        (["--draft", "dspark", "--eagle31"], "--eagle31: expected it with --draft eagle3"),
        (["--draft", "dspark", "--anchor-share", "0"], "--anchor-share: expected above 0"),
        (["--draft", "dspark", "--layer-types", "sliding"], "--layer-types: expected one of"),
        (["--draft", "dspark", "--attention", "flash"], "--attention: expected it with --draft eagle3"),
        (
            ["--draft", "dspark", "--step-weights", "d-pace", "--loss-rows", "unshifted"],
            "--loss-rows: expected turns with d-pace",
        ),
        (["--draft", "dspark", "--compute", "fused"], "--compute fused: expected a fused pass, found device cpu"),
    ],
)
def test_settings_that_don_t_fit_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_store(tmp_path / "store", tokens=TOKENS)
    where = ["train", "--store", str(tmp_path / "store"), "--output", str(tmp_path / "run"), "--splits", "train"]
    assert main([*where, "--sliding-window", "16", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err
