"""Eagle3 as an implementation of the draft protocol: a one-layer Llama, unrolled over its own outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.batches import Batch, BatchNeeds
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.drafts.eagle3 import memory, served, served_checks
from draftcache.draft_train.drafts.eagle3.choose_pass import choose_forward, choose_pass, pass_settings
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.drafts.eagle3.shape import Eagle3Shape
from draftcache.draft_train.drafts.eagle3.unroll import unroll
from draftcache.draft_train.drafts.gradient_pass import GradientPass
from draftcache.draft_train.drafts.protocol import Architecture, CheckpointState, Draft, LogitReader, ServedForm
from draftcache.draft_train.drafts.served_draft import Finding, ServedDraft
from draftcache.draft_train.drafts.served_parts import serve_command
from draftcache.draft_train.drafts.serving_target import FORMS, ServingTarget, VerifierFacts
from draftcache.draft_train.drafts.sizes import BatchRows, Shape, VerifierShape
from draftcache.draft_train.loss.objective import Objective, StepOutput, needs_text
from draftcache.store.common.errors import InputError
from draftcache.store.format.vocab_map import VocabMap


class Eagle3Draft(Draft):
    """One Eagle3 draft. Implements `Draft`."""

    shape: Eagle3Shape
    model: Eagle3Model

    @property
    def rows_by_draft_id(self) -> tuple[str, ...]:
        return ("lm_head.weight",)

    def initialize(self, seed: int, frozen: FrozenWeights, head_init: str) -> None:
        from_verifier = head_init == "verifier"
        # A served draft has a plain head: the verifier's scale goes into its rows, and its cap is left out.
        self.model.initialize(
            seed,
            head=frozen.lm_head.cpu().float() * frozen.head_form.scale if from_verifier else None,
            norm=frozen.norm.cpu() if from_verifier else None,
        )

    def needs(self, config: TrainConfig) -> BatchNeeds:
        return BatchNeeds(steps=config.ttt_steps, window=self.shape.sliding_window, next_tokens=needs_text(config))

    def step_outputs(self, frozen: FrozenWeights, batch: Batch, steps: int) -> Iterator[StepOutput]:
        return unroll(self.model, frozen.embed_tokens, batch, steps)

    def logits(self, output: StepOutput, batch: Batch) -> Tensor:
        return self.model.logits(output.hidden)

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
        return served.served_form(self.shape, self.model, state, vocab_map, target=target, dtype=dtype)


class Eagle3(Architecture):
    """Builds Eagle3 drafts. Implements `Architecture`."""

    name = "eagle3"
    engines = served.ENGINES
    forms = FORMS
    served_as = served_checks.SERVED_AS

    def shape_for(self, config: TrainConfig, verifier: VerifierShape) -> Eagle3Shape:
        return Eagle3Shape(
            hidden_size=verifier.hidden_size,
            taps=verifier.taps,
            intermediate_size=config.intermediate_size or 3 * verifier.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=verifier.vocab_size,
            draft_vocab_size=verifier.draft_vocab_size,
            sliding_window=config.sliding_window or None,
            rope_theta=config.rope_theta,
            rms_norm_eps=verifier.rms_norm_eps,
            fc_norm=config.eagle31,
            norm_output=config.eagle31,
        )

    def read_shape(self, values: dict[str, Any]) -> Eagle3Shape:
        try:
            return Eagle3Shape(**values)
        except TypeError as exc:
            raise InputError(f"expected the shape of an Eagle3 draft, found {values} ({exc})") from exc

    def build(self, shape: Shape, device: torch.device) -> Eagle3Draft:
        assert isinstance(shape, Eagle3Shape)
        with torch.device(device):
            return Eagle3Draft(shape, Eagle3Model(shape))

    def peak_bytes(self, shape: Shape, config: TrainConfig, batch: BatchRows) -> dict[str, int]:
        assert isinstance(shape, Eagle3Shape)
        settings = pass_settings(config)
        work = memory.Work(
            rows=batch.rows,
            starts=batch.starts,
            steps=config.ttt_steps,
            top_k=batch.top_k,
            slice_rows=settings.rows,
            mlp_rows=settings.mlp_rows,
            recompute_mlp=settings.recompute_mlp,
            flash_attention=settings.flash_attention,
        )
        return memory.peak_bytes(shape, work)

    def why_not_served(self, verifier: VerifierFacts, engine: str) -> str | None:
        return served.why_not_served(verifier, engine)

    def draft_tokens(self, shape: Shape, objective: dict[str, Any]) -> int:
        return served.draft_tokens(objective)

    def serve_command(self, target: ServingTarget, verifier: str, draft: str, tokens: int, shape: Shape) -> str:
        assert isinstance(shape, Eagle3Shape)
        return serve_command(self.name, target, verifier, draft, tokens, shape.sliding_window)

    def operations(self, shape: Shape, config: TrainConfig, batch: BatchRows) -> float:
        assert isinstance(shape, Eagle3Shape)
        hidden, queries = shape.hidden_size, shape.num_attention_heads * shape.head_dim
        keys = 2 * shape.num_key_value_heads * shape.head_dim
        per_row = 2 * hidden * (3 * queries + 2 * keys + 3 * shape.intermediate_size + shape.draft_vocab_size)
        base = 2 * hidden * (shape.taps * hidden + 2 * keys)
        rows = batch.starts * config.ttt_steps
        products = 3.0 * (rows * per_row - batch.starts * 4 * hidden * keys + batch.rows * base)
        return products + 3.5 * 4 * queries * rows * (shape.sliding_window or batch.rows)

    def served_findings(self, draft: ServedDraft) -> Iterator[Finding]:
        return served_checks.findings(draft)


ARCHITECTURE = Eagle3()
