"""Rotary embeddings that choose by the length of a call are pinned to what an engine serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.verifier.load import describe_verifier, load_verifier
from draftcache.capture.verifier.rope import pin_rope
from draftcache.store.common.errors import InputError
from draftcache.store.reader import StoreReader
from draftcache.tools.bench.parts.random_dataset import write_random_dataset
from draftcache.tools.cli import main

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(0))


def phi3(served: int = 128) -> Any:
    torch.manual_seed(0)
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 3.0, 6.0, 12.0]}
    config = Phi3Config(
        **SIZES,
        max_position_embeddings=served,
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )
    return Phi3ForCausalLM(config).eval()


def dynamic() -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64, rope_parameters=rope)).eval()


@torch.inference_mode()
def states(model: Any, *rows: torch.Tensor) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    batch = torch.stack([torch.cat([row, row.new_zeros(longest - len(row))]) for row in rows])
    return model.model(input_ids=batch, use_cache=False).last_hidden_state[0, : len(rows[0])]  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [phi3, dynamic])
def test_a_short_row_does_not_depend_on_its_neighbours_once_pinned(make: Any) -> None:
    long = torch.cat([IDS, IDS, IDS])
    unpinned = make()
    assert (states(unpinned, IDS) - states(unpinned, IDS, long)).abs().max() > 1e-3  # the fault
    pinned = make()
    assert pin_rope(pinned) is not None
    assert torch.allclose(states(pinned, IDS), states(pinned, IDS, long), atol=1e-6)


def test_longrope_takes_the_long_factors_that_an_engine_takes() -> None:
    pinned, long = phi3(), torch.cat([IDS, IDS])
    pin_rope(pinned)
    assert torch.allclose(states(pinned, IDS), states(phi3(), long)[: len(IDS)], atol=1e-6)
    assert (states(pinned, IDS) - states(phi3(), IDS)).abs().max() > 1e-3


def test_a_served_length_within_the_original_one_needs_no_pin() -> None:
    assert pin_rope(phi3(served=64)) is None


def test_the_served_length_chooses_the_factors() -> None:
    """A model for 128 tokens that is served with 64 has the short factors, as an engine with --max-model-len 64."""
    short, long = phi3(), phi3()
    assert pin_rope(short, 64) == "longrope, short factors (served length 64 <= 64)"
    assert pin_rope(long, 65) == "longrope, long factors (served length 65 > 64)"
    assert torch.equal(states(short, IDS), states(phi3(), IDS))
    assert (states(long, IDS) - states(short, IDS)).abs().max() > 1e-3
    assert pin_rope(dynamic(), 32) == pin_rope(dynamic()) == "dynamic NTK, at length 256"


def test_the_served_length_is_recorded_and_bounds_conversations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phi3().save_pretrained(tmp_path / "model")
    dataset = write_random_dataset(tmp_path / "p", (60, 24), ids=(8, 120), vocab_size=128, draft_vocab_size=64)
    words = ["capture", "--verifier", str(tmp_path / "model"), "--dataset", str(dataset), "--layers", "0,1"]
    words += ["--output", str(tmp_path / "s"), "--device", "cpu", "--top-k", "4"]
    assert main([*words, "--max-model-len", "59"]) == 2
    assert "at most the 59 tokens of --max-model-len, found one of 60" in capsys.readouterr().err
    assert main([*words, "--max-model-len", "64"]) == 0
    manifest = StoreReader(str(tmp_path / "s")).manifest
    assert manifest.verifier["rope"] == "longrope, short factors (served length 64 <= 64)"
    assert manifest.provenance["max_model_len"] == 64
    assert main(words) == 2  # another length, other states
    assert "longrope, long factors" in capsys.readouterr().err
    with pytest.raises(InputError, match="--max-model-len: expected at least 1, found 0"):
        CaptureConfig(verifier=tmp_path, dataset=tmp_path, output=tmp_path / "s", max_model_len=0)


def test_dynamic_scaling_is_that_of_the_longest_served_length() -> None:
    pinned = dynamic()
    assert pin_rope(pinned) == "dynamic NTK, at length 256"
    whole = torch.cat([IDS] * 7)[:256]
    assert torch.allclose(states(pinned, IDS), states(dynamic(), whole)[: len(IDS)], atol=1e-6)


def test_the_pin_is_recorded(tmp_path: Path) -> None:
    phi3().save_pretrained(tmp_path)
    verifier = load_verifier(tmp_path, device=CPU, dtype=torch.float32, trust_remote_code=False)
    assert describe_verifier(tmp_path, verifier)["rope"] == "longrope, long factors (served length 128 > 64)"


def test_other_models_are_left_as_they_are() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64)).eval()
    assert pin_rope(model) is None
    assert not model.model.rotary_emb._forward_hooks
