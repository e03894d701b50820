"""The draft model: one Llama layer over `cat(embedding, verifier state)`, in the classic Eagle3 form.

Parameter names equal those of the exported checkpoint. The embeddings are the verifier's; they are frozen and are no
parameter here.
Shape suffixes: T rows, H hidden, N query heads, G key-value heads, D head width, V draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from draftcache.draft_train.drafts.eagle3.shape import Eagle3Shape
from draftcache.draft_train.drafts.layers import MLP, RMSNorm, draw_weight, linear
from draftcache.draft_train.kernels.rotary import rotary_table, rotate


class Attention(nn.Module):
    """The projections of attention. The unroll decides which keys a row sees, and calls `window_attention`."""

    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = linear(2 * shape.hidden_size, queries)
        self.k_proj = linear(2 * shape.hidden_size, keys)
        self.v_proj = linear(2 * shape.hidden_size, keys)
        self.o_proj = linear(queries, shape.hidden_size)

    def queries(self, inputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return rotated queries [N, T, D] for inputs [T, 2H] at int64 positions [T]."""
        return self._rotated(self.q_proj(inputs), positions)

    def keys_values(self, inputs: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rotated keys, and values, each [G, T, D], for inputs [T, 2H] at int64 positions [T]."""
        return self._rotated(self.k_proj(inputs), positions), self._heads(self.v_proj(inputs))

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        """Project the attention output [N, T, D] to [T, H]."""
        return self.o_proj(attended.transpose(0, 1).flatten(1))  # type: ignore[no-any-return]

    def _rotated(self, projected: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return rotated heads. Angles are computed in float64 from integer positions, the rotation in float32."""
        table = rotary_table(positions, self.shape.head_dim, self.shape.rope_theta, projected.dtype)
        return rotate(self._heads(projected), table)

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.view(projected.shape[0], -1, self.shape.head_dim).transpose(0, 1)


class DraftLayer(nn.Module):
    """The decoder layer. Its attention reads inputs of width 2H, and its residual is the un-normed state."""

    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape.hidden_size, shape.intermediate_size)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.hidden_norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def attention_input(self, embedding: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return `cat(input_layernorm(emb), hidden_norm(h))` [T, 2H] for `embedding` [T, H] and `hidden` [T, H]."""
        return torch.cat((self.input_layernorm(embedding), self.hidden_norm(hidden)), dim=-1)

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Return the layer's un-normed output [T, H] for un-normed `hidden` [T, H] and attention output [N, T, D]."""
        hidden = hidden + self.self_attn.output(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


class Eagle3Model(nn.Module):
    """The weights that an engine loads: `fc`, one layer, `norm` and `lm_head`; with Eagle3.1 `fc_norm`, one per tap."""

    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self.shape = shape
        norms = shape.taps if shape.fc_norm else 0
        self.fc_norm = nn.ModuleList([RMSNorm(shape.hidden_size, shape.rms_norm_eps) for _ in range(norms)])
        self.fc = linear(shape.taps * shape.hidden_size, shape.hidden_size)
        self.midlayer = DraftLayer(shape)
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = linear(shape.hidden_size, shape.draft_vocab_size)

    @torch.no_grad()
    def initialize(self, seed: int, head: torch.Tensor | None = None, norm: torch.Tensor | None = None) -> None:
        """Set matrices to Normal(0, 0.02) from `seed`, the same on every device, and norms to 1.

        The weights of lm_head and norm are `head` [V, H] and `norm` [H] instead where these are given.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            values = draw_weight(parameter.shape, generator)
            given = {"lm_head.weight": head, "norm.weight": norm}.get(name)
            parameter.copy_(values if given is None else given.float())

    def combine(self, taps: torch.Tensor) -> torch.Tensor:
        """Return the state [T, H] that step 0 consumes: `fc` of the taps [T, taps * H], each normed with `fc_norm`."""
        if self.fc_norm:
            parts = taps.chunk(self.shape.taps, dim=-1)
            taps = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(taps)  # type: ignore[no-any-return]

    def carried(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the state [T, H] that the next step consumes, for the layer's un-normed output [T, H]."""
        return self.norm(hidden) if self.shape.norm_output else hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return draft-vocabulary logits [T, V] for the layer's un-normed output [T, H]."""
        return self.lm_head(self.norm(hidden))  # type: ignore[no-any-return]
