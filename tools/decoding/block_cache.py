"""A block draft that runs one slot at a time over lists of keys, as an engine's cache would hold them."""

from __future__ import annotations

import math

import torch

from draftcache.draft_train.drafts.block.model import BlockLayer, BlockModel
from draftcache.tools.decoding.choice import Choice, choose


class BlockCache:
    """The keys and values of every layer for context rows 0 to t, made from the verifier's taps.

    Those of a block's slots are kept apart and dropped with the block.
    """

    def __init__(self, model: BlockModel, embeddings: torch.Tensor) -> None:
        """`embeddings` [V, H] are the verifier's."""
        self.model = model
        self.embeddings = embeddings if model.embed_tokens is None else model.embed_tokens.weight
        self.context: list[list[torch.Tensor]] = [[] for _ in model.each_layer()]
        """By layer, keys and values [2, G, D] of each context row."""

    def _extend(self, taps: torch.Tensor, rows: int) -> None:
        first = len(self.context[0])
        states = self.model.hidden_norm(self.model.fc(taps[first:rows].to(self.model.fc.weight.dtype)))
        for layer, kept in zip(self.model.each_layer(), self.context, strict=True):
            kept += layer.self_attn.keys_values(states, torch.arange(first, rows)).unbind()

    def propose(self, taps: torch.Tensor, tokens: list[int], target_ids: torch.Tensor, count: int) -> list[Choice]:
        """Return a block of `count` draft tokens; see `loop.DraftCache`. Its anchor is the last of `tokens`."""
        before = tokens[-1]
        proposed: list[Choice] = []
        for state in self.states(taps, tokens, count):
            logits = self.model.logits(state[None], torch.tensor([before]))[0]
            proposed.append(choose(logits, target_ids))
            before = proposed[-1].token
        return proposed

    def states(self, taps: torch.Tensor, tokens: list[int], count: int) -> list[torch.Tensor]:
        """Return the last layer's un-normed outputs [H] of the slots that propose `count` tokens after `tokens`."""
        shape, anchor = self.model.shape, len(tokens) - 1
        self._extend(taps, anchor)
        inputs = [tokens[-1]] + [shape.mask_token_id] * (shape.slots(count) - 1)
        states = [self.embeddings[token].to(self.model.fc.weight.dtype) for token in inputs]
        for number, layer in enumerate(self.model.each_layer()):
            normed = [layer.input_layernorm(state) for state in states]
            own = [layer.self_attn.keys_values(state, torch.tensor(anchor + slot)) for slot, state in enumerate(normed)]
            states = [
                layer.finish(states[slot], self._attend(layer, number, normed[slot], anchor, slot, own))
                for slot in range(len(states))
            ]
        return states[shape.bonus_anchor :]

    def _attend(
        self, layer: BlockLayer, number: int, state: torch.Tensor, anchor: int, slot: int, own: list[torch.Tensor]
    ) -> torch.Tensor:
        """Return the attention output [N, D] of one slot."""
        shape, position = self.model.shape, anchor + slot
        window = shape.window if shape.layer_types[number] == "sliding" else None
        seen = [kept for row, kept in enumerate(self.context[number]) if window is None or position - row < window]
        for other, kept in enumerate(own):
            in_window = window is None or abs(other - slot) < window
            if in_window and (other <= slot or not shape.causal[number]):
                seen.append(kept)
        query = layer.self_attn.queries(state, torch.tensor(position))
        sinks = layer.self_attn.attention_sink_bias
        keys, values = torch.stack(seen, dim=2)
        attended = []
        for head in range(shape.num_attention_heads):
            group = head * shape.num_key_value_heads // shape.num_attention_heads
            scores = keys[group] @ query[head] / math.sqrt(shape.head_dim)
            if sinks is not None:
                scores = torch.cat((scores, sinks[head][None]))
            weights = torch.softmax(scores, dim=-1)[: len(seen)]
            attended.append(weights @ values[group])
        return torch.stack(attended)
