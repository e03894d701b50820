"""The draft: one Llama layer over `cat(embedding, verifier state)`, in the classic Eagle3 form.

Parameter names are those of the exported checkpoint. Embeddings are the verifier's, frozen, and no parameter.
Shape suffixes: T rows, H hidden, N query heads, G key-value heads, D head width, V draft vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from draftcache.draft_train.drafts.eagle3.shape import Eagle3Shape
from draftcache.draft_train.kernels.rotary import rotary_table, rotate


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in the weight's dtype (float32) whatever the autocast dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H], in the input's dtype."""
        return F.rms_norm(hidden.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(hidden.dtype)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    """Projections only: which keys a row sees is the unroll's business."""

    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = _linear(2 * shape.hidden_size, queries)
        self.k_proj = _linear(2 * shape.hidden_size, keys)
        self.v_proj = _linear(2 * shape.hidden_size, keys)
        self.o_proj = _linear(queries, shape.hidden_size)

    def queries(self, inputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[T, 2H] at int64 positions [T] -> rotated queries [N, T, D]."""
        return self._rotated(self.q_proj(inputs), positions)

    def keys_values(self, inputs: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, 2H] at int64 positions [T] -> rotated keys and values, each [G, T, D]."""
        return self._rotated(self.k_proj(inputs), positions), self._heads(self.v_proj(inputs))

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        """[N, T, D] -> [T, H]."""
        return self.o_proj(attended.transpose(0, 1).flatten(1))  # type: ignore[no-any-return]

    def _rotated(self, projected: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Angles are float64 from integer positions, the rotation is float32."""
        table = rotary_table(positions, self.shape.head_dim, self.shape.rope_theta, projected.dtype)
        return rotate(self._heads(projected), table)

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.view(projected.shape[0], -1, self.shape.head_dim).transpose(0, 1)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self.gate_proj = _linear(shape.hidden_size, shape.intermediate_size)
        self.up_proj = _linear(shape.hidden_size, shape.intermediate_size)
        self.down_proj = _linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))  # type: ignore[no-any-return]


class DraftLayer(nn.Module):
    """The decoder layer: its attention reads 2H inputs, its residual is the un-normed state."""

    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.hidden_norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def attention_input(self, embedding: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """`cat(input_layernorm(emb), hidden_norm(h))`: [T, H] and [T, H] -> [T, 2H]."""
        return torch.cat((self.input_layernorm(embedding), self.hidden_norm(hidden)), dim=-1)

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Residual, then MLP: un-normed `hidden` [T, H] and attention output [N, T, D] -> un-normed output [T, H]."""
        hidden = hidden + self.self_attn.output(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


class Eagle3Model(nn.Module):
    """`fc`, one layer, `norm`, `lm_head`: the tensors that an engine loads."""

    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self.shape = shape
        self.fc = _linear(shape.taps * shape.hidden_size, shape.hidden_size)
        self.midlayer = DraftLayer(shape)
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = _linear(shape.hidden_size, shape.draft_vocab_size)

    @torch.no_grad()
    def initialize(self, seed: int, head: torch.Tensor | None = None, norm: torch.Tensor | None = None) -> None:
        """Normal(0, 0.02) matrices from `seed`, the same on every device; the head's rows and the norm if given."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                values = torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator)
                parameter.copy_(head.float() if name == "lm_head.weight" and head is not None else values)
            else:
                parameter.copy_(
                    norm.float() if name == "norm.weight" and norm is not None else torch.ones_like(parameter)
                )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Un-normed layer output [T, H] -> draft-vocabulary logits [T, V]."""
        return self.lm_head(self.norm(hidden))  # type: ignore[no-any-return]
