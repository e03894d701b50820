"""The draft's matrices as the fused pass multiplies them, and float32 buffers for their gradients.

Matrices that read the same input are concatenated: those of queries, keys and values, and those of gate and up.
Shape suffixes are those of `fused_pass`, with C = (N + 2G) D, I intermediate, V draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from draftcache.draft_train.drafts.eagle3.model import Eagle3Model


@dataclass(frozen=True)
class Matrices:
    """One set of matrices: the weights, or their gradients."""

    fc: Tensor
    """[H, taps * H]."""
    qkv: Tensor
    """[C, 2H]: columns that read the embeddings, then columns that read the states."""
    output: Tensor
    """[H, N D]."""
    gate_up: Tensor
    """[2I, H]."""
    down: Tensor
    """[H, I]."""
    head: Tensor
    """[V, H]."""
    vectors: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    """Gradients [H] of the norms, by parameter; empty for the weights."""

    @property
    def qkv_tokens(self) -> Tensor:
        """The columns [C, H] that read the embeddings, as a view with row stride 2H."""
        return self.qkv[:, : self.qkv.shape[1] // 2]

    @property
    def qkv_states(self) -> Tensor:
        """The columns [C, H] that read the states, as a view with row stride 2H."""
        return self.qkv[:, self.qkv.shape[1] // 2 :]


class FusedWeights:
    """Copies of a draft's matrices in the dtype of the products, and the buffers where its gradients are added up."""

    def __init__(self, model: Eagle3Model, dtype: torch.dtype) -> None:
        layer = model.midlayer
        attention, mlp = layer.self_attn, layer.mlp
        self.dtype, self.wide = dtype, model.fc.weight.dtype
        self.queries = attention.q_proj.weight.shape[0]
        """N D: the number of rows of qkv that make queries."""
        self.head_parameters = _weights(model.lm_head, model.norm)
        self.mlp_parameters = _weights(mlp.gate_proj, mlp.up_proj, mlp.down_proj, layer.post_attention_layernorm)
        held = {id(value) for value in (*self.head_parameters, *self.mlp_parameters)}
        self.attention_parameters = [value for value in model.parameters() if id(value) not in held]
        self._parameters = list(model.parameters())
        self._groups: dict[str, list[nn.Parameter]] = {
            "fc": _weights(model.fc),
            "qkv": _weights(attention.q_proj, attention.k_proj, attention.v_proj),
            "output": _weights(attention.o_proj),
            "gate_up": _weights(mlp.gate_proj, mlp.up_proj),
            "down": _weights(mlp.down_proj),
            "head": _weights(model.lm_head),
        }
        self.matrices = self._memory(dtype)

    @cached_property
    def gradients(self) -> Matrices:
        """The buffers, made when first asked for. After `attach`, each parameter's `.grad` is a view of one."""
        gradients = self._memory(self.wide)
        gradients.vectors.update({value: torch.zeros_like(value) for value in self._parameters if value.ndim == 1})
        return gradients

    def _memory(self, dtype: torch.dtype) -> Matrices:
        tensors: dict[str, Any] = {}
        for name, group in self._groups.items():
            rows = sum(value.shape[0] for value in group)
            tensors[name] = group[0].new_zeros(rows, group[0].shape[1], dtype=dtype, requires_grad=False)
        return Matrices(**tensors)

    def refresh(self) -> None:
        """Copy the parameters: 6 bytes of memory traffic for each, 1.3 GB at the seed's shape.

        They are copied in every pass, because nothing tells whether they were written since the last one: fused AdamW
        does not raise a tensor's version.
        """
        for name, group in self._groups.items():
            for target, value in zip(_parts(getattr(self.matrices, name), group), group, strict=True):
                target.copy_(value.detach())

    def attach(self) -> None:
        """Make every parameter's `.grad` a view of `gradients`: zeros where it was None, else its present values."""
        for name, group in self._groups.items():
            for part, value in zip(_parts(getattr(self.gradients, name), group), group, strict=True):
                _attach(value, part)
        for vector, part in self.gradients.vectors.items():
            _attach(vector, part)


def _parts(matrix: Tensor, group: list[nn.Parameter]) -> list[Tensor]:
    return list(torch.split(matrix, [value.shape[0] for value in group]))


def _weights(*modules: nn.Module) -> list[nn.Parameter]:
    return [module.get_parameter("weight") for module in modules]


def _attach(parameter: nn.Parameter, memory: Tensor) -> None:
    held = parameter.grad
    if held is None:
        parameter.grad = memory.zero_()
    elif held.data_ptr() != memory.data_ptr():  # another pass made it, and its values count too
        parameter.grad = memory.copy_(held)
