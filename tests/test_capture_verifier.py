"""Finding the parts of a verifier, the fp32 contract, the teacher signal and the gates, on real small models."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftcache.capture.job.gates import Gates, gate_statistics
from draftcache.capture.verifier.load import describe_verifier, find_modules, load_verifier
from draftcache.capture.verifier.self_check import self_check
from draftcache.capture.verifier.ssm_precision import (
    DT_LIMIT,
    assert_dt_limit,
    enforce_contract,
    mamba_mixers,
    require_canary,
    run_canary,
    scan_implementation,
)
from draftcache.capture.verifier.weights import full_weights_hash, weights_fingerprint
from draftcache.store.common.errors import GateError, InputError, PrecisionError
from draftcache.store.format.norm_band import NormBand
from support.tiny_models import KINDS, VOCAB, make_model, save_model

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def load(path: Path) -> Any:
    return load_verifier(path, device=CPU, dtype=torch.float32, trust_remote_code=False)


@pytest.mark.parametrize("kind", KINDS)
def test_taps_are_block_outputs_and_final_is_after_the_norm(tmp_path: Path, kind: str) -> None:
    verifier = load(save_model(tmp_path, kind))
    ids = torch.randint(0, VOCAB, (37,), generator=torch.Generator().manual_seed(1))
    layers = (0, 2, len(verifier.blocks) - 1)
    states = verifier.forward(ids, layers)
    with torch.inference_mode():
        reference = verifier.model(input_ids=ids[None], output_hidden_states=True, use_cache=False)
    for layer in layers[:-1]:
        torch.testing.assert_close(states.taps[layer], reference.hidden_states[layer + 1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states.final, reference.hidden_states[-1][0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(states.taps[layers[-1]], states.final)  # the last block's output is before the norm
    torch.testing.assert_close(verifier.head(states.final), reference.logits[0])
    assert max(self_check(verifier, (0, 2), ids).values()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_description_tells_fine_tunes_apart(tmp_path: Path, kind: str) -> None:
    path = save_model(tmp_path, kind)
    before = describe_verifier(path, load(path))
    assert before["vocab_size"] == VOCAB
    tensors = load_file(path / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert weights_fingerprint(path) != before["weights_hash"]


def test_models_without_the_needed_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        load(tmp_path)
    model = make_model("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(InputError, match="linear head"):
        find_modules(model, CPU)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(InputError, match="could not be loaded"):
        load(tmp_path)


def _without_layer(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".layers.3." in name]:
        del tensors[name]


def _other_prefix(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[f"language.{name}"] = tensors.pop(name)


def _more_blocks(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["num_hidden_layers"] += 1


def _other_shape(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = torch.ones(48)


def _quantized(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.down_proj.weight_scale"] = torch.full((1,), 1e-9)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda tensors, _: tensors.pop("lm_head.weight"), "no file holds: lm_head.weight"),
        (_without_layer, r"no file holds: model.layers.3.input_layernorm.weight, .* and 3 more"),
        (_other_prefix, r"no file holds: .*no place for: language.lm_head.weight"),
        (_more_blocks, r"no file holds: model.layers.4."),
        (_other_shape, r"other shapes: model.norm.weight \(file \[48\], model \[32\]\)"),
        (_quantized, r"no place for: model.layers.0.mlp.down_proj.weight_scale"),
    ],
)
def test_weights_that_did_not_reach_the_model_are_refused_by_name(
    tmp_path: Path, damage: Callable[[dict[str, Tensor], dict[str, Any]], object], named: str
) -> None:
    path = save_model(tmp_path, "llama")
    load(path)  # negative control: the whole directory loads
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=named):
        load(path)


def test_tied_embeddings_are_no_missing_head(tmp_path: Path) -> None:
    model = make_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    verifier = load(tmp_path)
    assert torch.equal(verifier.head.weight, verifier.embeddings.weight)


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"model_type": 7}', '{"model_type": "llama", "hidden_size": "wide"}', ""]
)
def test_a_config_of_any_content_is_refused_by_its_path(tmp_path: Path, text: str) -> None:
    path = save_model(tmp_path, "llama")
    (path / "config.json").write_text(text)
    with pytest.raises(InputError, match=str(path)):
        load(path)


def test_weight_files_that_are_cut_short_are_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path, "llama")
    weights = path / "model.safetensors"
    for size in (0, 7, 100, weights.stat().st_size - 1):
        os.truncate(weights, size)
        with pytest.raises(InputError, match="could not be loaded"):
            load(path)
        with pytest.raises(InputError, match="expected a safetensors file"):
            weights_fingerprint(path)


def test_the_fingerprint_sees_a_change_of_any_small_tensor(tmp_path: Path) -> None:
    """The large tensor lies where evenly spaced samples of the file would fall; only the small ones change."""
    large = torch.zeros(24 << 20, dtype=torch.uint8)
    small = {f"norm.{number}": torch.ones(3) for number in range(8)}
    save_file(small | {"large": large}, tmp_path / "model.safetensors")
    before, full = weights_fingerprint(tmp_path), full_weights_hash(tmp_path)
    for name in small:
        save_file(small | {name: torch.full((3,), 2.0), "large": large}, tmp_path / "model.safetensors")
        assert weights_fingerprint(tmp_path) != before
    changed = large.clone()
    changed[3 << 20] = 1  # between samples: only the full hash sees it
    save_file(small | {"large": changed}, tmp_path / "model.safetensors")
    assert weights_fingerprint(tmp_path) == before
    assert full_weights_hash(tmp_path) != full


def test_contract_lifts_the_dt_limit_and_records_the_canary(tmp_path: Path) -> None:
    path = save_model(tmp_path, "nemotron_h")
    verifier = load(path)
    mixers = mamba_mixers(verifier.model)
    assert len(mixers) == 2
    assert mixers[0].time_step_limit != DT_LIMIT
    with pytest.raises(PrecisionError, match="expected dt limit"):
        assert_dt_limit(mixers)
    contract = enforce_contract(verifier.model, path, allow_fallback=False)
    assert contract is not None
    assert all(mixer.time_step_limit == DT_LIMIT for mixer in mixers)
    assert contract["canary_min"] == contract["canary_max"] == 264.0
    assert contract["carry_dtype"] == "float32"
    assert contract["scan"] == scan_implementation(mixers[0])
    assert enforce_contract(make_model("llama"), path, allow_fallback=False) is None


def test_dt_limit_matters(tmp_path: Path) -> None:
    """Negative control: with small time steps, the clamp that is lifted here changes the states."""
    path = save_model(tmp_path, "nemotron_h")
    verifier = load(path)
    with torch.no_grad():
        for mixer in mamba_mixers(verifier.model):
            mixer.dt_bias.fill_(-12.0)
    ids = torch.arange(40)
    clamped = verifier.forward(ids, (2,)).taps[2]
    enforce_contract(verifier.model, path, allow_fallback=False)
    assert not torch.allclose(verifier.forward(ids, (2,)).taps[2], clamped, rtol=1e-3)


def test_bf16_carry_fails_the_canary() -> None:
    model = make_model("nemotron_h")
    result = run_canary(model, carry_dtype=torch.bfloat16)
    assert result["canary_max"] == 256.0
    with pytest.raises(PrecisionError, match=r"ends at 264\.0"):
        require_canary(result)
    require_canary(run_canary(model))


def test_fp32_parameters_survive_a_bf16_load(tmp_path: Path) -> None:
    path = save_model(tmp_path, "nemotron_h")
    tensors = load_file(path / "model.safetensors")
    exact = {name: value + 1e-4 for name, value in tensors.items() if name.endswith(("A_log", "dt_bias", ".D"))}
    rest = {name: value.to(torch.bfloat16) for name, value in tensors.items() if name not in exact}
    save_file(rest | exact, path / "model.safetensors", metadata={"format": "pt"})
    verifier = load_verifier(path, device=CPU, dtype=torch.bfloat16, trust_remote_code=False)
    contract = enforce_contract(verifier.model, path, allow_fallback=False)
    assert contract is not None
    assert contract["fp32_parameters"] == ["A_log", "D", "dt_bias"]
    mixer = mamba_mixers(verifier.model)[0]
    name = next(name for name, value in verifier.model.named_parameters() if value is mixer.A_log)
    assert mixer.A_log.dtype == torch.float32
    stored = exact.get(name, exact.get(name.replace("model.", "backbone.", 1)))
    assert stored is not None
    assert torch.equal(mixer.A_log, stored)


def taps(scale: float = 1.0) -> dict[int, torch.Tensor]:
    return {layer: scale * torch.randn(20, 8, generator=torch.Generator().manual_seed(layer)) for layer in (1, 4)}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda t: t[1].fill_(math.nan), "tap 1: expected finite"),
        (lambda t: t[4].__setitem__((3, 2), math.inf), "tap 4: expected finite"),
        (lambda t: t[4].__setitem__(5, 0.0), "tap 4: expected non-zero rows"),
        (lambda t: t[4].copy_(t[1]), "taps 1 and 4: expected different states"),
    ],
)
def test_each_gate_fires(break_it: Any, message: str) -> None:
    broken = taps()
    break_it(broken)
    with pytest.raises(GateError, match=message):
        Gates((1, 4)).check(broken, torch.ones(3, 8))


def test_final_state_and_norm_band_gates() -> None:
    gates = Gates((1, 4))
    with pytest.raises(GateError, match="final state"):
        gates.check(taps(), torch.zeros(3, 8))
    for _ in range(20):
        gates.check(taps(), torch.ones(3, 8))
    banded = Gates((1, 4), gates.norms)
    banded.check(taps(2.0), torch.ones(3, 8))
    with pytest.raises(GateError, match="tap 1: expected a typical rms of its rows between"):
        banded.check(taps(50.0), torch.ones(3, 8))


def with_massive_first_row(rows: int, seed: int) -> dict[int, torch.Tensor]:
    """As trained models' states are: the first token's are 150 times the others."""
    states = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
    states[0] *= 150
    return {1: states, 4: 2 * states}


def test_norms_do_not_depend_on_a_conversations_length() -> None:
    """Pooled squares do, and would have set the short one aside: the negative control."""
    gates, pooled = Gates((1, 4)), NormBand()
    for number in range(40):
        states = with_massive_first_row(4000 + 700 * number, number)
        gates.check(states, torch.ones(3, 8))
        pooled.add(math.log(float(states[1].pow(2).mean().sqrt())))
    banded, short = Gates((1, 4), gates.norms), with_massive_first_row(30, 99)
    banded.check(short, torch.ones(3, 8))
    low, high = pooled.limits() or (0.0, 0.0)
    assert not low <= math.log(float(short[1].pow(2).mean().sqrt())) <= high
    for scale in (5.0, 0.2):  # what is wrong is seen at every length
        for states in (short, with_massive_first_row(9000, 98)):
            with pytest.raises(GateError, match="typical rms"):
                banded.check({layer: scale * tap for layer, tap in states.items()}, torch.ones(3, 8))


def test_pieces_statistics_add_up() -> None:
    states, final = with_massive_first_row(500, 3), torch.randn(500, 8)
    parts = [slice(0, 120), slice(120, 121), slice(121, 500)]
    whole = gate_statistics(states, final)
    sums = sum(gate_statistics({layer: tap[rows] for layer, tap in states.items()}, final[rows]) for rows in parts)
    torch.testing.assert_close(sums, whole, rtol=1e-5, atol=1e-3)
