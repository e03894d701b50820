"""Loading straight to a device: what goes there, what is made in host memory, and how its errors look.

The meta device stands in for a GPU here; `test_gpu_loading` has the values on a real one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from draftcache.capture.verifier import load, streaming
from draftcache.store.common.errors import InputError
from support.tiny_models import save_model

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("streaming") / "llama", "llama")


def loaded(path: Path, context: AbstractContextManager[Any]) -> Any:
    with context:
        return AutoModelForCausalLM.from_pretrained(path, device_map={"": "meta"})


def test_weights_go_to_the_device_and_the_rest_is_made_in_host_memory(llama: Path) -> None:
    method = getattr(PreTrainedModel, streaming._MAKES_THE_REST)
    model = loaded(llama, streaming.streaming(META))
    expected = AutoModelForCausalLM.from_pretrained(llama)
    assert {parameter.device for parameter in model.parameters()} == {META}
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(expected.named_buffers()).keys() != set()
    for name, value in expected.named_buffers():
        assert torch.equal(buffers[name], value), name
    assert getattr(PreTrainedModel, streaming._MAKES_THE_REST) is method


def test_without_it_the_rest_is_made_on_the_device(llama: Path) -> None:
    """The negative control of the test above."""
    assert {buffer.device for buffer in loaded(llama, nullcontext()).buffers()} == {META}


@pytest.mark.parametrize("kind", ["llama", "nemotron_h"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_values_either_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    path = save_model(tmp_path / "model", kind)
    models = []
    for streams in (False, True):
        monkeypatch.setattr(load, "can_stream", lambda _device, streams=streams: streams)
        found = load.load_verifier(path, device=CPU, dtype=dtype, trust_remote_code=False)
        models.append(dict([*found.model.named_parameters(), *found.model.named_buffers()]))
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        assert value.dtype == models[1][name].dtype, name
        assert torch.equal(value, models[1][name]), name


def test_missing_and_misshapen_weights_are_refused_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(tmp_path / "model", "llama")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    messages = []
    for streams in (False, True):
        monkeypatch.setattr(load, "can_stream", lambda _device, streams=streams: streams)
        with pytest.raises(InputError, match=r"no file holds: model\.layers\.1\.mlp\.up_proj\.weight") as refused:
            load.load_verifier(path, device=CPU, dtype=torch.float32, trust_remote_code=False)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
    assert "model.norm.weight (file [7], model [32])" in messages[0]


def test_a_full_gpu_is_told_from_a_conversion_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter((2, 3))
    monkeypatch.setattr(streaming, "_out_of_memory_errors", lambda _device: next(counts))
    with pytest.raises(torch.OutOfMemoryError, match="cpu: out of memory"), streaming.streaming(CPU):
        raise RuntimeError("We encountered some issues during automatic conversion of the weights.")
    monkeypatch.setattr(streaming, "_out_of_memory_errors", lambda _device: 2)
    with pytest.raises(RuntimeError, match="automatic conversion"), streaming.streaming(CPU):
        raise RuntimeError("We encountered some issues during automatic conversion of the weights.")


def test_only_gpus_are_streamed_to(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 1)
    assert streaming.can_stream(cuda)
    assert not streaming.can_stream(CPU)
    monkeypatch.setattr(streaming, "find_spec", lambda _name: None)
    assert not streaming.can_stream(cuda)
    monkeypatch.undo()
    monkeypatch.setattr(streaming, "_MAKES_THE_REST", "_no_longer_there")
    assert not streaming.can_stream(cuda)
