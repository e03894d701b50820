"""The block draft: Qwen3-type layers whose queries are a block's slots, over keys and values of the verifier's taps.

`c_t = hidden_norm(fc(taps))` is the context of row t. Every layer projects the context's keys and values from `c_t`
itself, never from a layer's output, so the reach of a draft is its window, however many layers it has. Parameter names
equal those that vLLM loads (`Qwen3DSparkModel`, `DFlashDraftModel`). The verifier's embeddings are no parameter here
unless they are trained; a frozen head is a buffer, so that a checkpoint is complete without the store.
Shape suffixes: R context rows, S blocks, B slots, H hidden, N query heads, G key-value heads, D head width, V draft
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftcache.draft_train.drafts.block.shape import BlockShape
from draftcache.draft_train.drafts.layers import MLP, RMSNorm, draw_weight, linear
from draftcache.draft_train.kernels.rotary import rotary_table, rotate


class BlockAttention(nn.Module):
    """The projections of one layer's attention. The caller decides which keys a slot sees."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = linear(shape.hidden_size, queries)
        self.k_proj = linear(shape.hidden_size, keys)
        self.v_proj = linear(shape.hidden_size, keys)
        self.o_proj = linear(queries, shape.hidden_size)
        self.q_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)
        self.k_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)
        self.attention_sink_bias = (
            nn.Parameter(torch.zeros(shape.num_attention_heads)) if shape.attention_sinks else None
        )

    def queries(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return normed and rotated queries [..., N, D] for states [..., H] at int64 positions [...]."""
        return self._rotated(self.q_norm(self._heads(self.q_proj(states))), positions)

    def keys_values(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return normed and rotated keys, and values, [..., 2, G, D], for states [..., H] at int64 positions [...]."""
        keys = self._rotated(self.k_norm(self._heads(self.k_proj(states))), positions)
        return torch.stack((keys, self._heads(self.v_proj(states))), dim=-3)

    def output(self, attended: Tensor) -> Tensor:
        """Project the attention output [..., N, D] to [..., H]."""
        return self.o_proj(attended.flatten(-2))  # type: ignore[no-any-return]

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], -1, self.shape.head_dim)

    def _rotated(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Return rotated heads. Angles are computed in float64 from integer positions, the rotation in float32."""
        table = rotary_table(positions.flatten(), self.shape.head_dim, self.shape.rope_theta, heads.dtype)
        return rotate(heads, table.view(2, *positions.shape, 1, -1))


class BlockLayer(nn.Module):
    """A decoder layer with norms before attention and MLP."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.self_attn = BlockAttention(shape)
        self.mlp = MLP(shape.hidden_size, shape.intermediate_size)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output [..., H] for its input `hidden` [..., H] and attention output [..., N, D]."""
        hidden = hidden + self.self_attn.output(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


class MarkovHead(nn.Module):
    """A bias of the logits by the token before: `W2 W1[token]`, of low rank."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(shape.vocab_size, shape.markov_rank)
        self.markov_w2 = linear(shape.markov_rank, shape.draft_vocab_size)

    def forward(self, embedded: Tensor) -> Tensor:
        """Return the bias [..., V] for embedded tokens [..., rank]."""
        return self.markov_w2(embedded)  # type: ignore[no-any-return]


class ConfidenceHead(nn.Module):
    """Tells how likely a proposal is accepted, from the state that made it and the token before."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.proj = nn.Linear(shape.hidden_size + shape.markov_rank, 1)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Return the logit [...] of acceptance for normed states [..., H] and embedded tokens [..., rank]."""
        return self.proj(torch.cat((hidden, embedded), dim=-1).to(self.proj.weight.dtype))[..., 0]  # type: ignore[no-any-return]


class FrozenHead(nn.Module):
    """The verifier's head over the draft vocabulary, which no gradient reaches."""

    weight: Tensor
    """[V, H]."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(shape.draft_vocab_size, shape.hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] for normed states [..., H]."""
        return F.linear(hidden, self.weight.to(hidden.dtype))


class BlockModel(nn.Module):
    """The weights that an engine loads: `fc`, `hidden_norm`, the layers, `norm`, and the heads."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.shape = shape
        self.fc = linear(shape.taps * shape.hidden_size, shape.hidden_size)
        self.hidden_norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = linear(shape.hidden_size, shape.draft_vocab_size) if shape.train_head else FrozenHead(shape)
        self.markov_head = MarkovHead(shape) if shape.markov_rank else None
        self.confidence_head = ConfidenceHead(shape) if shape.confidence_head else None
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size) if shape.train_embeddings else None

    def each_layer(self) -> Iterator[BlockLayer]:
        """Yield the layers, the first one first."""
        for layer in self.layers:
            assert isinstance(layer, BlockLayer)
            yield layer

    @torch.no_grad()
    def initialize(self, seed: int, head: Tensor, embeddings: Tensor, norm: Tensor | None = None) -> None:
        """Set matrices to Normal(0, 0.02) from `seed`, the same on every device, norms to 1, sinks and biases to 0.

        The head is `head` [V, H]. Embeddings, where they are trained, start as `embeddings` [vocabulary, H], and the
        norm before the head as `norm` [H] where it is given.
        """
        generator = torch.Generator().manual_seed(seed)
        given = {"lm_head.weight": head, "embed_tokens.weight": embeddings, "norm.weight": norm}
        for name, weight in self.state_dict().items():
            values = given.get(name)
            if values is None:
                values = draw_weight(weight.shape, generator)
            if name.endswith(("bias", "attention_sink_bias")):
                values = torch.zeros(weight.shape)
            weight.copy_(values.float())

    def embed(self, tokens: Tensor, frozen: Tensor) -> Tensor:
        """Return the embeddings [..., H] of tokens [...] int64; `frozen` [vocabulary, H] are the verifier's."""
        return F.embedding(tokens, frozen if self.embed_tokens is None else self.embed_tokens.weight)

    def markov_embed(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Return what the Markov head reads of tokens [T] int64, [T, rank] in the dtype of `like`; rank may be 0."""
        if self.markov_head is None:
            return like.new_empty(len(tokens), 0)
        return self.markov_head.markov_w1(tokens).to(like.dtype)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor, before: Tensor) -> Tensor:
        """Return draft-vocabulary logits [T, V] for un-normed outputs [T, H] and the tokens before, [T] int64."""
        logits: Tensor = self.lm_head(self.norm(hidden))
        if self.markov_head is None:
            return logits
        return logits + self.markov_head(self.markov_embed(before, hidden))  # type: ignore[no-any-return]

    def confidence(self, hidden: Tensor, before: Tensor) -> Tensor:
        """Return logits [T] of acceptance, for the arguments of `logits`. Only the confidence head gets a gradient."""
        assert self.confidence_head is not None, "the shape has one"
        with torch.no_grad():
            normed, embedded = self.norm(hidden), self.markov_embed(before, hidden)
        return self.confidence_head(normed, embedded)  # type: ignore[no-any-return]
