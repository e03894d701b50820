"""Plain greedy speculative decoding with a Hugging Face verifier and our draft: slow, but easy to check by reading.

It shares no code with the drafts' forward passes: a draft runs one row at a time over lists of keys, as an engine's
cache would hold them, and the verifier runs whole prefixes. `draftcache eval` must count the same number of verify
steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from draftcache.draft_train.drafts.block.model import BlockModel
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.drafts.protocol import Draft
from draftcache.tools.decoding.block_cache import BlockCache
from draftcache.tools.decoding.choice import Choice
from draftcache.tools.decoding.eagle3_cache import Eagle3Cache


class DraftCache(Protocol):
    """A draft with the keys and values of the rows that it has seen of one text."""

    def propose(self, taps: torch.Tensor, tokens: list[int], target_ids: torch.Tensor, count: int) -> list[Choice]:
        """Return `count` draft tokens that follow `tokens`, each with its margin.

        `taps` [rows, taps * H] holds the taps from row 0 on; rows of the last token and later ones are not read.
        `target_ids` [D] int64 maps draft ids to verifier ids.
        """


def has_cache(draft: Draft) -> bool:
    """Return whether the loop can run this draft."""
    return isinstance(draft.model, Eagle3Model | BlockModel)


def draft_cache(draft: Draft, embeddings: torch.Tensor) -> DraftCache:
    """Return an empty cache of a draft for which `has_cache` holds. `embeddings` [V, H] are the verifier's."""
    if isinstance(draft.model, Eagle3Model):
        return Eagle3Cache(draft.model, embeddings)
    assert isinstance(draft.model, BlockModel), "the caller has checked it"
    return BlockCache(draft.model, embeddings)


@dataclass(frozen=True)
class SpeculativeResult:
    """The generated ids (with the end of turn, without the prompt) and the number of verify steps after the prefill."""

    token_ids: list[int]
    verify_steps: int


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
    draft: Draft,
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
    cache = draft_cache(draft, embeddings)
    choices, taps = _greedy(verifier, prompt, layers)
    tokens = [*prompt, int(choices[-1])]
    limit = len(prompt) + max_new_tokens
    steps = 0
    while tokens[-1] != eos_token_id and len(tokens) < limit:
        choices_of_draft = cache.propose(taps.to(tap_dtype), tokens, target_ids, draft_tokens)
        proposed = [choice.token for choice in choices_of_draft]
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
