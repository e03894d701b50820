"""Plain greedy speculative decoding with a Hugging Face verifier and our draft: slow, but easy to check by reading.

It shares no code with the unroll: the draft runs one row at a time over lists of keys, as an engine's cache would
hold them, and the verifier runs whole prefixes. `draftcache eval` must count the same number of verify steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from draftcache.draft_train.drafts.eagle3.model import Eagle3Model


@dataclass(frozen=True)
class SpeculativeResult:
    """The generated ids (with the end of turn, without the prompt) and the number of verify steps after the prefill."""

    token_ids: list[int]
    verify_steps: int


class _DraftCache:
    """The draft's keys and values of step-0 rows 0 to t, made from the verifier's taps.

    The diagonal keys of a chain (those of its later steps) are kept apart and dropped with the chain.
    """

    def __init__(self, model: Eagle3Model, embeddings: torch.Tensor) -> None:
        self.model, self.embeddings = model, embeddings
        self.keys: list[torch.Tensor] = []  # index j holds the key [G, D] of step-0 row j
        self.values: list[torch.Tensor] = []

    def _row(self, token: int, hidden: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layer = self.model.midlayer
        inputs = layer.attention_input(self.embeddings[token][None].to(hidden.dtype), hidden[None])
        key, value = layer.self_attn.keys_values(inputs, torch.tensor([position]))
        return inputs, key[:, 0], value[:, 0]

    def extend(self, taps: torch.Tensor, tokens: list[int]) -> None:
        """Add the step-0 rows up to the last row whose next token is known.

        `taps` [rows, taps * H] holds the taps from row 0 on.
        """
        for row in range(len(self.keys), len(tokens) - 1):
            base = self.model.fc(taps[row][None].to(self.model.fc.weight.dtype))[0]
            _, key, value = self._row(tokens[row + 1], base, row)
            self.keys.append(key)
            self.values.append(value)

    def propose(self, taps: torch.Tensor, tokens: list[int], target_ids: torch.Tensor, count: int) -> list[int]:
        """Return a chain of `count` draft tokens.

        It begins at row t = len(tokens) - 2, the last row whose next token is known.
        """
        self.extend(taps, tokens)
        row = len(tokens) - 2
        hidden = self.model.fc(taps[row][None].to(self.model.fc.weight.dtype))[0]
        token, proposed = tokens[row + 1], []
        diagonal: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in range(count):
            inputs, key, value = self._row(token, hidden, row + step)
            if step:
                diagonal.append((key, value))
            hidden = self._attend(inputs, hidden, row, step, diagonal)
            token = int(target_ids[int(self.model.logits(hidden[None])[0].argmax())])
            proposed.append(token)
        return proposed

    def _attend(
        self,
        inputs: torch.Tensor,
        hidden: torch.Tensor,
        row: int,
        step: int,
        diagonal: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        shape, layer = self.model.shape, self.model.midlayer
        window = shape.sliding_window or row + step + 1
        first = max(0, row + step - window + 1)
        keys = torch.stack([*self.keys[first : row + 1], *[key for key, _ in diagonal]], dim=1)
        values = torch.stack([*self.values[first : row + 1], *[value for _, value in diagonal]], dim=1)
        query = layer.self_attn.queries(inputs, torch.tensor([row + step]))
        attended = []
        for head in range(shape.num_attention_heads):
            group = head * shape.num_key_value_heads // shape.num_attention_heads
            weights = torch.softmax(query[head, 0] @ keys[group].T / math.sqrt(shape.head_dim), dim=-1)
            attended.append(weights @ values[group])
        return layer.finish(hidden[None], torch.stack(attended)[:, None])[0]


@torch.inference_mode()
def plain_greedy(verifier: Any, prompt: list[int], *, max_new_tokens: int, eos_token_id: int) -> list[int]:
    """Decode greedily by the verifier alone, one whole-prefix forward per token; return the ids after the prompt."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens:
        tokens.append(int(_greedy(verifier, tokens, ())[0][-1]))
        if tokens[-1] == eos_token_id:
            break
    return tokens[len(prompt) :]


@torch.inference_mode()
def speculative_greedy(
    verifier: Any,
    draft: Eagle3Model,
    embeddings: torch.Tensor,
    target_ids: torch.Tensor,
    layers: tuple[int, ...],
    prompt: list[int],
    *,
    max_new_tokens: int,
    eos_token_id: int,
    draft_tokens: int = 5,
    tap_dtype: torch.dtype = torch.float32,
) -> SpeculativeResult:
    """Decode greedily with a draft: each verify step checks `draft_tokens` proposed tokens in one verifier forward.

    A verify step keeps the proposed tokens that agree with the verifier's choices, up to the first difference, and the
    verifier's next token. `verifier` is a `draftcache.capture.verifier.load.Verifier`. Its taps are rounded to
    `tap_dtype`, as the store rounds the taps that the draft was trained on.
    """
    cache = _DraftCache(draft, embeddings)
    choices, taps = _greedy(verifier, prompt, layers)
    tokens = [*prompt, int(choices[-1])]
    limit = len(prompt) + max_new_tokens
    steps = 0
    while tokens[-1] != eos_token_id and len(tokens) < limit:
        proposed = cache.propose(taps.to(tap_dtype), tokens, target_ids, draft_tokens)
        known = len(tokens)
        choices, taps = _greedy(verifier, tokens + proposed, layers)
        steps += 1
        for number in range(draft_tokens + 1):
            tokens.append(int(choices[known - 1 + number]))
            finished = tokens[-1] == eos_token_id or len(tokens) >= limit
            if finished or number == draft_tokens or proposed[number] != tokens[-1]:
                break
    return SpeculativeResult(token_ids=tokens[len(prompt) :], verify_steps=steps)


def _greedy(verifier: Any, tokens: list[int], layers: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the verifier's argmax after each token [L] int64, and its taps [L, taps * H] float32, both on the CPU."""
    from draftcache.capture.verifier.head import head_logits

    states = verifier.forward(torch.tensor(tokens), layers)
    taps = torch.cat([states.taps[layer].float() for layer in layers], dim=-1) if layers else torch.empty(0)
    return head_logits(states.final, verifier.head, verifier.head_form).argmax(-1).cpu(), taps.cpu()
