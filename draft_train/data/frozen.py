"""The frozen weights of the verifier that a draft needs. They come from the store; no verifier is ever loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import safe_open

from draftcache.store.format.frozen import EMBED_TOKENS, NORM
from draftcache.store.format.head_form import IDENTITY, HeadForm
from draftcache.store.format.teacher import DraftVocab
from draftcache.store.reader import StoreReader


@dataclass(frozen=True)
class FrozenWeights:
    """embed_tokens [V, H], norm [H], lm_head [D, H] of one draft vocabulary, in the verifier's compute dtype.

    `norm` may be float32 beside other tensors in bfloat16, see `draftcache.store.format.frozen`.
    """

    embed_tokens: torch.Tensor
    norm: torch.Tensor
    lm_head: torch.Tensor
    head_form: HeadForm = IDENTITY
    """What makes the verifier's logits of `lm_head`'s products."""

    @classmethod
    def load(cls, store: StoreReader, device: torch.device, vocab: DraftVocab | None = None) -> FrozenWeights:
        """Read frozen.safetensors of a store, with the head's rows of `vocab` (default: the main draft vocabulary)."""
        head = (vocab or store.manifest.teacher_form.main).head
        with safe_open(store.files.frozen, framework="pt", device=str(device)) as file:
            return cls(
                embed_tokens=file.get_tensor(EMBED_TOKENS),
                norm=file.get_tensor(NORM),
                lm_head=file.get_tensor(head),
                head_form=HeadForm.of(store.manifest.verifier),
            )
