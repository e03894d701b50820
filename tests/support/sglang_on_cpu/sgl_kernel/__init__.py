"""Kernels of SGLang's speculative decoding in torch, for chains of draft tokens (`--speculative-eagle-topk 1`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# SGLang waits for the GPU, empties its cache and names streams whatever the device.
torch.cuda.synchronize = torch.cuda.empty_cache = torch.Tensor.record_stream = lambda *values: None
# It hands a DFlash draft embeddings in bfloat16, whatever the draft's dtype, and Triton's interpreter has no bfloat16.
torch.Tensor.bfloat16 = lambda self: self


def build_tree_kernel_efficient(
    parents: Tensor,
    selected: Tensor,
    lengths: Tensor,
    mask: Tensor,
    positions: Tensor,
    indices: Tensor,
    following: Tensor,
    siblings: Tensor,
    topk: int,
    depth: int,
    count: int,
    mode: int,
) -> None:
    """Write mask, positions and links of chains of `count` tokens behind texts of `lengths` [B] tokens.

    `mask` holds for each text `count` rows of its length and `count` more; `indices`, `following` and `siblings` are
    [B, count]: each token's place in the batch, the next token of its chain, and none beside it.
    """
    assert (topk, int(mode)) == (1, 0)
    begin = 0
    for text, length in enumerate(lengths.tolist()):
        rows = mask[begin : begin + count * (length + count)].view(count, length + count)
        rows[:, length:] = torch.ones(count, count, dtype=torch.bool).tril()
        begin += rows.numel()
        positions[text * count : (text + 1) * count] = length + torch.arange(count)
        indices[text] = text * count + torch.arange(count)
        following[text] = torch.tensor([*range(1, count), -1])
        siblings[text] = -1


def verify_tree_greedy(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Accept each text's draft tokens up to the first that is not the verifier's choice `target_predict` [B, count]."""
    for text in range(candidates.shape[0]):
        last, accepted = 0, 0
        accept_index[text, 0] = retrive_index[text, 0]
        while accepted + 1 < accept_index.shape[1]:
            nearby = int(retrive_next_token[text, last])
            if nearby == -1 or int(candidates[text, nearby]) != int(target_predict[text, last]):
                break
            predicts[int(retrive_index[text, last])] = target_predict[text, last]
            accepted += 1
            accept_index[text, accepted] = retrive_index[text, nearby]
            last = nearby
        accept_token_num[text] = accepted
        predicts[int(retrive_index[text, last])] = target_predict[text, last]


def __getattr__(name: str) -> Any:
    """Any other kernel: it can be imported, and fails when it is called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*values: Any, **named: Any) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} has no form for a CPU here")

    return missing
