"""Answers of a verifier in this process: transformers' own generation over batches of prompts of like length.

Prompts are padded on the left under an attention mask. That is harmless only if the model masks what it keeps from
token to token, so it is tried on the first prompts: a model whose logits it changes gets batches of equal length, and
one whose logits depend on its neighbours even then gets prompts one by one.

Batches are made of all samples in the input's order, and one that is partly finished is run as a whole: a job that is
resumed forms the batches of an undisturbed one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from draftcache.capture.generate.config import GenerateConfig
from draftcache.capture.generate.samples import Answer, Outcome, Sample
from draftcache.capture.prepare.rows.rejections import RowRejectedError
from draftcache.capture.verifier.load import choose_dtype, load_verifier
from draftcache.capture.verifier.ssm_precision import enforce_contract
from draftcache.capture.verifier.weights import weights_fingerprint
from draftcache.store.common.device import use_device

LOOK_AHEAD = 16
"""Batches' worth of samples that are read ahead and sorted by length."""
_TRIED_PROMPTS, _TRIED_TOKENS = 4, 4
_ALIKE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Relative difference of logits below which two calls compute the same."""


class SeededNoise(LogitsProcessor):  # type: ignore[misc]  # transformers is not looked into
    """Adds Gumbel noise of each row's own generator to its scores: the largest is then a sample of their softmax.

    So a row's tokens depend on its seed, and not on the rows beside it.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the noisy scores [B, V] in float32."""
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log()


class VerifierEngine:
    """Runs a verifier on one device. Implements `samples.Engine`."""

    def __init__(self, config: GenerateConfig, stop_ids: Sequence[int]) -> None:
        """Load the model, frozen, as capture does. `stop_ids` end an answer."""
        assert config.verifier is not None
        self._config = config
        self._stop_ids = list(stop_ids)
        device = use_device(config.device)
        dtype = choose_dtype(config.compute_dtype, device)
        verifier = load_verifier(
            config.verifier, device=device, dtype=dtype, trust_remote_code=config.trust_remote_code
        )
        enforce_contract(verifier.model, config.verifier, allow_fallback=config.allow_fallback)
        self._model = verifier.model
        self._model.generation_config = GenerationConfig()  # the checkpoint's own may hold penalties
        self._dtype = dtype
        self.model = f"{weights_fingerprint(config.verifier)} in {str(dtype).removeprefix('torch.')}"
        length = getattr(verifier.model.config.get_text_config(), "max_position_embeddings", None)
        self.context_tokens = length if isinstance(length, int) and length > 0 else None
        self.batching: str | None = None
        """How prompts are put side by side, once it was tried: padded, equal or alone."""

    @property
    def retried(self) -> int:
        """None is."""
        return 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def outcomes(self, samples: Iterator[Sample], finished: Callable[[Sample], bool]) -> Iterator[Outcome]:
        """Yield outcomes batch by batch."""
        while window := list(islice(samples, LOOK_AHEAD * self._config.batch_size)):
            if self.batching is None and not all(map(finished, window)):
                self.batching = self._tried([sample.prompt.token_ids for sample in window])
            for batch in self._batches(window):
                waiting = [sample for sample in batch if not finished(sample)]
                if not waiting:
                    continue
                answers = dict(zip((sample.key for sample in batch), self._answers(batch), strict=True))
                for sample in waiting:
                    yield sample, answers[sample.key]

    def _batches(self, window: list[Sample]) -> Iterator[list[Sample]]:
        size = 1 if self.batching == "alone" else self._config.batch_size
        ordered = sorted(window, key=lambda sample: len(sample.prompt.token_ids))
        groups = [ordered]
        if self.batching == "equal":
            groups = [list(group) for _, group in groupby(ordered, key=lambda sample: len(sample.prompt.token_ids))]
        for group in groups:
            for first in range(0, len(group), size):
                yield group[first : first + size]

    def _answers(self, batch: list[Sample]) -> list[Answer | RowRejectedError]:
        prompts = [sample.prompt.token_ids for sample in batch]
        output = generate_batch(
            self._model,
            prompts,
            max_new_tokens=self._config.max_new_tokens,
            stop_ids=self._stop_ids,
            processors=self._processors(batch),
        )
        width = max(map(len, prompts))
        return [self._answer(row[width:].tolist()) for row in output.sequences]

    def _answer(self, written: list[int]) -> Answer:
        """The answer of a row, behind whose stop token there is padding."""
        stop = next((at for at, token in enumerate(written) if token in self._stop_ids), None)
        if stop is None:
            return Answer(token_ids=written, finish_reason="length")
        return Answer(token_ids=written[: stop + 1], finish_reason="stop")

    def _processors(self, batch: list[Sample]) -> LogitsProcessorList:
        config = self._config
        found = LogitsProcessorList()
        if config.temperature == 0:
            return found
        found.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            found.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            found.append(TopPLogitsWarper(config.top_p))
        found.append(SeededNoise([sample.seed for sample in batch], self._model.device))
        return found

    def _tried(self, prompts: list[list[int]]) -> str:
        """The way to put prompts side by side that leaves their logits as they are alone."""
        some = sorted(prompts, key=len)
        some = some[:: max(1, -(-len(some) // _TRIED_PROMPTS))]
        shortest = [prompt[: len(some[0])] for prompt in some]
        for name, batch in (("padded", some), ("equal", shortest)):
            if self._difference(batch) <= _ALIKE[self._dtype]:
                return name
            if self._config.progress:
                print(f"generate: this model's logits are others in batches ({name})", file=sys.stderr)
        return "alone"

    def _difference(self, prompts: list[list[int]]) -> float:
        """How far logits in a batch are from those alone, over the first tokens on which both agree."""
        together = self._logits(prompts)
        worst = 0.0
        for row, prompt in enumerate(prompts):
            alone = self._logits([prompt])
            for ours, theirs in zip(together.logits, alone.logits, strict=True):
                difference = (ours[row].float() - theirs[0].float()).norm() / theirs[0].float().norm()
                worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
                if ours[row].argmax() != theirs[0].argmax():
                    break
        return worst

    def _logits(self, prompts: list[list[int]]) -> Any:
        return generate_batch(
            self._model,
            prompts,
            max_new_tokens=_TRIED_TOKENS,
            stop_ids=[],
            processors=LogitsProcessorList(),
            logits=True,
        )


@torch.inference_mode()
def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    processors: LogitsProcessorList,
    logits: bool = False,
    masked: bool = True,
) -> Any:
    """Return transformers' output, whose `sequences` [B, width + new] begin with the prompts, padded on the left.

    The largest score is taken after `processors`. A row that has ended goes on with id 0. With `logits`, the output has
    those of each step, [B, V]. Unless `masked`, the padding is read as if it were text, as the tests' negative control.
    """
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids) if masked else torch.ones_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=logits,
    )
    return model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=settings,
        logits_processor=processors,
    )
