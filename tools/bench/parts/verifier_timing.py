"""How long a verifier takes for a step of a few tokens behind a cache, by transformers' own code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from draftcache.tools.bench.parts.replayed import timed_ms


class VerifierClock:
    """A verifier of a Hugging Face directory, in the dtype in which it is timed."""

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
        """`directory` holds a causal language model with its weights."""
        from transformers import AutoModelForCausalLM

        self.device = device
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()

    def step_ms(self, tokens: int, *, sequences: int, context: int) -> tuple[float, str]:
        """Return the milliseconds of a step of `tokens` tokens of each sequence, and how they were measured.

        `context` tokens of each sequence are in the cache.
        """
        return timed_ms(self._step(tokens, sequences, context), self.device)

    @torch.inference_mode()
    def _step(self, tokens: int, sequences: int, context: int) -> Callable[[], Any]:
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        ids = torch.randint(vocabulary, (sequences, context + tokens)).to(self.device)
        # transformers 5.24 names it `cache`, earlier versions `past_key_values`.
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        cache = self.model(ids[:, :context], use_cache=True, logits_to_keep=1)[name]
        # A step replaces the tensors of the cache's layers. Afterwards they are put back, so that every step is the
        # same. Recurrent states that a model changes in place go on, which takes the same time.
        layers = [(layer, dict(vars(layer))) for layer in getattr(cache, "layers", [])]

        @torch.inference_mode()
        def step() -> Any:
            logits = self.model(ids[:, context:], use_cache=True, **{name: cache})["logits"]
            for layer, held in layers:
                vars(layer).clear()
                vars(layer).update(held)
            return logits

        return step
