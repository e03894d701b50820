"""One training step of the DSpark draft of the project speculators, from its wheel, for `train_peers`.

What it computes otherwise than we do, for the same shape:

- The teacher: its step makes the verifier's logits over the draft vocabulary from stored final states, for every slot;
  ours reads 64 stored entries. The losses are cross entropy to the teacher's argmax (ours: to the text's token) and
  total variation, weighted 0.1 and 0.9, by its fused kernels.
- The window is counted from a block's anchor, so that each slot sees 1,024 context rows; ours is counted from the slot.
- It has no attention sinks. Its confidence head, which NVIDIA's draft lacks too, is left out.
- Its anchors are a fixed number, whose logits and activations exist at once, so memory bounds them: the default is 512
  on its command line and 3,072 in its trainer. Ours go through in slices, and may be every token.
- Attention is compiled flex attention; its forward is compiled too. Weights are float32 under bf16 autocast, and of its
  optimizers AdamW is taken, which is ours too; its default, Muon, does more work.

ModelOpt 0.47 has a DSpark trainer too, as a plugin that wraps a whole Hugging Face model and takes omegaconf and other
packages. It gathers full logits of the verifier for every slot, and its recipe for this draft trains 64 anchors of a
conversation of 2,048 tokens. So it is not timed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from draftcache.draft_train.drafts.block.shape import BlockShape

_PACKAGE = "speculators"
_LOSSES = '{"ce": 0.1, "tv": 0.9}'


def speculators_modules() -> tuple[ModuleType, ModuleType]:
    """Import the configuration module and the DSpark package of speculators.

    The packages above them are replaced by empty ones, because their `__init__` imports every trainer's dependencies,
    such as openai and datasets.
    """
    root = Path(next(folder for folder in sys.path if (Path(folder) / _PACKAGE).is_dir()))
    for name in (_PACKAGE, f"{_PACKAGE}.models"):
        if name not in sys.modules:
            module = ModuleType(name)
            module.__path__ = [str(root.joinpath(*name.split(".")))]
            sys.modules[name] = module
    package = sys.modules[_PACKAGE]
    config = importlib.import_module(f"{_PACKAGE}.config")
    for name in ("SpeculatorModelConfig", "SpeculatorsConfig", "VerifierConfig"):
        setattr(package, name, getattr(config, name))
    package.SpeculatorModel = importlib.import_module(f"{_PACKAGE}.model").SpeculatorModel  # type: ignore[attr-defined]
    importlib.import_module(f"{_PACKAGE}.models.attention")
    dspark = importlib.import_module(f"{_PACKAGE}.models.dspark")
    config.reload_schemas()
    _leave_out_of_graphs()
    return config, dspark


def _leave_out_of_graphs() -> None:
    """Call the fused losses' Triton kernels outside of the graphs that torch.compile makes of the rest.

    torch 2.11 refuses a graph whose kernels share a list of tile sizes, as these do ("already tracked for mutation").
    """
    fused = importlib.import_module(f"{_PACKAGE}.losses.fused")
    for name in ("fused_ce_loss", "fused_tv_loss"):
        setattr(fused, name, torch.compiler.disable(getattr(fused, name)))  # type: ignore[no-untyped-call]


def dspark_model(shape: BlockShape, length: int, device: torch.device) -> Any:
    """Return its DSpark draft of this shape in float32, with random weights where the verifier's belong."""
    config, dspark = speculators_modules()
    layers = importlib.import_module("transformers").Qwen3Config(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.num_attention_heads, num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim, vocab_size=shape.vocab_size, num_hidden_layers=shape.num_hidden_layers,
        layer_types=[f"{kind}_attention" for kind in shape.layer_types], sliding_window=shape.window,
        use_sliding_window=True, max_position_embeddings=length + shape.block_size, rms_norm_eps=shape.rms_norm_eps,
        pad_token_id=0, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
    )  # fmt: skip
    layers._attn_implementation = "simple_flex_attention" if device.type == "cuda" else "eager"
    greedy = importlib.import_module(f"{_PACKAGE}.proposals.greedy").GreedyTokenProposalConfig
    spoken = config.SpeculatorsConfig(
        algorithm="dspark",
        proposal_methods=[greedy(speculative_tokens=shape.steps)],
        default_proposal_method="greedy",
        verifier=config.VerifierConfig(name_or_path=None, architectures=[]),
    )
    settings = dspark.DSparkSpeculatorConfig(
        transformer_layer_config=layers, draft_vocab_size=shape.draft_vocab_size, block_size=shape.block_size,
        aux_hidden_state_layer_ids=list(range(1, shape.taps + 1)), mask_token_id=shape.mask_token_id,
        sample_from_anchor=not shape.bonus_anchor, markov_rank=shape.markov_rank, enable_confidence_head=False,
        confidence_head_with_markov=False, speculators_config=spoken,
    )  # fmt: skip
    with torch.device(device):
        model = dspark.DSparkDraftModel(settings)
        ids = torch.arange(shape.draft_vocab_size) * shape.vocab_size // shape.draft_vocab_size
        inside = torch.zeros(shape.vocab_size, dtype=torch.bool)
    inside[ids] = True
    model.load_vocab_mappings(inside, ids - torch.arange(len(ids), device=device))
    for value in (model.embed_tokens.weight, model.lm_head.weight, model.verifier_lm_head.weight):
        torch.nn.init.normal_(value, std=0.02)  # they are NaN until a verifier's are loaded
    return model.train()


def dspark_step(shape: BlockShape, length: int, anchors: int, device: torch.device) -> Callable[[], Any]:
    """Return a function that runs one optimizer step of its DSpark trainer on a conversation of `length` tokens.

    It draws its anchors anew in every step, as it does when it trains.
    """
    model = dspark_model(shape, length, device)
    implementation = "fused" if device.type == "cuda" else "eager"
    settings, _ = type(model).get_trainer_kwargs(
        loss_fn=_LOSSES, loss_implementation=implementation, max_anchors=anchors
    )
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-4, weight_decay=0.01)

    def random(width: int) -> torch.Tensor:
        return torch.randn(1, length, width, device=device, dtype=torch.bfloat16)

    inputs = {
        "hidden_states": random(shape.taps * shape.hidden_size),
        "verifier_last_hidden_states": random(shape.hidden_size),
        "input_ids": torch.randint(0, shape.vocab_size, (1, length), device=device),
        "loss_mask": torch.ones(1, length, device=device, dtype=torch.bool),
        "document_ids": torch.zeros(1, length, device=device, dtype=torch.long),
        "position_ids": torch.arange(length, device=device)[None],
    }

    def step() -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            _, loss, _ = model(**inputs, **settings)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step
