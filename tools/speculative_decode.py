"""Plain greedy speculative decoding with a Hugging Face verifier and our draft: slow, and easy to trust.

It shares no code with the unroll: the draft runs one row at a time over lists of its own keys, as an engine's
cache would hold them, and the verifier runs whole prefixes. `draftcache eval` must count the same verify steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from draftcache.draft_train.drafts.eagle3.model import Eagle3Model


@dataclass(frozen=True)
class SpeculativeResult:
    """Generated ids (end-of-turn included, prompt not) and the number of verify steps after the prefill."""

    token_ids: list[int]
    verify_steps: int


class _DraftCache:
    """Keys and values of rows 0..t, made from the verifier's states; a chain's own keys are kept apart."""

    def __init__(self, model: Eagle3Model, embeddings: torch.Tensor) -> None:
        self.model, self.embeddings = model, embeddings
        self.keys: list[torch.Tensor] = []  # [G, D] of step-0 row j at index j
        self.values: list[torch.Tensor] = []

    def _row(self, token: int, hidden: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layer = self.model.midlayer
        inputs = layer.attention_input(self.embeddings[token][None].to(hidden.dtype), hidden[None])
        key, value = layer.self_attn.keys_values(inputs, torch.tensor([position]))
        return inputs, key[:, 0], value[:, 0]

    def extend(self, aux: torch.Tensor, tokens: list[int]) -> None:
        """Add step-0 rows up to the last whose next token is known; `aux` [rows, taps * H] from row 0 on."""
        for row in range(len(self.keys), len(tokens) - 1):
            base = self.model.fc(aux[row][None].to(self.model.fc.weight.dtype))[0]
            _, key, value = self._row(tokens[row + 1], base, row)
            self.keys.append(key)
            self.values.append(value)

    def propose(self, aux: torch.Tensor, tokens: list[int], target_ids: torch.Tensor, count: int) -> list[int]:
        """Chain of `count` draft tokens from row t = len(tokens) - 2, the last whose next token is known."""
        self.extend(aux, tokens)
        row = len(tokens) - 2
        hidden = self.model.fc(aux[row][None].to(self.model.fc.weight.dtype))[0]
        token, proposed = tokens[row + 1], []
        own: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in range(count):
            inputs, key, value = self._row(token, hidden, row + step)
            if step:
                own.append((key, value))
            hidden = self._attend(inputs, hidden, row, step, own)
            token = int(target_ids[int(self.model.logits(hidden[None])[0].argmax())])
            proposed.append(token)
        return proposed

    def _attend(
        self,
        inputs: torch.Tensor,
        hidden: torch.Tensor,
        row: int,
        step: int,
        own: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        shape, layer = self.model.shape, self.model.midlayer
        window = shape.sliding_window or row + step + 1
        first = max(0, row + step - window + 1)
        keys = torch.stack([*self.keys[first : row + 1], *[key for key, _ in own]], dim=1)
        values = torch.stack([*self.values[first : row + 1], *[value for _, value in own]], dim=1)
        query = layer.self_attn.queries(inputs, torch.tensor([row + step]))
        attended = []
        for head in range(shape.num_attention_heads):
            group = head * shape.num_key_value_heads // shape.num_attention_heads
            weights = torch.softmax(query[head, 0] @ keys[group].T / math.sqrt(shape.head_dim), dim=-1)
            attended.append(weights @ values[group])
        return layer.finish(hidden[None], torch.stack(attended)[:, None])[0]


@torch.inference_mode()
def plain_greedy(verifier: Any, prompt: list[int], *, max_new_tokens: int, eos_token_id: int) -> list[int]:
    """Greedy decoding by the verifier alone, one whole-prefix forward per token; ids after the prompt."""
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
    aux_dtype: torch.dtype = torch.float32,
) -> SpeculativeResult:
    """Draft `draft_tokens`, verify them in one forward, keep the agreeing prefix and the verifier's next token.

    `verifier` is a `draftcache.capture.verifier.load.Verifier`; `aux_dtype` rounds its states as the store that the
    draft was trained from does.
    """
    cache = _DraftCache(draft, embeddings)
    choices, aux = _greedy(verifier, prompt, layers)
    tokens = [*prompt, int(choices[-1])]
    limit = len(prompt) + max_new_tokens
    steps = 0
    while tokens[-1] != eos_token_id and len(tokens) < limit:
        proposed = cache.propose(aux.to(aux_dtype), tokens, target_ids, draft_tokens)
        known = len(tokens)
        choices, aux = _greedy(verifier, tokens + proposed, layers)
        steps += 1
        for number in range(draft_tokens + 1):
            tokens.append(int(choices[known - 1 + number]))
            finished = tokens[-1] == eos_token_id or len(tokens) >= limit
            if finished or number == draft_tokens or proposed[number] != tokens[-1]:
                break
    return SpeculativeResult(token_ids=tokens[len(prompt) :], verify_steps=steps)


def _greedy(verifier: Any, tokens: list[int], layers: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The verifier's argmax after each token [L], and its taps [L, taps * H] in float32."""
    from draftcache.capture.verifier.load import head_logits

    states = verifier.forward(torch.tensor(tokens), layers)
    aux = torch.cat([states.taps[layer].float() for layer in layers], dim=-1) if layers else torch.empty(0)
    return head_logits(states.final, verifier.head).argmax(-1).cpu(), aux.cpu()
