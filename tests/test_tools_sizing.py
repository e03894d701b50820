"""`draftcache size`: estimates against the bytes of real stores, counts against real masks, FLOPs against torch's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch.utils.flop_counter import FlopCounterMode

from draftcache.capture.job.store_size import count_dataset, frozen_bytes, shard_bytes, specs_of
from draftcache.capture.prepare.token_dataset import CONVERSATION_DTYPE, TokenDataset, conversation_hash
from draftcache.capture.prepare.token_dataset_writer import DatasetWriter
from draftcache.capture.verifier.family_flops import verifier_flops
from draftcache.store.common.errors import InputError
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.bf16 import float32_to_bf16
from draftcache.store.format.channel_scales import ChannelScales
from draftcache.store.format.manifest import LAYOUTS
from draftcache.store.format.rows import rows_in_reach, teacher_positions
from draftcache.store.format.schema import Conversation
from draftcache.store.format.tap_codecs import LOSSY_MODES, MODES
from draftcache.store.format.teacher import draft_teacher
from draftcache.store.reader import StoreReader
from draftcache.store.writer import StoreWriter
from draftcache.tools.commands import size
from draftcache.tools.reports.sizing import guess_counts
from support.synthetic import DRAFT_VOCAB, LAYERS, TOP_K, VOCAB, conversation, manifest, turns, vocab_map, write_files
from support.tiny_models import make_model

HIDDEN = 256
WINDOW = 300
SHARD_TOKENS = 5000
NANO_30B = {
    "model_type": "nemotron_h", "hidden_size": 2688, "vocab_size": 131072, "num_hidden_layers": 52,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4,
    "chunk_size": 128, "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712, "n_shared_experts": 1, "intermediate_size": 1856,
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
}  # fmt: skip


def masks(conversations: int, seed: int = 0) -> list[NDArray[np.bool_]]:
    """Prompts of very different lengths, one to three turns."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(conversations):
        edges = np.cumsum(rng.integers(20, 900, 2 * int(rng.integers(1, 4))))
        found.append(turns(int(edges[-1]) + 5, *((int(a), int(b)) for a, b in edges.reshape(-1, 2))))
    return found


def write_dataset(output: Path, conversations: int) -> TokenDataset:
    """A prepared dataset of two splits; ids repeat as text does."""
    rng = np.random.default_rng(1)
    drawn = masks(conversations)
    with DatasetWriter(output) as dataset:
        splits = {}
        for name, part in (("train", drawn[: conversations * 3 // 4]), ("val", drawn[conversations * 3 // 4 :])):
            split = dataset.open_splits([name], VOCAB)[name]
            for line, mask in enumerate(part, 1):
                ids = np.minimum(rng.geometric(0.2, mask.size), VOCAB - 1).astype(np.uint32)
                about = (np.void(conversation_hash(ids, mask)), 0, mask.size, mask.size, mask.sum(), line, 0)
                split.append(ids, mask, np.array([about], CONVERSATION_DTYPE))
            split.close()
            splits[name] = {"held_out": False, **split.record()}
        described = {"vocab_size": VOCAB, "tokenizer": {"hash": "t"}, "chat_template": {"hash": "c"}, "splits": splits}
        dataset.commit(described)
    return TokenDataset.open(output)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return write_dataset(tmp_path_factory.mktemp("prepared") / "d", 16)


def write_store(root: Path, dataset: TokenDataset, mode: str, layout: str, shard: NDArray[np.int64]) -> None:
    """What capture would write of the dataset: outlier channels as in real states, the shards as capture fills them."""
    rng = np.random.default_rng(2)
    channels = np.exp(rng.normal(size=HIDDEN)).astype(np.float32)
    scales = ChannelScales(dict.fromkeys(LAYERS, channels))
    items: list[Conversation] = []
    for number, name in enumerate(dataset.splits):
        split = dataset.split(name)
        for index in range(len(split)):
            ids, mask, content_hash = split[index]
            made = conversation(rng, mask, window=WINDOW, number=index, split=number)
            arrays: dict[str, NDArray[Any]] = dict(made.arrays) | {"token_ids": ids}
            arrays["argmax"] = ids[made.arrays["teacher_positions"] + 1]
            for layer in LAYERS:
                states = rng.normal(size=(arrays["positions"].size, HIDDEN)).astype(np.float32) * channels
                arrays[tap_name(layer)] = states if mode == "float32" else float32_to_bf16(states)
            items.append(Conversation(content_hash=content_hash, split=number, dataset_index=index, arrays=arrays))
    described = manifest(
        mode=mode,
        layout=layout,
        window=WINDOW,
        shards=int(shard[-1]) + 1,
        verifier=manifest().verifier | {"hidden_size": HIDDEN},
        channel_scales=scales.to_json() if mode == "int8" else None,
    )
    with StoreWriter(root, described, write_files) as writer:
        for at in range(described.shards):
            writer.write_shard(at, [items[i] for i in np.flatnonzero(shard == at)], {"quarantined": [], "gates": {}})
        writer.finish()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_estimate_against_bytes_on_disk(tmp_path: Path, dataset: TokenDataset, mode: str, layout: str) -> None:
    counts = count_dataset(dataset, WINDOW, SHARD_TOKENS)
    assert counts.shards >= 3
    write_store(tmp_path / "s", dataset, mode, layout, counts.shard)
    teacher = draft_teacher(draft_vocab_size=DRAFT_VOCAB, top_k=TOP_K)
    specs = specs_of(mode, layers=LAYERS, hidden_size=HIDDEN, teacher=teacher)
    found, reader = shard_bytes(counts, specs, layout), StoreReader(tmp_path / "s")
    tolerance = 0.05 if mode == "lossless" else 0.003  # the ratio of high planes is the one real uncertainty
    assert sum(found.values()) == pytest.approx(reader.bytes_on_disk(), rel=tolerance)
    if layout == "zarr":
        for name, spec in specs.items():
            files = [path for path in (tmp_path / "s" / "shards").rglob("*") if path.parent.name == name]
            on_disk = sum(path.stat().st_size for path in files)
            # Digits of a length in zarr.json apart, only compression is uncertain.
            assert found[name] == pytest.approx(on_disk, rel=0.25 if spec.compress else 0.001), name
    counted = counts.to_json()
    assert counted["rows"] == reader.index["rows"].sum() < counted["tokens"] == reader.index["tokens"].sum()
    assert counted["teacher_positions"] == reader.index["teacher_rows"].sum()
    assert counted["loss_tokens"] == reader.index["loss_tokens"].sum()


def test_modes_are_ordered_by_their_bytes(dataset: TokenDataset) -> None:
    """The tolerance above can't hide a mix-up of modes: they lie further apart."""
    counts = count_dataset(dataset, WINDOW, SHARD_TOKENS)
    sizes, teacher = {}, draft_teacher(draft_vocab_size=32000, top_k=64)
    for mode in MODES:
        specs = specs_of(mode, layers=LAYERS, hidden_size=2688, teacher=teacher)
        sizes[mode] = sum(shard_bytes(counts, specs, "zarr").values())
    for mode in LOSSY_MODES:
        assert sizes[mode] < 0.56 * sizes["bf16"]
    assert 1.35 < sizes["bf16"] / sizes["lossless"] < 1.5
    assert sizes["float32"] > 1.9 * sizes["bf16"]


def test_counts_are_those_of_the_masks(dataset: TokenDataset) -> None:
    for window in (WINDOW, None):
        counts = count_dataset(dataset, window, SHARD_TOKENS)
        drawn = masks(16)
        assert "exact" in counts.basis
        assert counts.tokens.tolist() == [mask.size for mask in drawn]
        assert counts.rows.tolist() == [rows_in_reach(mask, window).size for mask in drawn]
        assert counts.teacher.tolist() == [teacher_positions(mask).size for mask in drawn]


def test_shards_are_filled_as_capture_fills_them(dataset: TokenDataset) -> None:
    from draftcache.capture.job.work_plan import plan_shards

    for shard_tokens in (1, 700, SHARD_TOKENS, 1 << 30):
        counts = count_dataset(dataset, None, shard_tokens)
        plan = plan_shards(dataset, dataset.splits, shard_tokens)
        assert counts.shards == len(plan)
        assert np.bincount(counts.shard).tolist() == [item.last - item.first for item in plan]


def test_guess_keeps_the_sums() -> None:
    counts = guess_counts(1_000_003, 0.25, 4096, 65_536).to_json()
    assert (counts["tokens"], counts["rows"], counts["conversations"]) == (1_000_003, 1_000_003, 244)
    assert counts["loss_tokens"] == counts["teacher_positions"] == 250_001
    assert "upper bounds" in counts["basis"]


def test_frozen_bytes(tmp_path: Path) -> None:
    hidden, vocab, draft = 64, VOCAB, DRAFT_VOCAB
    tensors = {"embed_tokens": (vocab, hidden), "norm": (hidden,), "lm_head": (draft, hidden)}
    save_file({name: np.zeros(shape, np.uint16) for name, shape in tensors.items()}, tmp_path / "frozen.safetensors")
    vocab_map().save(tmp_path / "map.safetensors")
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 0 < on_disk - frozen_bytes(hidden, vocab, [draft]) < 1024  # the two headers
    save_file({name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, tmp_path / "frozen.safetensors")
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 0 < on_disk - frozen_bytes(hidden, vocab, [draft], "float32") < 1024


def test_flops_of_the_30b_verifier() -> None:
    """Against figures worked out by hand: 5.75 G body, .08 G scan, 49,152 per token of length, .70 G head."""
    flops = verifier_flops(NANO_30B)
    assert flops is not None
    assert flops.body == pytest.approx(5.83e9, rel=0.005)
    assert flops.per_key * len(flops.windows) / 2 == 49_152
    assert flops.head == pytest.approx(0.7046e9, rel=0.001)
    lengths = np.array([32768.0])
    assert flops.total(lengths, 32768) / 32768 == pytest.approx(8.1e9, rel=0.01)
    names = {"M": "linear_attention", "E": "moe", "*": "full_attention"}
    listed = {**NANO_30B, "layers_block_type": [names[kind] for kind in str(NANO_30B["hybrid_override_pattern"])]}
    assert verifier_flops(listed) == flops


def test_flops_of_llama_are_those_that_torch_counts() -> None:
    model = make_model("llama")
    model.set_attn_implementation("eager")  # torch does not count what its fused attention does on a CPU
    flops = verifier_flops(model.config.to_dict())
    assert flops is not None
    length = 96
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    # torch counts the masked half of the attention too.
    masked = flops.per_key * len(flops.windows) * length**2 / 2
    assert flops.total(np.array([float(length)]), length) + masked == counter.get_total_flops()


def test_flops_of_windows_experts_and_unknown_kinds() -> None:
    dense = {
        "model_type": "qwen3_moe", "hidden_size": 8, "vocab_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 16,
    }  # fmt: skip
    plain = verifier_flops(dense)
    routed = verifier_flops(
        dense | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "mlp_only_layers": [0]}
    )
    assert plain is not None
    assert routed is not None
    assert plain.body - routed.body == 6 * 8 * 16 - (6 * 8 * 2 * 6 + 2 * 8 * 4)
    windowed = verifier_flops(dense | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 10})
    assert windowed is not None
    lengths = np.array([100.0])
    saved = plain.total(lengths, 0) - windowed.total(lengths, 0)
    assert saved == plain.per_key * (100**2 / 2 - (10**2 / 2 + 90 * 10))
    assert verifier_flops(dense | {"model_type": "deepseek_v3"}) is None
    assert verifier_flops({"model_type": "llama"}) is None
    assert verifier_flops({}) is None


def run(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    size.add_arguments(parser)
    return size.run(parser.parse_args(flags))


@pytest.fixture
def verifier(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(NANO_30B))
    return tmp_path


GUESS = ("--tokens", "453.5e6", "--loss-fraction", "0.64", "--mean-length", "32768")


def test_the_published_sizes(verifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """453.5 M tokens at 32k: bf16 7.4 TB, lossless 5.1 TB, int8 3.8 TB, the others' formats 9.8 TB."""
    assert run(*GUESS, "--verifier", str(verifier), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["modes"]) == list(MODES)
    for mode, terabytes in (("bf16", 7.4), ("lossless", 5.1), ("int8", 3.8)):
        assert found["modes"][mode]["bytes"] / 1e12 == pytest.approx(terabytes, rel=0.015)
    assert found["peers"]["SpecForge"]["bytes_per_token"] == 21_520
    assert found["peers"]["speculators"]["bytes_per_token"] == 21_512
    assert found["peers"]["SpecForge"]["bytes"] / 1e12 == pytest.approx(9.8, rel=0.01)
    compute = found["compute"]
    assert "ESTIMATE for one H100" in compute["basis"]
    assert 64_000 < compute["tokens_per_second"] < 72_000
    assert compute["floor_seconds"] == pytest.approx(compute["seconds"] * 0.69)
    for row in found["modes"].values():
        assert row["write_seconds"] == pytest.approx(row["bytes"] / 1e9)
        assert row["wall_seconds"] == max(row["write_seconds"], compute["seconds"])
        assert row["limit"] == ("compute" if compute["seconds"] > row["write_seconds"] else "writing")


@pytest.mark.parametrize("layers", [(1, 5, 51), (1, 5, 19, 29, 51), (1, 5, 19, 29, 41, 51)])
def test_each_tap_adds_its_bytes(verifier: Path, layers: tuple[int, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """bf16: 2 x 2688 bytes for each tap of each row, and 178 of the rest at this share of loss."""
    every = ("--tokens", "1e6", "--loss-fraction", "0.64", "--mean-length", "32768", "--verifier", str(verifier))
    assert run(*every, "--layers", ",".join(map(str, layers)), "--mode", "bf16", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["layers"] == list(layers)
    (mode,) = found["modes"].values()
    taps = {name: size for name, size in mode["arrays"].items() if name.startswith("tap_")}
    assert list(taps) == [f"tap_{layer}" for layer in layers]
    rows = found["counts"]["rows"]
    assert all(size == pytest.approx(2 * 2688 * rows, rel=0.005) for size in taps.values())
    assert mode["bytes_per_token"] == pytest.approx((len(layers) * 2 * 2688 * rows) / 1e6 + 178, rel=0.005)
    assert found["peers"]["SpecForge"]["bytes_per_token"] == (len(layers) + 1) * 2 * 2688 + 16


def test_tables(verifier: Path, dataset: TokenDataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*GUESS, "--verifier", str(verifier), "--gpu", "a100") == 0
    printed = capsys.readouterr().out
    for part in ("every row in reach", "ESTIMATE for one A100", "SpecForge", "7.40 TB", "877.07 MB of frozen weights"):
        assert part in printed
    rate = ("--tokens-per-second", "1000", "--disk-gb-s", "0.001")
    assert run("--dataset", str(dataset.path), "--hidden-size", "256", "--mode", "int8", *rate) == 0
    printed = capsys.readouterr().out
    assert "counts: exact" in printed
    assert "at 1,000 tok/s; the rate given" in printed
    assert "bf16" not in printed
    assert run("--tokens", "1e6", "--loss-fraction", "0.5", "--hidden-size", "256") == 0
    printed = capsys.readouterr().out
    assert "give --tokens-per-second" in printed
    assert "without frozen weights" in printed


def test_wrong_settings_are_refused(verifier: Path, tmp_path: Path) -> None:
    guess = ("--tokens", "1e6", "--loss-fraction", "0.5")
    for flags, said in (
        (("--tokens", "1e6", "--hidden-size", "8"), "--loss-fraction beside it"),
        ((*guess, "--verifier", str(verifier), "--layers", "2,52"), r"blocks 0 to 51 .* found \[2, 52\]"),
        ((*guess, "--hidden-size", "8", "--layers", "3,2"), "ascending"),
        ((*guess, "--hidden-size", "0"), "--hidden-size: expected at least 1"),
        ((*guess, "--hidden-size", "8", "--mode", "int4"), "--mode: expected one of"),
        (
            (*guess, "--hidden-size", "8", "--top-k", "99", "--draft-vocab-size", "50"),
            "at most the draft vocabulary's 50",
        ),
        ((*guess, "--hidden-size", "8", "--disk-gb-s", "0"), "--disk-gb-s: expected a rate above 0"),
        ((*guess, "--hidden-size", "8", "--shard-tokens", "0"), "--shard-tokens: expected at least 1"),
        (("--tokens", "1e6", "--loss-fraction", "1.5", "--hidden-size", "8"), "--loss-fraction in 0 .. 1"),
        (("--dataset", str(tmp_path / "none"), "--hidden-size", "8"), "expected a prepared dataset"),
        ((*guess, "--verifier", str(tmp_path / "none")), "expected a JSON file"),
    ):
        with pytest.raises(InputError, match=said):
            run(*flags)
