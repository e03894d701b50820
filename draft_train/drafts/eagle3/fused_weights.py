"""The draft's matrices as the fused pass multiplies them, and float32 buffers for their gradients.

Matrices that read the same input are concatenated: those of queries, keys and values, and those of gate and up.
Shape suffixes are those of `fused_pass`, with C = (N + 2G) D, I intermediate, V draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.drafts.matrix_groups import MatrixGroups, weights


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
        self.head_parameters = weights(model.lm_head, model.norm)
        self.mlp_parameters = weights(mlp.gate_proj, mlp.up_proj, mlp.down_proj, layer.post_attention_layernorm)
        held = {id(value) for value in (*self.head_parameters, *self.mlp_parameters)}
        self.attention_parameters = [value for value in model.parameters() if id(value) not in held]
        groups = {
            "fc": weights(model.fc),
            "qkv": weights(attention.q_proj, attention.k_proj, attention.v_proj),
            "output": weights(attention.o_proj),
            "gate_up": weights(mlp.gate_proj, mlp.up_proj),
            "down": weights(mlp.down_proj),
            "head": weights(model.lm_head),
        }
        self._groups = MatrixGroups(groups, model.parameters(), dtype)
        self.matrices = self._matrices(self._groups.copies)
        self.refresh, self.attach = self._groups.refresh, self._groups.attach

    @cached_property
    def gradients(self) -> Matrices:
        """The buffers, made when first asked for. After `attach`, each parameter's `.grad` is a view of one."""
        return replace(self._matrices(self._groups.gradients), vectors=self._groups.other_gradients)

    def _matrices(self, found: dict[str, Tensor]) -> Matrices:
        return Matrices(**found)  # type: ignore[arg-type]  # the groups have its fields' names
