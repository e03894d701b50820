"""The interface of a draft for the rest of training: trainer, evaluation, checkpoints, memory estimate and export.

An `Architecture` is one way to build drafts, which `registry` finds by its name. A `Draft` is one draft of it: a shape,
weights, and everything that depends on them. A new architecture is a folder beside `eagle3` with these two classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.batches import Batch, BatchNeeds
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.drafts.gradient_pass import GradientPass, PlainPass
from draftcache.draft_train.drafts.pass_support import require_plain
from draftcache.draft_train.drafts.served_draft import Finding, ServedDraft
from draftcache.draft_train.drafts.serving_target import FORMS, ServingTarget, VerifierFacts
from draftcache.draft_train.drafts.sizes import BatchRows, Shape, VerifierShape
from draftcache.draft_train.loss.objective import Objective, StepOutput
from draftcache.store.common.errors import InputError
from draftcache.store.format.vocab_map import VocabMap

LOGIT_ROWS = 8192
"""Rows whose logits exist at once while a draft proposes."""


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """The content of a checkpoint's state.json, without the format and the hashes of the files beside it."""

    architecture: str
    """Name of the draft's architecture."""
    step: int
    """Optimizer steps done."""
    finished: bool
    objective: dict[str, Any]
    """`TrainConfig.objective()` of the run."""
    shape: Shape
    store_hash: str
    draft_vocab_hash: str
    verifier: dict[str, Any]
    """The verifier, as the store's manifest describes it."""
    taps: list[dict[str, Any]]
    """The taps, as the store's manifest describes them."""
    metrics: dict[str, Any]
    """What was logged of the last step."""
    longest: int = 0
    """Tokens of the store's longest conversation; 0 in checkpoints of earlier versions, which did not say."""
    code: dict[str, str] = field(default_factory=dict)
    """`version` and `commit` of the code that wrote it; empty in checkpoints of earlier versions."""


class StepLogits(NamedTuple):
    """A draft's logits for some rows of one step."""

    number: int
    """The step, counted from 0."""
    rows: Tensor
    """[A] int64 into the batch's start rows."""
    logits: Tensor
    """[A, V] over the draft vocabulary."""


LogitReader = Callable[[Batch, int], Iterator[StepLogits]]
"""Returns what `Draft.step_logits` does for a batch and the number of steps."""

Proposer = Callable[[Batch, int], Tensor]
"""Returns what `Draft.propose` does for a batch and the number of draft tokens, [S, count] int64."""


def greedy_choices(slices: Iterator[StepLogits], batch: Batch, count: int) -> Tensor:
    """Return the draft ids [S, count] int64 of the largest logits by start row and step; -1 where there are none."""
    choices = torch.full((batch.start_index.shape[0], count), -1, dtype=torch.int64, device=batch.taps.device)
    for number, rows, logits in slices:
        choices[rows, number] = logits.argmax(-1)
    return choices


@dataclass(frozen=True)
class ServedForm:
    """A draft as an inference engine loads it."""

    config: dict[str, Any]
    """Content of config.json."""
    tensors: dict[str, Tensor]
    """Content of model.safetensors."""


class Draft(ABC):
    """One draft: its shape, its weights, and all that depends on its architecture."""

    def __init__(self, shape: Shape, model: nn.Module) -> None:
        """`model` holds the trained weights: a checkpoint stores its state dictionary in float32."""
        self.shape = shape
        self.model = model

    @property
    @abstractmethod
    def rows_by_draft_id(self) -> tuple[str, ...]:
        """Names of the weights [draft vocabulary, ...] whose rows belong to draft ids, as those of a head do."""

    @abstractmethod
    def initialize(self, seed: int, frozen: FrozenWeights, head_init: str) -> None:
        """Set the weights before the first step. They depend on `seed` alone, not on the device.

        With `head_init` "verifier", head and norm start as the verifier's head rows, times the scale of its logits, and
        the effective weight of its final norm; with "random" not. A cap of the verifier's logits is learned, if it is
        at all: engines serve a draft whose logits are its head's output.
        """

    @abstractmethod
    def needs(self, config: TrainConfig) -> BatchNeeds:
        """Return what a training batch has to hold under these settings."""

    @abstractmethod
    def step_outputs(self, frozen: FrozenWeights, batch: Batch, steps: int) -> Iterator[StepOutput]:
        """Run the plain forward pass: yield the outputs of steps 0 .. steps-1, as long as any start row is left."""

    @abstractmethod
    def logits(self, output: StepOutput, batch: Batch) -> Tensor:
        """Return the draft-vocabulary logits [A, V] of an output's rows."""

    def confidence(self, output: StepOutput, batch: Batch) -> Tensor | None:
        """Return logits [A] of the chance that an output's proposals are accepted; None where a draft tells none."""
        return None

    def gradient_pass(
        self, config: TrainConfig, objective: Objective, frozen: FrozenWeights, *, say: bool = True
    ) -> GradientPass:
        """Return the gradient pass for these settings. `say` prints why a faster pass can't be used.

        Raises InputError for settings that this architecture can't honour. The default is autograd over
        `step_outputs`, for architectures without a hand-written pass.
        """
        require_plain(config, f"--draft {config.draft}, which has none")
        return self.plain_pass(config, objective, frozen)

    def plain_pass(self, config: TrainConfig, objective: Objective, frozen: FrozenWeights) -> PlainPass:
        """Return autograd over `step_outputs`, which is the plain twin of every other pass."""
        steps = self.needs(config).steps

        def loss(batch: Batch) -> Any:
            logits, confidence = partial(self.logits, batch=batch), partial(self.confidence, batch=batch)
            return objective(self.step_outputs(frozen, batch, steps), logits, batch, confidence)

        return PlainPass(self.model, loss)

    @torch.inference_mode()
    def propose(self, frozen: FrozenWeights, batch: Batch, count: int) -> Tensor:
        """Return the draft's greedy choices [S, count] int64 by start row and step, as draft ids; -1 past its steps.

        Step k is fed with the tokens that were realised before it. They equal the draft's own proposals until the first
        proposal that the verifier rejects, and nothing after that one counts, so this serves chains and blocks alike.
        """
        return greedy_choices(self.step_logits(frozen, batch, count), batch, count)

    def step_logits(self, frozen: FrozenWeights, batch: Batch, count: int) -> Iterator[StepLogits]:
        """Yield the draft's logits, in slices of at most LOGIT_ROWS rows, by steps 0 .. count-1 of `step_outputs`."""
        for output in self.step_outputs(frozen, batch, count):
            for first in range(0, output.rows.shape[0], LOGIT_ROWS):
                part = output.take(slice(first, first + LOGIT_ROWS))
                yield StepLogits(part.number, part.rows, self.logits(part, batch))

    def proposer(self, frozen: FrozenWeights, compute: str = "auto") -> Proposer:
        """Return a function that makes the choices of `propose` by the present weights, as `logit_reader` computes."""
        read = self.logit_reader(frozen, compute)

        @torch.inference_mode()
        def choices(batch: Batch, count: int) -> Tensor:
            return greedy_choices(read(batch, count), batch, count)

        return choices

    def logit_reader(self, frozen: FrozenWeights, compute: str = "auto") -> LogitReader:
        """Return a function of a batch and a count that yields what `step_logits` does, by the present weights.

        With `compute` "auto" it computes as training does where it can, which is faster, in the precision of serving.
        With "plain" it is `step_logits`, which is the plain twin. Raises InputError where "fused" can't be honoured.
        """
        if compute == "fused":
            raise InputError("--compute fused: expected a draft with a fused pass, found one that has none")
        return lambda batch, count: self.step_logits(frozen, batch, count)

    @abstractmethod
    def served_form(
        self, state: CheckpointState, vocab_map: VocabMap, *, target: ServingTarget, dtype: torch.dtype
    ) -> ServedForm:
        """Return the form that `target` loads, weights in `dtype`. Raises CheckpointError for what can't be served."""


class Architecture(ABC):
    """One way to build drafts. It has no state."""

    name: str
    """Name on the command line, in checkpoints and in exports."""
    engines: tuple[str, ...]
    """Inference engines that a draft can be exported for."""
    forms: tuple[str, ...] = FORMS[:1]
    """Forms that a draft can be exported in."""
    served_as: tuple[str, ...] = ()
    """Names in `architectures`, or for `speculators_model_type`, of config.json by which an export is recognised."""

    @abstractmethod
    def shape_for(self, config: TrainConfig, verifier: VerifierShape) -> Shape:
        """Return the shape of the draft that these settings ask for. Raises InputError for settings that don't fit."""

    @abstractmethod
    def read_shape(self, values: dict[str, Any]) -> Shape:
        """Return the shape that state.json of a checkpoint holds. Raises InputError where `values` is no such shape."""

    @abstractmethod
    def build(self, shape: Shape, device: torch.device) -> Draft:
        """Return a draft of this shape on `device`, whose weights are not set yet."""

    @abstractmethod
    def peak_bytes(self, shape: Shape, config: TrainConfig, batch: BatchRows) -> dict[str, int]:
        """Return what PyTorch allocates at a training step's peak, in bytes by `MEMORY_KINDS`. It needs no GPU."""

    def why_not_served(self, verifier: VerifierFacts, engine: str) -> str | None:
        """Return why `engine` can't serve drafts of `verifier`, and what to do; None if it can."""
        return None

    def serve_command(self, target: ServingTarget, verifier: str, draft: str, tokens: int, shape: Shape) -> str:
        """Return the command that serves the verifier with a draft of this shape, `tokens` proposed per verify step."""
        return f"serve {verifier} with the {self.name} draft {draft} in {target.engine}, {tokens} tokens per step"

    def draft_tokens(self, shape: Shape, objective: dict[str, Any]) -> int:
        """Return how many tokens a draft was trained to propose per verify step."""
        return int(objective.get("ttt_steps", 1))

    @abstractmethod
    def operations(self, shape: Shape, config: TrainConfig, batch: BatchRows) -> float:
        """Return the floating-point operations that a training step over these rows needs, forward and backward.

        They are those of matrix products and attention, by counting: every start row has all its steps, and a program
        that computes something twice does not need more.
        """

    @abstractmethod
    def served_findings(self, draft: ServedDraft) -> Iterator[Finding]:
        """Yield what is wrong with a served draft of this architecture, whoever exported it."""
