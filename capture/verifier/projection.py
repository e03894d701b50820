"""Embedding tables and heads of another width than the blocks, with the linear projections between folded into them.

Some models keep their vocabulary's side narrow (OPT 350M, small ELECTRA, RemBERT): `blocks(P_in e)` and `W P_out h`. A
draft reads states of the blocks' width and tokens of the same width, so the table is stored as `E P_in^T` and the head
as `W P_out`. Both are the model's own linear maps: the self-check compares the folded head's logits with the model's.
A head that has a norm of its own behind such a projection, and so reads states of another width, stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from draftcache.store.common.errors import InputError


@dataclass(frozen=True)
class VocabularySides:
    """What stands between a model's vocabulary and its blocks."""

    embeddings: nn.Embedding
    """[V, H], the blocks' width."""
    head: nn.Linear
    """What makes logits of the final norm's output."""
    reader: nn.Module
    """The module that reads the final norm's output: the head, or the projection that is folded into it."""


@dataclass
class _Calls:
    """The linear layers outside of the blocks in the order of their calls, with their output; what the head read."""

    layers: list[tuple[nn.Linear, Tensor]] = field(default_factory=list)
    before_blocks: list[nn.Linear] = field(default_factory=list)
    read: list[Tensor] = field(default_factory=list)


def vocabulary_sides(model: Any, blocks: nn.ModuleList, embeddings: nn.Embedding, head: nn.Linear) -> VocabularySides:
    """Return embeddings and head of a loaded model, folded where their width is not the blocks'.

    Raises InputError where an embedding table of another width is not projected by a linear layer.
    """
    hidden = getattr(model.config.get_text_config(), "hidden_size", None)
    if hidden is None or hidden == embeddings.embedding_dim == head.in_features:
        return VocabularySides(embeddings, head, head)
    calls = _linear_calls(model, blocks, head)
    if hidden != embeddings.embedding_dim:
        shape = (hidden, embeddings.embedding_dim)
        projections = [layer for layer in calls.before_blocks if layer.weight.shape == shape]
        if len(projections) != 1:
            raise InputError(
                f"{type(model).__name__}: expected embeddings of the blocks' {hidden} channels, or one linear "
                f"projection to them before the blocks, found embeddings of {embeddings.embedding_dim} and "
                f"{len(projections)} such projections; a draft reads both side by side, so use another verifier"
            )
        embeddings = _folded_table(embeddings, projections[0])
    for layer, output in calls.layers:
        if calls.read and layer.in_features == hidden != head.in_features and _same(output, calls.read[-1]):
            return VocabularySides(embeddings, _folded_head(layer, head), layer)
    return VocabularySides(embeddings, head, head)


@torch.inference_mode()
def _linear_calls(model: Any, blocks: nn.ModuleList, head: nn.Linear) -> _Calls:
    calls = _Calls()
    inside = {id(module) for module in blocks.modules()}

    def begin_blocks() -> None:
        calls.before_blocks = [layer for layer, _ in calls.layers]

    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in inside]
    handles = [
        layer.register_forward_hook(lambda module, _inputs, output: calls.layers.append((module, output)))
        for layer in linear
        if layer is not head
    ]
    handles.append(blocks[0].register_forward_pre_hook(lambda *_: begin_blocks()))
    handles.append(head.register_forward_pre_hook(lambda _module, inputs: calls.read.append(inputs[0])))
    token_ids = torch.ones(1, 4, dtype=torch.int64, device=head.weight.device)
    try:
        model(input_ids=token_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _same(made: Tensor, read: Tensor) -> bool:
    return made.shape == read.shape and made.data_ptr() == read.data_ptr()


@torch.no_grad()
def _folded_table(embeddings: nn.Embedding, project: nn.Linear) -> nn.Embedding:
    weight = embeddings.weight.float() @ project.weight.float().T
    rows, width = weight.shape
    table = nn.Embedding(rows, width, device="meta")
    table.weight = nn.Parameter(weight.to(embeddings.weight.dtype), requires_grad=False)
    return table


@torch.no_grad()
def _folded_head(project: nn.Linear, head: nn.Linear) -> nn.Linear:
    rows = head.weight.float()
    bias = None if head.bias is None else head.bias.float()
    if project.bias is not None:
        added = rows @ project.bias.float()
        bias = added if bias is None else bias + added
    folded = nn.Linear(project.in_features, head.out_features, bias=bias is not None, device="meta")
    folded.weight = nn.Parameter((rows @ project.weight.float()).to(head.weight.dtype), requires_grad=False)
    if bias is not None:
        folded.bias = nn.Parameter(bias.to(head.weight.dtype), requires_grad=False)
    return folded
