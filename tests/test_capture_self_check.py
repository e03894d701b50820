"""The start-up check: what it refuses, and that depth alone is no reason to refuse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MegatronBertConfig, MegatronBertForCausalLM

from draftcache.capture.verifier.forward import Piece
from draftcache.capture.verifier.load import Verifier, find_modules, load_verifier
from draftcache.capture.verifier.nemotron import forward as nemotron_forward
from draftcache.capture.verifier.self_check import TOKENS, self_check
from draftcache.capture.verifier.ssm_precision import lift_dt_limit, mamba_mixers
from draftcache.store.common.errors import InputError
from draftcache.tools.bench.parts.tiny_verifiers import save_tiny_model
from support.tiny_models import VOCAB, make_model, save_model

CPU = torch.device("cpu")
IDS = torch.randint(3, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1))
DEEP = ("MEM*E" * 10, (2, 26, 48))
"""As many blocks as the 30B verifier has, and its taps."""


def nemotron(pattern: str = "MEM*E", dtype: torch.dtype = torch.float32) -> Verifier:
    model = make_model("nemotron_h", pattern).to(dtype)
    lift_dt_limit(mamba_mixers(model))
    return find_modules(model, CPU)


class Shifted:
    """A forward whose taps are the outputs of the blocks after."""

    name = "shifted"

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def prefill(self, token_ids: torch.Tensor, layers: tuple[int, ...], chunk: int) -> Iterator[Piece]:
        for piece in self._inner.prefill(token_ids, tuple(layer + 1 for layer in layers), chunk):
            yield replace(piece, taps={layer - 1: tap for layer, tap in piece.taps.items()})

    def block_differences(self, token_ids: torch.Tensor) -> list[float]:
        return self._inner.block_differences(token_ids)  # type: ignore[no-any-return]


def test_fifty_blocks_in_bf16_pass_though_they_drift_apart() -> None:
    """A bound on the whole forward that refuses wrong kernels would refuse this one for its rounding."""
    verifier = nemotron(DEEP[0], torch.bfloat16)
    found = self_check(verifier, DEEP[1], IDS)
    assert found["tap_48"] > 0.02 > found["block"] > 0
    assert found["tap_2"] < found["tap_26"] < found["tap_48"]


def test_of_a_model_that_merges_block_outputs_before_its_norm_all_but_the_last_block_are_taken(tmp_path: Path) -> None:
    save_tiny_model("inkling2_text", tmp_path)
    verifier = load_verifier(tmp_path, device=CPU, dtype=torch.float32, trust_remote_code=False)
    ids = IDS % 200 + 8
    self_check(verifier, (0, 2), ids)
    with pytest.raises(InputError, match=r"last block, 3, to be what the model's norm reads.*leave this block out"):
        self_check(verifier, (0, 3), ids)


def test_a_tap_off_by_one_block_is_refused_at_any_depth() -> None:
    verifier = nemotron(DEEP[0], torch.bfloat16)
    for layer in DEEP[1]:
        shifted = replace(verifier, body_forward=Shifted(verifier.body_forward))  # type: ignore[arg-type]
        with pytest.raises(InputError, match=rf"output of block {layer},|tap_{layer}"):
            self_check(shifted, (layer,), IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "wrong", "blocks"),
    [
        ("relu_squared_", lambda values: values.relu_(), "[1, 4]"),
        ("gated_group_norm", lambda values, *_: values, "[0, 2]"),
        ("causal_attention", lambda q, k, v, scale: v.repeat_interleave(2, 1), "[3]"),
    ],
)
def test_a_kernel_that_computes_something_else_is_refused_by_its_blocks(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str, wrong: Any, blocks: str
) -> None:
    verifier = nemotron(dtype=dtype)
    self_check(verifier, (0, 2), IDS)
    monkeypatch.setattr(nemotron_forward, name, wrong)
    with pytest.raises(InputError, match=r"add in every block what the model's own code adds") as caught:
        self_check(verifier, (0, 2), IDS)
    assert f"in blocks {blocks}" in str(caught.value)


@pytest.mark.parametrize("left", [0.0, 1e-4])
def test_a_block_that_adds_nothing_is_no_reason_to_refuse(left: float) -> None:
    verifier = nemotron(dtype=torch.bfloat16)
    with torch.no_grad():
        verifier.blocks[3].mixer.o_proj.weight.mul_(left)  # type: ignore[union-attr]
    self_check(verifier, (2, 3), IDS)


def test_nan_is_refused() -> None:
    verifier = nemotron()
    mixer = verifier.blocks[2].mixer
    with torch.no_grad():
        mixer.out_proj.weight[0, 0] = torch.nan  # type: ignore[index, union-attr]
    with pytest.raises(InputError, match="found nan"):
        self_check(verifier, (0, 2), IDS)


def test_scaled_logits_and_shifted_taps_are_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path, "llama")
    verifier = load_verifier(path, device=CPU, dtype=torch.float32, trust_remote_code=False)
    original = verifier.model.forward

    def scaled(*arguments: Any, **named: Any) -> Any:
        output = original(*arguments, **named)
        output.logits = output.logits * 0.5
        return output

    verifier.model.forward = scaled
    with pytest.raises(InputError, match="logits"):
        self_check(verifier, (1,), IDS)
    verifier.model.forward = original
    with pytest.raises(InputError, match="tap_1"):
        self_check(replace(verifier, body_forward=Shifted(verifier.body_forward)), (1,), IDS)  # type: ignore[arg-type]


def test_blocks_that_do_not_return_the_residual_stream_are_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path, "llama")
    verifier = load_verifier(path, device=CPU, dtype=torch.float32, trust_remote_code=False)
    inner = verifier.blocks[1].forward

    def delta(hidden: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        return inner(hidden, *arguments, **named) - hidden  # type: ignore[no-any-return]

    verifier.blocks[1].forward = delta  # what the block adds, which something else would have to add
    original = verifier.model.forward

    def reporting(*arguments: Any, **named: Any) -> Any:
        output = original(*arguments, **named)
        output.hidden_states = tuple(state + 1 for state in output.hidden_states)
        return output

    verifier.model.forward = reporting
    with pytest.raises(InputError, match="stream"):
        self_check(verifier, (1,), IDS)


def test_several_residual_streams_are_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path, "llama")
    verifier = load_verifier(path, device=CPU, dtype=torch.float32, trust_remote_code=False)
    verifier.blocks[0].register_forward_pre_hook(lambda _m, inputs: (inputs[0][:, :, None].expand(-1, -1, 2, -1),))
    for block in verifier.blocks:
        block.forward = lambda hidden, *_, **__: hidden  # type: ignore[assignment]
    verifier.blocks[-1].register_forward_hook(lambda _m, _i, output: output)
    norm = verifier.final_norm.forward
    verifier.final_norm.forward = lambda hidden: norm(hidden[:, :, 0])  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"several residual streams.*|one state per token.*\(1, 256, 2, 32\)"):
        self_check(verifier, (1,), IDS)


def test_a_last_block_whose_output_is_not_what_the_norm_reads_is_refused_as_a_tap(tmp_path: Path) -> None:
    path = save_model(tmp_path, "llama")
    verifier = load_verifier(path, device=CPU, dtype=torch.float32, trust_remote_code=False)
    self_check(verifier, (1, 3), IDS)
    verifier.final_norm.register_forward_pre_hook(lambda _m, inputs: (2 * inputs[0] + 1,))
    self_check(verifier, (1,), IDS)
    with pytest.raises(InputError, match="leave this block out of --layers"):
        self_check(verifier, (1, 3), IDS)


def test_a_single_block(tmp_path: Path) -> None:
    model = make_model("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    assert max(self_check(find_modules(model, CPU), (0,), IDS).values()) < 1e-5


def test_a_last_block_is_what_the_bodys_norm_reads_where_the_head_has_a_norm_of_its_own(tmp_path: Path) -> None:
    """Body, norm, then layers and another norm of the head: the first norm vouches for the last block, and only it."""
    torch.manual_seed(0)
    config = MegatronBertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=512, is_decoder=True,
    )  # fmt: skip
    MegatronBertForCausalLM(config).save_pretrained(tmp_path)
    verifier = load_verifier(tmp_path, device=CPU, dtype=torch.float32, trust_remote_code=False)
    assert verifier.final_norm is verifier.model.cls.predictions.transform.LayerNorm
    assert max(self_check(verifier, (0, 2), IDS).values()) < 1e-3
    verifier.body.encoder.ln.register_forward_pre_hook(lambda _m, inputs: (2 * inputs[0] + 1,))
    self_check(verifier, (0, 1), IDS)
    with pytest.raises(InputError, match="leave this block out of --layers"):
        self_check(verifier, (0, 2), IDS)
