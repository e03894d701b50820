"""The matrices of a block draft as the fused pass multiplies them.

Shape suffixes are those of `fused_pass`, with C = (N + 2G) D, I intermediate, V draft vocabulary, M the Markov rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from draftcache.draft_train.drafts.block.model import BlockLayer, BlockModel
from draftcache.draft_train.drafts.matrix_groups import MatrixGroups, weights
from draftcache.draft_train.kernels.normed_heads import HeadNorms
from draftcache.draft_train.kernels.norms import rms_norm


@dataclass(frozen=True)
class LayerWeights:
    """One layer: its module, its matrices, and the buffers of their gradients."""

    layer: BlockLayer
    norms: HeadNorms
    qkv: Tensor
    """[C, H]."""
    output: Tensor
    """[H, N D]."""
    gate_up: Tensor
    """[2I, H]."""
    down: Tensor
    """[H, I]."""
    gradients: dict[str, Tensor]
    """By the names of the four matrices; empty before the first backward pass."""

    @property
    def queries(self) -> int:
        """N D: the number of rows of `qkv` that make queries."""
        return self.output.shape[1]


class BlockWeights:
    """Copies of a block draft's matrices in the dtype of the products, and the buffers of its gradients."""

    def __init__(self, model: BlockModel, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        groups = {"fc": weights(model.fc)}
        for number, layer in enumerate(model.each_layer()):
            attention, mlp = layer.self_attn, layer.mlp
            groups |= {
                f"{number}.qkv": weights(attention.q_proj, attention.k_proj, attention.v_proj),
                f"{number}.output": weights(attention.o_proj),
                f"{number}.gate_up": weights(mlp.gate_proj, mlp.up_proj),
                f"{number}.down": weights(mlp.down_proj),
            }
        if model.shape.train_head:
            groups["head"] = weights(model.lm_head)
        if model.markov_head is not None:
            groups["markov"] = weights(model.markov_head.markov_w2)
        self.groups = MatrixGroups(groups, model.parameters(), dtype)
        width = model.shape.hidden_size + model.shape.markov_rank
        self.head = model.lm_head.weight.new_zeros(
            model.shape.draft_vocab_size, width, dtype=dtype, requires_grad=False
        )
        """[V, H + M]: what makes logits of normed states and embedded tokens before, side by side."""

    @property
    def fc(self) -> Tensor:
        """[H, taps * H]."""
        return self.groups.copies["fc"]

    def refresh(self) -> None:
        """Copy the parameters."""
        self.groups.refresh()
        hidden = self.model.shape.hidden_size
        self.head[:, :hidden].copy_(self.model.lm_head.weight.detach())
        if self.model.markov_head is not None:
            self.head[:, hidden:].copy_(self.groups.copies["markov"])

    def layers(self, *, gradients: bool) -> list[LayerWeights]:
        """Return the layers, with the buffers of their gradients if asked for."""
        shape, found = self.model.shape, []
        for number, layer in enumerate(self.model.each_layer()):
            names = {name: f"{number}.{name}" for name in ("qkv", "output", "gate_up", "down")}
            attention = layer.self_attn
            norms = HeadNorms(
                attention.q_norm.weight.detach(),
                attention.k_norm.weight.detach(),
                shape.rms_norm_eps,
                shape.num_attention_heads,
                shape.num_key_value_heads,
            )
            found.append(
                LayerWeights(
                    layer=layer,
                    norms=norms,
                    gradients={name: self.groups.gradients[key] for name, key in names.items()} if gradients else {},
                    **{name: self.groups.copies[key] for name, key in names.items()},
                )
            )
        return found

    def head_inputs(self, hidden: Tensor, before: Tensor) -> Tensor:
        """Return what `head` reads [A, H + M], for un-normed outputs [A, H] and the tokens before [A] int64."""
        normed = rms_norm(hidden, self.model.norm.weight, self.model.shape.rms_norm_eps)
        return torch.cat((normed, self.model.markov_embed(before, normed)), dim=-1)

    def embedding(self, module: nn.Embedding) -> Tensor:
        """Return the buffer of the gradient of an embedding's weight."""
        return self.gradient(module.get_parameter("weight"))

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Return the buffer of a parameter that is in no group: a norm, a sink, a bias or an embedding."""
        return self.groups.other_gradients[parameter]
