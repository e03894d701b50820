"""Loading a verifier to a GPU: the values of a model loaded in host memory, and no host memory for the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, NemotronHConfig

from draftcache.capture.verifier import load
from draftcache.tools.bench.parts.scale_checkpoint import write_checkpoint
from draftcache.tools.bench.parts.scale_load import WAYS, load_metrics
from support.paths import DEMO
from support.tiny_models import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def tied_llama(path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=640, hidden_size=256, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, rope_theta=500_000.0, bos_token_id=0, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["tied", "llama", "nemotron_h", "demo"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_value_is_that_of_a_model_loaded_in_host_memory(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    path = tmp_path / "model"
    if kind == "demo":
        path = DEMO
    elif kind == "tied":
        tied_llama(path)
    else:
        make_model(kind).save_pretrained(path)
    assert load.can_stream(CUDA)
    there = load.load_verifier(path, device=CUDA, dtype=dtype, trust_remote_code=False).model
    here = load.load_verifier(path, device=CPU, dtype=dtype, trust_remote_code=False).model
    for found, expected in (
        (dict(there.named_parameters()), dict(here.named_parameters())),
        (dict(there.named_buffers()), dict(here.named_buffers())),
    ):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].device == CUDA, name
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name].cpu(), value), name
    if kind == "tied":
        assert there.lm_head.weight is there.model.embed_tokens.weight


def test_loading_takes_no_host_memory_for_the_weights(tmp_path: Path) -> None:
    """Experts are merged while they are loaded, which the former way did in host memory: the negative control."""
    config = NemotronHConfig(
        vocab_size=32_000, hidden_size=1024, hybrid_override_pattern="MEEEE*", num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, mamba_num_heads=16, mamba_head_dim=64, ssm_state_size=128, n_groups=8,
        n_routed_experts=32, num_experts_per_tok=2, moe_intermediate_size=2048, intermediate_size=2048, n_group=1,
        moe_shared_expert_intermediate_size=2048, topk_group=1,
    )  # fmt: skip
    size = write_checkpoint(tmp_path / "model", config, "cuda:0", file_bytes=256 << 20)
    assert size > 1e9
    found = {way: load_metrics(tmp_path / "model", ["cuda:0"], size, way)["host_gb"] for way in WAYS}
    print("GB of private host memory by way:", found, "of weights:", size / 1e9)
    assert found["as-it-is"] < 0.3 * size / 1e9
    assert found["through-host"] > 0.7 * size / 1e9
