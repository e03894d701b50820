"""Quantised checkpoints: read as what they are, or refused in one line that says what to do; never read as plain."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from draftcache.capture.verifier import quantization
from draftcache.capture.verifier.load import Verifier, find_modules, load_verifier
from draftcache.capture.verifier.quantization import is_quantised
from draftcache.capture.verifier.self_check import self_check
from draftcache.store.common.errors import InputError
from draftcache.tools.bench.parts.random_dataset import write_random_dataset
from draftcache.tools.cli import main
from support.tiny_models import make_model

CPU = torch.device("cpu")
BLOCK = 128
IDS = torch.arange(64) % 250
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in float32 whose matrices have whole blocks of 128."""
    path = tmp_path_factory.mktemp("quantised") / "plain"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=BLOCK, intermediate_size=2 * BLOCK, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(path: Path) -> Verifier:
    return load_verifier(path, device=CPU, dtype=torch.float32, trust_remote_code=False)


def quantised(plain: Path, path: Path, method: dict[str, Any] | None, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of `plain` whose config.json names `method`, and whose tensors `change` makes of the plain ones."""
    shutil.copytree(plain, path)
    tensors = change(load_file(path / "model.safetensors"))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    if method is not None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    return path


def blocks_of(weight: torch.Tensor) -> torch.Tensor:
    """[O, I] as [O / 128, 128, I / 128, 128]."""
    rows, columns = weight.shape
    return weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)


def to_fp8(tensors: Tensors, *, scales: str | None = "_scale_inv") -> Tensors:
    """Matrices of the blocks in float8 with a scale per 128 x 128, under the weight's name with `scales` behind it."""
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        parts = blocks_of(tensors[name])
        scale = parts.abs().amax((1, 3)) / 448
        found[name] = (parts / scale[:, None, :, None]).view(tensors[name].shape).to(torch.float8_e4m3fn)
        if scales is not None:
            found[name + scales] = scale
    return found


def from_fp8(tensors: Tensors) -> Tensors:
    """What the float8 codes with their scales mean, by the definition of the format."""
    found = {name: value for name, value in tensors.items() if not name.endswith("_scale_inv")}
    for name in [name for name in found if name + "_scale_inv" in tensors]:
        parts = blocks_of(found[name].float()) * tensors[name + "_scale_inv"][:, None, :, None]
        found[name] = parts.view(found[name].shape)
    return found


def to_nvfp4(tensors: Tensors) -> Tensors:
    """Two codes in a byte and a scale per 16, as ModelOpt writes them."""
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        rows, columns = tensors[name].shape
        found[name] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        found[name + "_scale"] = torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)
        found[name + "_scale_2"] = torch.tensor(1.0)
    return found


def test_fp8_with_scales_is_dequantised_on_a_cpu(plain: Path, tmp_path: Path) -> None:
    path = quantised(plain, tmp_path / "fp8", FP8, to_fp8)
    verifier = load(path)
    assert max(self_check(verifier, (0, 1), IDS).values()) < 1e-3
    assert not is_quantised(verifier.model)
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    unquantised = verifier.model(input_ids=IDS[None]).logits - expected(input_ids=IDS[None]).logits
    expected.load_state_dict(from_fp8(load_file(path / "model.safetensors")))
    with torch.inference_mode():
        states = expected(input_ids=IDS[None], output_hidden_states=True).hidden_states
    assert torch.allclose(verifier.forward(IDS, (0,)).taps[0], states[1][0], atol=1e-5)
    assert unquantised.abs().max() > 1e-3  # it is the quantised model that runs


@pytest.mark.parametrize("scales", ["_scale_inv", None])
def test_codes_that_no_configuration_explains_are_never_read_as_weights(
    plain: Path, tmp_path: Path, scales: str | None
) -> None:
    path = quantised(plain, tmp_path / "codes", None, lambda tensors: to_fp8(tensors, scales=scales))
    with pytest.raises(InputError, match=r"names no quantisation, found model\.layers.* in F8_E4M3: restore"):
        load(path)


@pytest.mark.parametrize(
    ("algorithm", "change"), [("FP8", lambda tensors: to_fp8(tensors, scales="_scale")), ("NVFP4", to_nvfp4)]
)
@pytest.mark.parametrize("named_in", ["config.json", "hf_quant_config.json"])
def test_modelopts_formats_are_refused_with_what_works(
    plain: Path, tmp_path: Path, algorithm: str, change: Callable[[Tensors], Tensors], named_in: str
) -> None:
    method = {"quant_method": "modelopt", "quant_algo": algorithm} if named_in == "config.json" else None
    path = quantised(plain, tmp_path / "modelopt", method, change)
    if method is None:
        (path / named_in).write_text(json.dumps({"quantization": {"quant_algo": algorithm}}))
    with pytest.raises(InputError, match=f"quantised by ModelOpt to {algorithm}, .*capture the checkpoint that was"):
        load(path)


@pytest.mark.parametrize(
    ("method", "packages"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptqmodel optimum"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
    ],
)
def test_a_package_that_is_missing_is_named(
    plain: Path, tmp_path: Path, method: dict[str, Any], packages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"accelerate"}
    monkeypatch.setattr(quantization, "find_spec", lambda module: module if module in there else None)
    path = quantised(plain, tmp_path / "packed", method, dict)
    with pytest.raises(InputError, match=f"weights quantised by .* need .*: pip install {packages}$"):
        load(path)


@pytest.mark.parametrize("method", [{"quant_method": "of_tomorrow"}, {"bits": 4}])
def test_a_method_that_transformers_would_skip_is_refused(plain: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected a quant_method that transformers can load"):
        load(quantised(plain, tmp_path / "unknown", method, dict))


def test_the_command_ends_in_one_line(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = write_random_dataset(tmp_path / "p", (24, 20), ids=(8, 240), vocab_size=256, draft_vocab_size=64)
    path = quantised(plain, tmp_path / "nvfp4", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, to_nvfp4)
    words = ["--verifier", str(path), "--dataset", str(prepared), "--output", str(tmp_path / "s"), "--layers", "0,1"]
    assert main(["capture", *words, "--device", "cpu", "--top-k", "4"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "quantised by ModelOpt to NVFP4" in error
    assert not (tmp_path / "s").exists()


def test_our_own_forward_does_not_read_quantised_weights() -> None:
    model = make_model("nemotron_h")
    assert find_modules(model, CPU).body_forward.name == "draftcache"
    mixer = next(block.mixer for block in model.model.layers if hasattr(block.mixer, "in_proj"))
    mixer.in_proj.weight.requires_grad_(False)
    mixer.in_proj.weight.data = mixer.in_proj.weight.data.to(torch.float8_e4m3fn)
    forward = find_modules(model, CPU).body_forward
    assert forward.name == "transformers"
    assert forward.implementations()["reason"] == "NemotronHForCausalLM has quantised weights"


@pytest.mark.parametrize("part", ["head", "embeddings"])
def test_a_quantised_head_or_table_is_refused(part: str) -> None:
    model = make_model("llama")
    module = model.lm_head if part == "head" else model.model.embed_tokens
    module.weight = torch.nn.Parameter(module.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(InputError, match=f"expected its {part} in float32, bfloat16 or float16, found torch.float8"):
        find_modules(model, CPU)
