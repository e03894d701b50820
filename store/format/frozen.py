"""frozen.safetensors: the verifier's weights that a trainer needs, so that it never loads the verifier.

Legend: V rows of the verifier's head, H its hidden size, D ids of a draft vocabulary, N the width that the head reads,
which is H in nearly all verifiers.

| tensor       | shape  | meaning                                                               |
|--------------|--------|-----------------------------------------------------------------------|
| embed_tokens | [V, H] | the verifier's token embeddings                                       |
| norm         | [N]    | factors that the verifier's final norm multiplies by                  |
| lm_head      | [D, N] | rows of the verifier's head for the ids of the main draft vocabulary  |
| lm_head_<D>  | [D, N] | the same for the further draft vocabulary of size D                   |

All tensors are in the verifier's compute dtype, save a `norm` that it would round, which is float32: where the module
keeps w and multiplies by 1 + w, say. The head's rows are as the verifier has them; `HeadForm` says what makes logits of
their products. `DraftVocab.head` names the rows of the head. Here one tensor is read
as numpy, without torch and without reading the other tensors.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes  # noqa: F401  (makes numpy, and with it safetensors, know bfloat16)
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from draftcache.store.common.errors import StoreError

FROZEN_NAME = "frozen.safetensors"
"""Name of the file in the store."""
EMBED_TOKENS = "embed_tokens"
"""Name of the tensor [V, H] of token embeddings."""
NORM = "norm"
"""Name of the tensor [H] of the final norm's effective weight."""

_STORED = ("BF16", "F16", "F32")


def require_frozen(path: Path, hidden_size: int, head_size: int, heads: dict[str, int]) -> None:
    """Raise StoreError unless the file holds all tensors of a store, as wide as the verifier and its head.

    `heads` is {tensor: number of rows}, the rows of the verifier's head for each declared draft vocabulary.
    """
    try:
        with safe_open(path, framework="np") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as exc:
        raise StoreError(f"{path}: expected a file of safetensors, could not read it ({exc})") from exc
    expected = {NORM: (head_size,), **{name: (rows, head_size) for name, rows in heads.items()}}
    wrong = sorted(name for name, shape in expected.items() if found.get(name) != shape)
    if wrong or found.get(EMBED_TOKENS, ())[1:] != (hidden_size,):
        raise StoreError(f"{path}: expected {expected} and {EMBED_TOKENS} of width {hidden_size}, found {found}")


def frozen_tensor(path: Path, name: str) -> NDArray[np.float32]:
    """Read one floating-point tensor of the file `path` as float32, exactly.

    Raises StoreError where the file holds no floating-point tensor of this name.
    """
    with safe_open(path, framework="np") as tensors:
        names = list(tensors.keys())
        if name not in names or tensors.get_slice(name).get_dtype() not in _STORED:
            raise StoreError(f"{path}: expected a float tensor {name}, found {sorted(names)}")
        return np.asarray(tensors.get_tensor(name), np.float32)
