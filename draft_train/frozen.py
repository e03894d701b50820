"""The verifier's frozen weights that a draft needs, from the store: no verifier is ever loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load_file

from store.reader import StoreReader


@dataclass(frozen=True)
class FrozenWeights:
    """embed_tokens [V, H], norm [H], lm_head [D, H], in the verifier's compute dtype."""

    embed_tokens: torch.Tensor
    norm: torch.Tensor
    lm_head: torch.Tensor

    @classmethod
    def load(cls, store: StoreReader, device: torch.device) -> FrozenWeights:
        """Read frozen.safetensors of a store."""
        tensors = load_file(store.files.frozen, device=str(device))
        return cls(embed_tokens=tensors["embed_tokens"], norm=tensors["norm"], lm_head=tensors["lm_head"])
