"""How long a draft takes to propose K tokens after a verify step, with its keys cached as an engine holds them.

A verify step has added K + 1 rows to each sequence: the most that it can add, which is what engines pad to.
`Eagle3Step` puts their keys into the cache and then makes K one-row steps one after the other, each through layer, norm
and head.
`BlockStep` puts their keys into the cache of every layer, and then runs the slots of one block through the layers and
the head at once; DSpark's Markov head goes through the block from left to right. Both choose greedily.

Projections of one input are one product, and norms, rotation and activation are the kernels of training, so that there
are as few launches as in an engine. Every tensor has a fixed place, so that a CUDA graph can hold the whole proposal.

Shape suffixes: Q sequences, C rows of a sequence's cache, T rows of one product, H hidden, N query heads, G key-value
heads, D head width, V draft vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftcache.draft_train.drafts.block.model import BlockLayer, BlockModel
from draftcache.draft_train.drafts.eagle3.model import DraftLayer, Eagle3Model
from draftcache.draft_train.kernels.normed_heads import HeadNorms, split_normed_heads
from draftcache.draft_train.kernels.norms import rms_norm
from draftcache.draft_train.kernels.rotary import rotary_table, split_heads
from draftcache.draft_train.kernels.swiglu import swiglu


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the model with its matrices in `dtype`, in place. Vectors stay in float32, as in training's kernels."""
    for value in (*model.parameters(), *model.buffers()):
        if value.ndim == 2:
            value.data = value.data.to(dtype)
    return model


class LayerWeights:
    """A decoder layer's matrices, as few as there are products, and its cache."""

    def __init__(self, layer: DraftLayer | BlockLayer, sequences: int, rows: int) -> None:
        """The cache has `rows` rows for each of the sequences; it begins as random keys and values."""
        attention, mlp = layer.self_attn, layer.mlp
        shape = attention.shape
        self.layer, self.heads, self.groups, self.width = (
            layer, shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim,
        )  # fmt: skip
        self.qkv = torch.cat([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
        self.output = attention.o_proj.weight
        self.gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.down = mlp.down_proj.weight
        self.eps = shape.rms_norm_eps
        self.sinks: Tensor | None = getattr(attention, "attention_sink_bias", None)
        self.cache = torch.randn(2, sequences, self.groups, rows, self.width).to(self.qkv)
        """[2, Q, G, C, D]: keys, then values."""

    @property
    def queries(self) -> int:
        """N D: the rows of `qkv` that make queries."""
        return self.heads * self.width

    def keep(self, kv: Tensor, first: int) -> None:
        """Put keys and values [T, 2, G, D], equally many of each sequence, into the cache from row `first` on."""
        sequences = self.cache.shape[1]
        rows = kv.view(sequences, -1, 2, self.groups, self.width).permute(2, 0, 3, 1, 4)
        self.cache[:, :, :, first : first + rows.shape[3]] = rows

    def attend(self, q: Tensor, keys: slice, bias: Tensor | None) -> Tensor:
        """Return the attention [T, N D] of queries [T, N, D] over rows of the cache; `bias` [rows of a sequence, keys].

        A key that a query does not see has the bias -inf.
        """
        sequences, group = self.cache.shape[1], self.heads // self.groups
        grouped = q.view(sequences, -1, self.groups, group, self.width).permute(0, 2, 3, 1, 4)
        rows = grouped.shape[3]
        key, value = self.cache[:, :, :, keys]
        scores = grouped.reshape(sequences, self.groups, group * rows, -1) @ key.transpose(-1, -2)
        scores = scores.view(sequences, self.groups, group, rows, -1) / math.sqrt(self.width)
        if bias is not None:
            scores = scores + bias
        if self.sinks is not None:
            column = self.sinks.to(scores.dtype).view(self.groups, group, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, column), dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        weights = weights[..., : key.shape[2]]
        out = weights.reshape(sequences, self.groups, group * rows, -1) @ value
        by_row: Tensor = out.view(sequences, self.groups, group, rows, self.width).permute(0, 3, 1, 2, 4)
        return by_row.reshape(sequences * rows, self.queries)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output [T, H] for its input `hidden` [T, H] and attention output [T, N D]."""
        after = torch.addmm(hidden, attended, self.output.t())
        normed = rms_norm(after, self.layer.post_attention_layernorm.weight, self.eps)
        return torch.addmm(after, swiglu(normed @ self.gate_up.t()), self.down.t())


class DraftStep(ABC):
    """One proposal of a draft for several sequences of equal length."""

    def __init__(self, model: nn.Module, embeddings: Tensor, target_ids: Tensor, *, count: int, sequences: int) -> None:
        """`model` is one of `in_dtype`. `embeddings` [vocabulary, H] are the verifier's, in the same dtype.

        `target_ids` [V] int64 maps draft ids to the verifier's, and `count` tokens are proposed.
        """
        self.embeddings, self.target_ids, self.count = embeddings, target_ids, count
        self.device, self.sequences, self.new = embeddings.device, sequences, count + 1
        shape: Any = model.shape
        self.taps = torch.randn(sequences * self.new, shape.taps * shape.hidden_size).to(embeddings)
        """[Q * new, taps * H]: the taps of the rows that the verify step has added, sequence by sequence."""
        self.tokens = torch.randint(shape.vocab_size, (sequences, self.new)).to(self.device)
        """[Q, new] int64: the token after each of these rows. The draft continues behind the last one."""

    @abstractmethod
    def __call__(self) -> Tensor:
        """Return the proposals [Q, count] int64, as verifier ids. The same call makes them again."""

    @abstractmethod
    def parameters_read(self) -> int:
        """Return how many weights a call reads, each as often as it is read. Rows of embeddings don't count."""

    def _every(self, rows: int) -> Tensor:
        return torch.arange(rows, device=self.device)


class Eagle3Step(DraftStep):
    """Proposes by an Eagle3 draft."""

    def __init__(
        self, model: Eagle3Model, embeddings: Tensor, target_ids: Tensor, *, count: int, sequences: int, context: int
    ) -> None:
        """`context` rows of each sequence are cached beforehand."""
        super().__init__(model, embeddings, target_ids, count=count, sequences=sequences)
        self.model, self.shape, self.context = model, model.shape, context
        self.weights = LayerWeights(model.midlayer, sequences, context + self.new + count - 1)
        positions = self._every(context + self.new + count)
        self.table = rotary_table(positions, self.shape.head_dim, self.shape.rope_theta, embeddings.dtype)
        self.places = [self._every(sequences * rows) % rows + context for rows in (self.new, 1)]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the proposals; see `DraftStep`."""
        weights, last = self.weights, self.context + self.count
        base = self.model.combine(self.taps)
        inputs = self._inputs(self.tokens.flatten(), base)
        projected = inputs @ weights.qkv[weights.queries :].t()
        weights.keep(self._split(projected, self.places[0], 0)[1], self.context)
        inputs = inputs.view(self.sequences, self.new, -1)[:, -1]
        hidden = base.view(self.sequences, self.new, -1)[:, -1].contiguous()
        proposed: list[Tensor] = []
        for step in range(self.count):
            if step:
                hidden = self.model.carried(hidden)
                inputs = self._inputs(proposed[-1], hidden)
            q, kv = self._split(inputs @ weights.qkv.t(), self.places[1] + self.count + step, weights.heads)
            if step:
                weights.keep(kv, last + step)
            window = self.shape.sliding_window or last + step + 1
            seen = slice(max(0, last + step + 1 - window), last + step + 1)
            hidden = weights.finish(hidden, weights.attend(q, seen, None))
            normed = rms_norm(hidden, self.model.norm.weight, weights.eps)
            proposed.append(self.target_ids[(normed @ self.model.lm_head.weight.t()).argmax(-1)])
        return torch.stack(proposed, dim=1)

    def _inputs(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        layer, eps = self.weights.layer, self.weights.eps
        assert isinstance(layer, DraftLayer)
        embedded = F.embedding(tokens, self.embeddings)
        normed = (
            rms_norm(embedded, layer.input_layernorm.weight, eps),
            rms_norm(hidden, layer.hidden_norm.weight, eps),
        )
        return torch.cat(normed, dim=-1)

    def _split(self, projected: Tensor, places: Tensor, queries: int) -> tuple[Tensor, Tensor]:
        kv = projected.new_empty(len(projected), 2, self.weights.groups, self.weights.width)
        return split_heads(projected, self.table, places, queries, kv, self._every(len(projected))), kv

    def parameters_read(self) -> int:
        """Return the weights of a call; see `DraftStep`. Layer, norm and head are read for every token."""
        every = sum(value.numel() for value in self.model.parameters())
        once = sum(value.numel() for module in (self.model.fc, self.model.fc_norm) for value in module.parameters())
        return once + self.count * (every - once)


class BlockStep(DraftStep):
    """Proposes by a DFlash or DSpark draft."""

    def __init__(
        self, model: BlockModel, embeddings: Tensor, target_ids: Tensor, *, count: int, sequences: int, context: int
    ) -> None:
        """`context` rows of each sequence are cached beforehand."""
        super().__init__(model, embeddings, target_ids, count=count, sequences=sequences)
        self.model, self.shape, self.context = model, model.shape, context
        if model.embed_tokens is not None:
            self.embeddings = model.embed_tokens.weight
        self.slots, self.anchor = self.shape.slots(count), context + self.new
        self.layers = [LayerWeights(layer, sequences, self.anchor + self.slots) for layer in model.each_layer()]
        positions = self._every(self.anchor + self.slots)
        self.table = rotary_table(positions, self.shape.head_dim, self.shape.rope_theta, embeddings.dtype)
        self.new_places = self._every(sequences * self.new) % self.new + context
        self.slot_places = self._every(sequences * self.slots) % self.slots + self.anchor
        self.biases = [self._bias(number) for number in range(len(self.layers))]
        self.inputs = torch.full((sequences, self.slots), self.shape.mask_token_id, device=self.device)

    def _bias(self, number: int) -> tuple[slice, Tensor]:
        """Return the cache's rows that a layer's slots can see, and the bias [slots, keys] that hides some of them."""
        window = self.shape.window if self.shape.layer_types[number] == "sliding" else None
        first = 0 if window is None else max(0, self.anchor + 1 - window)
        keys = self._every(self.anchor + self.slots)[first:]
        own = self._every(self.slots)[:, None] + self.anchor
        seen = (own - keys).abs() < window if window is not None else torch.ones_like(own - keys, dtype=torch.bool)
        if self.shape.causal[number]:
            seen &= keys <= own
        bias = torch.zeros(seen.shape, device=self.device, dtype=self.embeddings.dtype)
        return slice(first, None), bias.masked_fill_(~seen, -math.inf)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the proposals; see `DraftStep`."""
        model, eps = self.model, self.shape.rms_norm_eps
        context = rms_norm(self.taps @ model.fc.weight.t(), model.hidden_norm.weight, eps)
        self.inputs[:, 0] = self.tokens[:, -1]
        hidden = F.embedding(self.inputs.flatten(), self.embeddings)
        for weights, layer, (keys, bias) in zip(self.layers, model.each_layer(), self.biases, strict=True):
            added = context @ weights.qkv[weights.queries :].t()
            weights.keep(self._split(layer, added, self.new_places, 0)[1], self.context)
            projected = rms_norm(hidden, layer.input_layernorm.weight, eps) @ weights.qkv.t()
            q, kv = self._split(layer, projected, self.slot_places, weights.heads)
            weights.keep(kv, self.anchor)
            hidden = weights.finish(hidden, weights.attend(q, keys, bias))
        hidden = hidden.view(self.sequences, self.slots, -1)[:, self.shape.bonus_anchor :].reshape(-1, hidden.shape[1])
        logits = rms_norm(hidden, model.norm.weight, eps) @ model.lm_head.weight.t()
        return self._chosen(logits.view(self.sequences, self.count, -1))

    def _chosen(self, logits: Tensor) -> Tensor:
        """Return the choices [Q, count] for logits [Q, count, V] without the Markov head's bias."""
        markov = self.model.markov_head
        if markov is None:
            return self.target_ids[logits.argmax(-1)]
        before, proposed = self.tokens[:, -1], []
        for slot in range(self.count):
            bias = F.embedding(before, markov.markov_w1.weight) @ markov.markov_w2.weight.t()
            before = self.target_ids[(logits[:, slot] + bias).argmax(-1)]
            proposed.append(before)
        return torch.stack(proposed, dim=1)

    def _split(self, layer: BlockLayer, projected: Tensor, places: Tensor, queries: int) -> tuple[Tensor, Tensor]:
        norms = HeadNorms(
            layer.self_attn.q_norm.weight, layer.self_attn.k_norm.weight, self.shape.rms_norm_eps, queries,
            self.shape.num_key_value_heads,
        )  # fmt: skip
        return split_normed_heads(projected, norms, self.table, places)

    def parameters_read(self) -> int:
        """Return the weights of a call; see `DraftStep`. All are read once, but the Markov head's for every token."""
        modules = [self.model.fc, self.model.hidden_norm, self.model.layers, self.model.norm]
        once = sum(value.numel() for module in modules for value in module.parameters())
        markov = self.model.markov_head
        return (
            once
            + self.model.lm_head.weight.numel()
            + (0 if markov is None else self.count * markov.markov_w2.weight.numel())
        )


def draft_step(
    model: nn.Module, embeddings: Tensor, target_ids: Tensor, *, count: int, sequences: int, context: int
) -> DraftStep:
    """Return one proposal of a draft; the arguments are those of `DraftStep` and `Eagle3Step`."""
    given: dict[str, Any] = {"count": count, "sequences": sequences, "context": context}
    if isinstance(model, Eagle3Model):
        return Eagle3Step(model, embeddings, target_ids, **given)
    assert isinstance(model, BlockModel), "there are no other drafts"
    return BlockStep(model, embeddings, target_ids, **given)
