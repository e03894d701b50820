"""An Eagle3 draft that runs one row at a time over lists of keys, as an engine's cache would hold them."""

from __future__ import annotations

import math

import torch

from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.tools.decoding.choice import Choice, choose


class Eagle3Cache:
    """The draft's keys and values of step-0 rows 0 to t, made from the verifier's taps.

    The diagonal keys of a chain (those of its later steps) are kept apart and dropped with the chain.
    """

    def __init__(self, model: Eagle3Model, embeddings: torch.Tensor) -> None:
        self.model, self.embeddings = model, embeddings
        self.keys: list[torch.Tensor] = []  # index j holds the key [G, D] of step-0 row j
        self.values: list[torch.Tensor] = []

    def _rows(
        self, tokens: list[int], hidden: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return attention's input, keys and values of rows with hidden [rows, H], the first one at position `first`.

        `tokens` are those after each row.
        """
        layer = self.model.midlayer
        inputs = layer.attention_input(self.embeddings[tokens].to(hidden.dtype), hidden)
        return inputs, *layer.self_attn.keys_values(inputs, torch.arange(first, first + len(tokens)))

    def extend(self, taps: torch.Tensor, tokens: list[int]) -> None:
        """Add the step-0 rows up to the last row whose next token is known.

        `taps` [rows, taps * H] holds the taps from row 0 on.
        """
        first, rows = len(self.keys), len(tokens) - 1
        base = self.model.combine(taps[first:rows].to(self.model.fc.weight.dtype))
        _, keys, values = self._rows(tokens[first + 1 :], base, first)
        self.keys += keys.unbind(dim=1)
        self.values += values.unbind(dim=1)

    def propose(self, taps: torch.Tensor, tokens: list[int], target_ids: torch.Tensor, count: int) -> list[Choice]:
        """Return a chain of `count` draft tokens; see `loop.DraftCache`.

        It begins at row t = len(tokens) - 2, the last row whose next token is known.
        """
        self.extend(taps, tokens)
        row = len(tokens) - 2
        hidden = self.model.combine(taps[row][None].to(self.model.fc.weight.dtype))[0]
        token = tokens[row + 1]
        proposed: list[Choice] = []
        diagonal: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in range(count):
            inputs, key, value = self._rows([token], hidden[None], row + step)
            if step:
                diagonal.append((key[:, 0], value[:, 0]))
            hidden = self._attend(inputs, hidden, row, step, diagonal)
            proposed.append(choose(self.model.logits(hidden[None])[0], target_ids))
            token = proposed[-1].token
            hidden = self.model.carried(hidden)
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
