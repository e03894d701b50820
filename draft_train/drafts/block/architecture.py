"""DFlash and DSpark as implementations of the draft protocol: one model, with and without what DSpark adds to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.batches import Batch, BatchNeeds
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.drafts.block import memory, served, served_checks
from draftcache.draft_train.drafts.block.choose_pass import choose_forward, choose_pass
from draftcache.draft_train.drafts.block.forward import block_outputs
from draftcache.draft_train.drafts.block.model import BlockModel
from draftcache.draft_train.drafts.block.shape import BlockShape
from draftcache.draft_train.drafts.gradient_pass import GradientPass
from draftcache.draft_train.drafts.protocol import Architecture, CheckpointState, Draft, LogitReader, ServedForm
from draftcache.draft_train.drafts.served_draft import Finding, ServedDraft
from draftcache.draft_train.drafts.served_parts import serve_command
from draftcache.draft_train.drafts.serving_target import FORMS, ServingTarget
from draftcache.draft_train.drafts.sizes import BatchRows, Shape, VerifierShape
from draftcache.draft_train.loss.objective import Objective, StepOutput, needs_text
from draftcache.store.format.vocab_map import VocabMap


class BlockDraft(Draft):
    """One block draft. Implements `Draft`."""

    shape: BlockShape
    model: BlockModel

    def __init__(self, name: str, shape: BlockShape, model: BlockModel) -> None:
        """`name` is that of the architecture."""
        super().__init__(shape, model)
        self.name = name

    @property
    def rows_by_draft_id(self) -> tuple[str, ...]:
        return ("lm_head.weight", *(["markov_head.markov_w2.weight"] if self.shape.markov_rank else []))

    def initialize(self, seed: int, frozen: FrozenWeights, head_init: str) -> None:
        self.model.initialize(
            seed,
            head=frozen.lm_head.cpu().float() * frozen.head_form.scale,  # a served draft has a plain head
            embeddings=frozen.embed_tokens.cpu(),
            norm=frozen.norm.cpu() if head_init == "verifier" else None,
        )

    def needs(self, config: TrainConfig) -> BatchNeeds:
        return BatchNeeds(
            steps=self.shape.steps,
            window=self.shape.sliding_window,
            next_tokens=needs_text(config),
            anchor_share=config.anchor_share,
            anchor_seed=config.seed,
        )

    def step_outputs(self, frozen: FrozenWeights, batch: Batch, steps: int) -> Iterator[StepOutput]:
        return block_outputs(self.model, frozen.embed_tokens, batch, steps)

    def logits(self, output: StepOutput, batch: Batch) -> Tensor:
        return self.model.logits(output.hidden, batch.step_tokens[output.rows, output.number])

    def confidence(self, output: StepOutput, batch: Batch) -> Tensor | None:
        if not self.shape.confidence_head:
            return None
        return self.model.confidence(output.hidden, batch.step_tokens[output.rows, output.number])

    def gradient_pass(
        self, config: TrainConfig, objective: Objective, frozen: FrozenWeights, *, say: bool = True
    ) -> GradientPass:
        fused = choose_pass(config, self.model, objective, frozen.embed_tokens, say=say)
        return fused or self.plain_pass(config, objective, frozen)

    def logit_reader(self, frozen: FrozenWeights, compute: str = "auto") -> LogitReader:
        fused = choose_forward(self.model, frozen.embed_tokens, compute)
        return super().logit_reader(frozen, "plain") if fused is None else fused.step_logits

    def served_form(
        self, state: CheckpointState, vocab_map: VocabMap, *, target: ServingTarget, dtype: torch.dtype
    ) -> ServedForm:
        return served.served_form(self.name, self.shape, self.model, state, vocab_map, target=target, dtype=dtype)


class BlockArchitecture(Architecture):
    """Builds the block drafts of one name. Implements `Architecture`."""

    def __init__(self, name: str) -> None:
        """`name` is "dflash" or "dspark"."""
        self.name = name
        self.engines = served.ENGINES[name]
        self.forms = FORMS
        self.served_as = served_checks.SERVED_AS[name]

    def shape_for(self, config: TrainConfig, verifier: VerifierShape) -> BlockShape:
        window = config.sliding_window or None
        types = config.layer_types or ("full" if window is None else "sliding",) * config.num_hidden_layers
        by_layer = config.block_attention == "by-layer"
        return BlockShape(
            hidden_size=verifier.hidden_size,
            taps=verifier.taps,
            num_hidden_layers=config.num_hidden_layers,
            intermediate_size=config.intermediate_size or 3 * verifier.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=verifier.vocab_size,
            draft_vocab_size=verifier.draft_vocab_size,
            window=window if "sliding" in types else None,
            layer_types=types,
            causal=tuple(kind == "sliding" if by_layer else config.block_attention == "causal" for kind in types),
            rope_theta=config.rope_theta,
            rms_norm_eps=verifier.rms_norm_eps,
            block_size=config.block_size,
            bonus_anchor=config.anchor != "first",
            mask_token_id=config.mask_token_id,
            markov_rank=config.markov_rank,
            attention_sinks=config.attention_sinks,
            confidence_head=config.confidence_head,
            train_embeddings=config.train_embeddings,
            train_head=config.train_head,
        )

    def read_shape(self, values: dict[str, Any]) -> BlockShape:
        return BlockShape.read(values)

    def build(self, shape: Shape, device: torch.device) -> BlockDraft:
        assert isinstance(shape, BlockShape)
        with torch.device(device):
            return BlockDraft(self.name, shape, BlockModel(shape))

    def peak_bytes(self, shape: Shape, config: TrainConfig, batch: BatchRows) -> dict[str, int]:
        assert isinstance(shape, BlockShape)
        return memory.peak_bytes(shape, config, batch)

    def operations(self, shape: Shape, config: TrainConfig, batch: BatchRows) -> float:
        assert isinstance(shape, BlockShape)
        hidden, queries = shape.hidden_size, shape.num_attention_heads * shape.head_dim
        keys, layers = 2 * shape.num_key_value_heads * shape.head_dim, shape.num_hidden_layers
        starts = batch.starts * config.anchor_share
        per_slot = 3.0 * 2 * hidden * (2 * queries + keys + 3 * shape.intermediate_size)
        windows = [(shape.window if kind == "sliding" else None) or batch.rows for kind in shape.layer_types]
        attention = 3.5 * 4 * queries * sum(windows)
        # A frozen head's weights have no gradient, and neither have the taps.
        head = 2 * (hidden + shape.markov_rank) + hidden * shape.train_head + shape.markov_rank
        base = 2 * hidden * (2 * shape.taps * hidden + 3 * layers * keys)
        slots = starts * shape.block_size * (layers * per_slot + attention)
        return slots + starts * shape.steps * 2 * shape.draft_vocab_size * head + batch.rows * base

    def draft_tokens(self, shape: Shape, objective: dict[str, Any]) -> int:
        assert isinstance(shape, BlockShape)
        return shape.steps

    def serve_command(self, target: ServingTarget, verifier: str, draft: str, tokens: int, shape: Shape) -> str:
        return serve_command(self.name, target, verifier, draft, tokens)

    def served_findings(self, draft: ServedDraft) -> Iterator[Finding]:
        return served_checks.findings(draft, self.name)


DFLASH = BlockArchitecture("dflash")
DSPARK = BlockArchitecture("dspark")
