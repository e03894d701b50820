"""Blocks, final norm and head are found in models of many shapes; what can't be loaded says what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BlenderbotConfig,
    BlenderbotForCausalLM,
    CLIPVisionConfig,
    ElectraConfig,
    ElectraForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LongcatFlashConfig,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
)

from draftcache.capture.job.config import CaptureConfig, layers_by_depth
from draftcache.capture.job.start_check import with_layers
from draftcache.capture.verifier.blocks import block_count
from draftcache.capture.verifier.head import head_logits
from draftcache.capture.verifier.load import Verifier, describe_verifier, find_modules, load_verifier
from draftcache.capture.verifier.self_check import self_check
from draftcache.store.common.errors import InputError
from draftcache.tools.cli import main
from support.tiny_models import VOCAB, make_model, save_model

CPU = torch.device("cpu")
IDS = torch.randint(3, VOCAB, (256,), generator=torch.Generator().manual_seed(1))


def load(path: Path) -> Verifier:
    return load_verifier(path, device=CPU, dtype=torch.float32, trust_remote_code=False)


def llava() -> Any:
    """A language model beside an encoder of images that has as many blocks, and norms of its own."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=VOCAB - 1)
    return LlavaForConditionalGeneration(config).eval()


def test_the_language_model_inside_of_a_model_for_images(tmp_path: Path) -> None:
    model = llava()
    model.save_pretrained(tmp_path)
    verifier = load(tmp_path)
    assert (len(verifier.blocks), verifier.hidden_size, verifier.vocab_size) == (4, 32, VOCAB)
    assert verifier.body is verifier.model.model.language_model
    assert max(self_check(verifier, (0, 2, 3), IDS).values()) < 1e-5
    with torch.inference_mode():
        expected = model(input_ids=IDS[None], output_hidden_states=True)
    states = verifier.forward(IDS, (1,))
    assert torch.allclose(states.taps[1], expected.hidden_states[2][0], atol=1e-5)
    assert torch.allclose(states.final, expected.hidden_states[4][0], atol=1e-5)


def test_the_depth_is_the_decoders_and_counts_blocks_not_attentions(tmp_path: Path) -> None:
    config = BlenderbotConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=3, decoder_attention_heads=4, decoder_ffn_dim=48,
        encoder_attention_heads=4, encoder_ffn_dim=48, max_position_embeddings=512, is_decoder=True,
        is_encoder_decoder=False,
    )  # fmt: skip
    BlenderbotForCausalLM(config).save_pretrained(tmp_path)
    verifier = load(tmp_path)
    assert len(verifier.blocks) == 3 != config.num_hidden_layers
    assert max(self_check(verifier, (0, 1, 2), IDS).values()) < 1e-4
    job = CaptureConfig(verifier=tmp_path, dataset=tmp_path, output=tmp_path / "s")
    assert with_layers(job).layers == layers_by_depth(3)
    assert block_count(LongcatFlashConfig(num_layers=5)) == 5
    assert block_count(LlamaConfig(num_hidden_layers=5)) == 5


def test_of_several_norms_the_one_whose_output_the_head_reads() -> None:
    model = make_model("llama")
    model.model.norm_of_something_else = torch.nn.LayerNorm(32)
    assert find_modules(model, CPU).final_norm is model.model.norm


def test_of_several_stacks_that_are_parts_of_blocks_the_one_whose_output_is_reported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = XLMConfig(
        vocab_size=VOCAB, emb_dim=32, n_layers=3, n_heads=4, max_position_embeddings=512, causal=True, n_langs=1,
        bos_index=0, eos_index=1, pad_index=2, unk_index=0, mask_index=0,
    )  # fmt: skip
    XLMWithLMHeadModel(config).save_pretrained(tmp_path)
    verifier = load(tmp_path)
    body = verifier.body
    assert verifier.blocks is body.layer_norm2
    assert verifier.final_norm is body.layer_norm2[-1]
    assert max(self_check(verifier, (0, 1, 2), IDS).values()) < 1e-3
    for part in (body.attentions, body.ffns, body.layer_norm1):  # the negative control
        with pytest.raises(InputError, match="stream"):
            self_check(replace(verifier, blocks=part), (0, 1), IDS)


def test_a_norm_at_the_end_of_the_last_block(tmp_path: Path) -> None:
    """As in models whose blocks normalise behind what they add."""
    config = OpenAIGPTConfig(vocab_size=VOCAB, n_positions=512, n_embd=32, n_layer=3, n_head=4)
    OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path)
    verifier = load(tmp_path)
    assert verifier.final_norm is verifier.blocks[-1].ln_2
    assert verifier.norm.kind == "layer_norm"
    assert max(self_check(verifier, (0, 1, 2), IDS).values()) < 1e-4


def test_a_head_with_layers_of_its_own(tmp_path: Path) -> None:
    """The norm whose output the head reads is outside of the body: the model runs up to its head, and not further."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=512, is_decoder=True,
    )  # fmt: skip
    model = BertLMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    verifier = load(tmp_path)
    assert verifier.final_norm is verifier.model.cls.predictions.transform.LayerNorm
    assert max(self_check(verifier, (0, 1, 2), IDS).values()) < 1e-3
    calls: list[int] = []
    verifier.head.register_forward_hook(lambda *_: calls.append(1))
    states = verifier.forward(IDS, (1,))
    assert not calls
    with torch.inference_mode():
        expected = model(input_ids=IDS[None], output_hidden_states=True)
        logits = states.final @ verifier.head.weight.T + verifier.head.bias
    assert torch.allclose(states.taps[1], expected.hidden_states[2][0], atol=1e-5)
    assert torch.allclose(logits, expected.logits[0], atol=1e-4)


def small_opt(path: Path, *, pre_norm: bool) -> Any:
    """Vocabulary's sides of 16 channels beside blocks of 32, as in OPT 350M."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=32, word_embed_proj_dim=16, num_hidden_layers=3, num_attention_heads=4,
        ffn_dim=48, max_position_embeddings=512, do_layer_norm_before=pre_norm, init_std=0.2,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("pre_norm", [False, True])
def test_projections_beside_embeddings_and_head_are_folded_into_them(tmp_path: Path, pre_norm: bool) -> None:
    model = small_opt(tmp_path, pre_norm=pre_norm)
    verifier, decoder = load(tmp_path), model.model.decoder
    assert (verifier.hidden_size, verifier.head_size, verifier.own_head.in_features) == (32, 32, 16)
    assert max(self_check(verifier, (0, 1, 2), IDS).values()) < 1e-3
    with torch.inference_mode():
        logits = model(input_ids=IDS[None]).logits[0]
        ours = head_logits(verifier.forward(IDS, (1,)).final, verifier.head, verifier.head_form)
        rows = decoder.project_in(decoder.embed_tokens(IDS))
    assert torch.allclose(ours, logits, atol=1e-4)
    assert torch.allclose(verifier.embeddings(IDS), rows, atol=1e-5)


def test_a_projection_that_is_not_all_between_norm_and_head_is_refused(tmp_path: Path) -> None:
    small_opt(tmp_path, pre_norm=True)
    verifier = load(tmp_path)
    project = verifier.body.decoder.project_out
    project.register_forward_hook(lambda _m, _i, output: output + 0.01)
    with pytest.raises(InputError, match="logits"):
        self_check(verifier, (0, 2), IDS)
    verifier.body.decoder.project_in = torch.nn.Identity()
    with pytest.raises(InputError, match="found embeddings of 16 and 0 such projections"):
        find_modules(without_projection(tmp_path), CPU)


def test_of_two_projections_before_the_blocks_none_is_guessed(tmp_path: Path) -> None:
    model = small_opt(tmp_path, pre_norm=True)
    decoder = model.model.decoder
    other = torch.nn.Linear(16, 32)
    decoder.other = other
    decoder.embed_tokens.register_forward_hook(lambda _m, _i, output: (other(output), output)[1])
    with pytest.raises(InputError, match="found embeddings of 16 and 2 such projections"):
        find_modules(model, CPU)


def without_projection(path: Path) -> Any:
    """The small OPT with embeddings that are widened by something that is no linear layer."""
    model = OPTForCausalLM.from_pretrained(path)
    model.model.decoder.project_in = torch.nn.Upsample(size=32)
    return model


def test_a_head_with_a_norm_of_its_own_reads_states_of_another_width(tmp_path: Path) -> None:
    """As in small ELECTRA and RoFormer: the taps have the blocks' 32 channels, the final states the head's 16."""
    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=VOCAB, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=512, is_decoder=True,
    )  # fmt: skip
    ElectraForCausalLM(config).save_pretrained(tmp_path)
    verifier = load(tmp_path)
    assert (verifier.hidden_size, verifier.head_size, verifier.norm.weight.shape) == (32, 16, (16,))
    assert max(self_check(verifier, (0, 1, 2), IDS).values()) < 1e-3
    states = verifier.forward(IDS, (1,))
    assert (states.taps[1].shape, states.final.shape) == ((256, 32), (256, 16))
    described = describe_verifier(tmp_path, verifier)
    assert (described["hidden_size"], described["head_size"]) == (32, 16)
    wrap_reported(verifier)
    with pytest.raises(InputError, match="last block, 2"):  # nothing else of 32 channels vouches for the last block
        self_check(verifier, (2,), IDS)


def wrap_reported(verifier: Verifier) -> None:
    """Have the model report another state behind its last block than that block returns."""
    original = verifier.model.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        output = original(*arguments, **named)
        *others, last = output.hidden_states
        output.hidden_states = (*others, last + 1)
        return output

    verifier.model.forward = forward


def test_a_model_without_a_final_norm_is_refused() -> None:
    model = make_model("llama")
    model.model.norm = torch.nn.Identity()
    model.model.final_norm = torch.nn.LayerNorm(32)  # it does not run
    head = model.lm_head
    model.model.forward = lambda input_ids, **_: model.model.embed_tokens(input_ids)
    model.forward = lambda input_ids, **_: head(model.model.forward(input_ids) + 1)
    with pytest.raises(InputError, match="expected a final norm whose output the head reads"):
        find_modules(model, CPU)


def test_layers_by_depth() -> None:
    assert layers_by_depth(52, "nemotron_h") == (2, 26, 48)
    assert layers_by_depth(32) == (2, 16, 29)
    assert layers_by_depth(12) == (2, 6, 9)
    assert layers_by_depth(4) == (0, 2, 3)
    assert layers_by_depth(1) == (0,)


def test_without_layers_a_job_takes_them_by_depth(tmp_path: Path) -> None:
    path = save_model(tmp_path, "llama")
    config = CaptureConfig(verifier=path, dataset=tmp_path, output=tmp_path / "s")
    assert with_layers(config).layers == (0, 2, 3)
    given = CaptureConfig(verifier=path, dataset=tmp_path, output=tmp_path / "s", layers=(1,))
    assert with_layers(given) is given


@pytest.mark.parametrize("text", ["auto", "early,middle,late"])
def test_the_flag_takes_words(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["capture", "--verifier", str(tmp_path), "--dataset", str(tmp_path), "--output", str(tmp_path / "s")]
    assert main([*words, "--layers", text]) == 2
    assert "config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--layers", "late"])


def test_gguf_files_are_named_with_how_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "model.Q4_1.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model.Q4_1.gguf"):
        with pytest.raises(InputError, match=r"found a GGUF file; convert it once: .*gguf_file='model.Q4_1.gguf'"):
            load(path)


def test_code_of_a_checkpoint_is_refused_with_our_flag(tmp_path: Path) -> None:
    (tmp_path / "modeling.py").write_text("raise SystemExit('ran')")
    (tmp_path / "config.json").write_text(
        '{"model_type": "of_its_own", "auto_map": {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}}'
    )
    with pytest.raises(InputError, match="Pass --trust-remote-code"):
        load(tmp_path)
