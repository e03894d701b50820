"""The frozen weights of the verifier that a draft needs. They come from the store; no verifier is ever loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from safetensors import safe_open

from draftcache.store.format.frozen import EMBED_TOKENS, NORM
from draftcache.store.format.head_form import IDENTITY, HeadForm
from draftcache.store.format.teacher import DraftVocab
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import Location


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


class TrainingSource:
    """A store that runs train from, opened once, and its frozen weights, which are loaded once per device."""

    def __init__(self, location: Location) -> None:
        """Raises what `StoreReader` raises."""
        self.store = StoreReader(location)
        self._loaded: dict[tuple[torch.device, str], FrozenWeights] = {}

    def frozen(self, device: torch.device, vocab: DraftVocab) -> FrozenWeights:
        """Return the frozen weights for a draft vocabulary of the store. Embeddings and norm exist once per device."""
        key = (device, vocab.hash)
        if key not in self._loaded:
            found = FrozenWeights.load(self.store, device, vocab)
            others = (weights for (where, _), weights in self._loaded.items() if where == device)
            if (other := next(others, None)) is not None:
                found = replace(found, embed_tokens=other.embed_tokens, norm=other.norm)
            self._loaded[key] = found
        return self._loaded[key]
