"""The smallest second architecture: one linear head per step on a start row's taps. It proves the seam of drafts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.batches import Batch, BatchNeeds
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.drafts.protocol import Architecture, CheckpointState, Draft, ServedForm
from draftcache.draft_train.drafts.served_draft import Finding, ServedDraft, error
from draftcache.draft_train.drafts.serving_target import ServingTarget
from draftcache.draft_train.drafts.sizes import BatchRows, Shape, VerifierShape
from draftcache.draft_train.loss.objective import StepOutput
from draftcache.store.format.vocab_map import VocabMap


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """One [draft_vocab_size, taps * hidden_size] matrix per step."""

    hidden_size: int
    taps: int
    vocab_size: int
    draft_vocab_size: int
    sliding_window: int | None
    steps: int


class LinearDraft(Draft):
    """Predicts the token of step k from a start row's taps alone."""

    shape: LinearShape
    model: nn.ModuleList

    @property
    def rows_by_draft_id(self) -> tuple[str, ...]:
        return tuple(self.model.state_dict())

    def initialize(self, seed: int, frozen: FrozenWeights, head_init: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator))

    def needs(self, config: TrainConfig) -> BatchNeeds:
        return BatchNeeds(steps=self.shape.steps, window=1)

    def step_outputs(self, frozen: FrozenWeights, batch: Batch, steps: int) -> Iterator[StepOutput]:
        for number in range(min(steps, self.shape.steps)):
            rows = torch.nonzero(batch.steps > number)[:, 0]
            if rows.numel():
                yield StepOutput(number, rows, batch.taps[batch.start_index[rows]])

    def logits(self, output: StepOutput, batch: Batch) -> Tensor:
        found: Tensor = self.model[output.number](output.hidden.float())
        return found

    def served_form(
        self, state: CheckpointState, vocab_map: VocabMap, *, target: ServingTarget, dtype: torch.dtype
    ) -> ServedForm:
        config = {"architectures": ["Linear"], "steps": self.shape.steps, "taps": [tap["layer"] for tap in state.taps]}
        tensors = {name: value.to(dtype).contiguous() for name, value in self.model.state_dict().items()}
        return ServedForm(config, tensors | {"d2t": torch.from_numpy(vocab_map.d2t.copy())})


class Linear(Architecture):
    """Builds linear drafts."""

    name = "linear"
    engines = ("toy",)

    def shape_for(self, config: TrainConfig, verifier: VerifierShape) -> LinearShape:
        return LinearShape(
            hidden_size=verifier.hidden_size,
            taps=verifier.taps,
            vocab_size=verifier.vocab_size,
            draft_vocab_size=verifier.draft_vocab_size,
            sliding_window=1,
            steps=config.ttt_steps,
        )

    def read_shape(self, values: dict[str, Any]) -> LinearShape:
        return LinearShape(**values)

    def build(self, shape: Shape, device: torch.device) -> LinearDraft:
        assert isinstance(shape, LinearShape)
        width = shape.taps * shape.hidden_size
        with torch.device(device):
            heads = [nn.Linear(width, shape.draft_vocab_size, bias=False) for _ in range(shape.steps)]
            return LinearDraft(shape, nn.ModuleList(heads))

    def peak_bytes(self, shape: Shape, config: TrainConfig, batch: BatchRows) -> dict[str, int]:
        assert isinstance(shape, LinearShape)
        weights = shape.steps * shape.draft_vocab_size * shape.taps * shape.hidden_size
        return {"weights": 16 * weights, "logits": 4 * batch.starts * shape.draft_vocab_size}

    def operations(self, shape: Shape, config: TrainConfig, batch: BatchRows) -> float:
        assert isinstance(shape, LinearShape)
        return 4.0 * batch.starts * shape.steps * shape.draft_vocab_size * shape.taps * shape.hidden_size

    def served_findings(self, draft: ServedDraft) -> Iterator[Finding]:
        if draft.config["architectures"] != ["Linear"]:
            yield error("architecture", "architectures", "Linear", draft.config["architectures"], "export it again")


ARCHITECTURE = Linear()
