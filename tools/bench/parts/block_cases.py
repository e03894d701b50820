"""The block drafts' cases of `draftcache.tools.bench.train`: settings, needed operations, and the check of gradients.

The shape is that of NVIDIA's DSpark draft for a 30B verifier: hidden 2688, 32 / 2 heads of 128 with attention sinks,
intermediate 6144, 6 layers, 8 slots, a causal window of 1,024, 6 taps. Here the draft vocabulary has 32,000 of 131,072
ids, and the Markov rank is 256, the DSpark paper's (NVIDIA's has all ids, and 512). Embeddings and head are frozen.

The floor by counting, at one anchor per token and 798 TFLOP/s: DSpark needs 27.0 GFLOP per anchor, so at most 29,600
tokens a second; with a window of 4,096, 34.7 and 23,000; DFlash, whose first slot proposes nothing, 26.2 and 30,400.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.drafts.block.architecture import BlockArchitecture
from draftcache.draft_train.drafts.block.forward import block_outputs, layer_mask
from draftcache.draft_train.drafts.block.fused_forward import BlockSettings
from draftcache.draft_train.drafts.block.fused_pass import BlockPass
from draftcache.draft_train.drafts.block.model import BlockModel
from draftcache.draft_train.drafts.block.shape import BlockShape
from draftcache.draft_train.drafts.sizes import VerifierShape
from draftcache.draft_train.loss.objective import Objective, StepOutput
from draftcache.tools.bench.parts.train_cases import Case, synthetic_batch

LIMIT = 0.05
"""The largest `gradient_error` with which a case is timed. bf16 products make about 0.01."""
_CHECKED_SLICES = BlockSettings(slot_rows=320, rows=150)


LONG = Case((32_768,))
"""One conversation of 32k tokens, each of which is an anchor."""


@dataclass(frozen=True, kw_only=True)
class BlockCase:
    """A draft and the batch that it is trained on."""

    draft: str = "dspark"
    batch: Case = LONG
    taps: int = 6
    window: int = 1024

    def config(self) -> TrainConfig:
        """Return the settings of `draftcache train`; losses and decays are the architecture's own."""
        values: dict[str, Any] = {"markov_rank": 256} if self.draft == "dspark" else {}
        return TrainConfig(
            store=Path("synthetic"), output=Path("synthetic"), splits=("train",), draft=self.draft, block_size=8,
            num_hidden_layers=6, sliding_window=self.window, intermediate_size=6144, num_attention_heads=32,
            num_key_value_heads=2, head_dim=128, attention_sinks=True, mask_token_id=131_071,
            recompute_mlp=self.batch.lean, **values,
        )  # fmt: skip

    def shape(self) -> BlockShape:
        """Return the shape of the draft."""
        verifier = VerifierShape(
            hidden_size=2688, taps=self.taps, vocab_size=131_072, draft_vocab_size=32_000, rms_norm_eps=1e-5
        )
        return BlockArchitecture(self.draft).shape_for(self.config(), verifier)


PEER_ANCHORS = 3072
"""Anchors of a conversation at which the peer `speculators` is timed: the default of its DSpark trainer."""
BLOCK_CASES = {
    "dspark-32k": BlockCase(),
    "dspark-32k-3-taps": BlockCase(taps=3),
    "dspark-32k-window-4096": BlockCase(window=4096),
    f"dspark-32k-{PEER_ANCHORS}-anchors": BlockCase(batch=replace(LONG, anchors=PEER_ANCHORS)),
    "dspark-32k-lean": BlockCase(batch=replace(LONG, lean=True)),
    "dspark-8k-packed": BlockCase(batch=Case((8192,) * 4)),
    "dflash-32k": BlockCase(draft="dflash"),
}


def block_pass(
    model: BlockModel, config: TrainConfig, settings: BlockSettings, dtype: torch.dtype = torch.bfloat16
) -> BlockPass:
    """Return the fused pass of a draft over random embeddings, with products in `dtype`."""
    objective, embeddings = _objective_and_embeddings(model, config)
    return BlockPass(model, objective, embeddings.to(dtype), settings, dtype)


def gradient_error(case: BlockCase, device: torch.device, lengths: tuple[int, ...] = (200, 100)) -> float:
    """Return the largest difference of a parameter's gradient in the fused pass to that of its twin.

    It is relative to the gradient's 2-norm. The twin is autograd over the plain pass in float64, on the same device and
    weights. Both train a draft of the case's settings with two narrow layers and a window of 24, on packed
    conversations of these lengths, whose blocks go through in several slices.
    """
    shape = replace(
        case.shape(), hidden_size=256, intermediate_size=512, vocab_size=4096, draft_vocab_size=1600, window=24,
        num_hidden_layers=2, layer_types=("sliding",) * 2, causal=case.shape().causal[:2], mask_token_id=4095,
        markov_rank=min(case.shape().markov_rank, 32),
    )  # fmt: skip
    config = case.config()
    batch = synthetic_batch(replace(case.batch, lengths=lengths, anchors=0), device, shape, shape.steps, text=True)
    model = drawn_model(shape, device)
    with torch.no_grad():  # so that every part shows in the gradients, and both passes multiply by the same weights
        for value in model.parameters():
            value.copy_((4 * value if value.ndim == 2 else value + 0.3 * torch.randn_like(value)).bfloat16())
    wide = deepcopy(model).double()
    block_pass(model, config, _CHECKED_SLICES)(batch)
    plain_backward(wide, config, batch)
    expected = dict(wide.named_parameters())
    return max(_distance(value, expected[name]) for name, value in model.named_parameters())


def _distance(found: torch.nn.Parameter, expected: torch.nn.Parameter) -> float:
    """Return the relative distance of two gradients; infinity where one is missing or not finite."""
    if found.grad is None or expected.grad is None or not found.grad.isfinite().all():
        return math.inf
    return float((found.grad.double() - expected.grad).norm() / expected.grad.norm().clamp(min=1e-30))


def plain_backward(model: BlockModel, config: TrainConfig, batch: Batch) -> None:
    """Leave the gradients of the plain pass, by autograd in the dtype of the weights."""
    objective, embeddings = _objective_and_embeddings(model, config)
    outputs = block_outputs(model, embeddings.to(model.fc.weight.dtype), batch, batch.step_tokens.shape[1])

    def logits(output: StepOutput) -> Tensor:
        return model.logits(output.hidden, batch.step_tokens[output.rows, output.number])

    objective(outputs, logits, batch).loss.backward()  # type: ignore[no-untyped-call]


def drawn_model(shape: BlockShape, device: torch.device) -> BlockModel:
    """Return a draft on `device` with random weights."""
    with torch.device(device):
        model = BlockModel(shape)
    head = 0.02 * torch.randn(shape.draft_vocab_size, shape.hidden_size)
    model.initialize(0, head=head, embeddings=torch.empty(0))
    return model


def _objective_and_embeddings(model: BlockModel, config: TrainConfig) -> tuple[Objective, Tensor]:
    """Return the objective, and random embeddings [vocabulary, H] in bf16, both on the model's device."""
    shape, device = model.shape, model.fc.weight.device
    with torch.device(device):
        generator = torch.Generator(device).manual_seed(1)
        embeddings = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator, dtype=torch.bfloat16)
        target_ids = torch.arange(shape.draft_vocab_size)
        in_draft = torch.arange(shape.vocab_size) < shape.draft_vocab_size
    return Objective(config, target_ids, in_draft), embeddings


def needed_block_flops(shape: BlockShape, batch: Batch) -> float:
    """Return the operations of the needed products and of attention, forward and backward (2x, attention 2.5x).

    Left out are gradients that nothing needs: of the taps, of a frozen head's weights, and of what the first layer
    reads where embeddings are frozen. Attention counts the keys that each slot sees.
    """
    hidden, width = shape.hidden_size, shape.head_dim
    queries, keys = shape.num_attention_heads * width, 2 * shape.num_key_value_heads * width
    layers, slots = shape.num_hidden_layers, shape.slots(batch.step_tokens.shape[1])
    slot_rows, context = batch.start_index.shape[0] * slots, batch.taps.shape[0]
    qkv = 2 * hidden * (queries + keys)
    layer = qkv + 2 * hidden * (queries + 3 * shape.intermediate_size)
    products = slot_rows * (3 * layers * layer - (0 if shape.train_embeddings else qkv))
    products += context * 2 * hidden * (2 * shape.taps * hidden + 3 * layers * keys)
    head = 2 * shape.draft_vocab_size * (hidden + shape.markov_rank)
    weights = 2 * shape.draft_vocab_size * (shape.train_head * hidden + shape.markov_rank)
    products += int(batch.steps.sum()) * (2 * head + weights)
    return float(
        products + 3.5 * 4 * queries * sum(_keys_seen(shape, number, batch, slots) for number in range(layers))
    )


def _keys_seen(shape: BlockShape, layer: int, batch: Batch, slots: int) -> int:
    """Return how many keys the slots of all blocks see in a layer, context rows and slots together."""
    mask = layer_mask(shape, layer, batch)
    low, high = mask.context_range(slots)
    return int((high[:, None].long() - low).sum() + mask.slots_seen(slots).sum() * batch.start_index.shape[0])
