"""Files of hidden states: dumps of `draftcache probe`, Hugging Face's states, and the states that vLLM extracts.

Only safetensors files are read, without torch. Their values become float32 when they are compared.

The files that vLLM writes, by its source and documentation (`extract_hidden_states` as the speculative method, with the
ExampleHiddenStatesConnector: v1/spec_decode/extract_hidden_states.py,
distributed/kv_transfer/kv_connector/v1/example_hidden_states_connector.py,
docs/features/speculative_decoding/extract_hidden_states.md; release blog and PRs 33736, 46301):

- There is one file per request. It holds `hidden_states` [L, N, H] in the model's dtype (stacked with dim=1: tokens
  first) and `token_ids` [L] int64. It has no layer ids and no metadata: the ids are known only from the engine's
  configuration.
- `token_ids` are the prompt's; with `include_output_tokens` the generated ids follow, without the last one, which no
  forward has read.
- The layer ids are `eagle_aux_hidden_state_layer_ids`: 0 is the embeddings, k the residual stream after k blocks, so
  the output of block i is i + 1, and the last block's output, before the final norm, is num_hidden_layers.
  (EagleModelMixin; patched builds of NemotronH have used the block's own number instead.)
- Entries come in the order of the blocks, in whatever order the ids were configured.
- Hybrid verifiers gave all-zero files before PR 46301.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (makes numpy, and with it safetensors, know bfloat16)
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from draftcache.store.common.errors import InputError
from draftcache.store.common.files import require_file
from draftcache.store.common.strict_json import parse_json

METADATA_KEY = "draftcache_probe"
"""The one key of safetensors metadata, with all details as JSON: several keys would be written in a changing order."""

VERSION = 1
EMBEDDINGS, FINAL_NORM = "embeddings", "final_norm"
EMBEDDINGS_BLOCK = -1
"""The state before block 0 counts as the output of a block -1, so that every convention's offset holds for it too."""

_NUMBERED = re.compile(r"hidden_states[._](\d+)")
_STACKED = "hidden_states"
_DTYPES = ("BF16", "F16", "F32", "F64", "I64", "I32")


def block_tensor(block: int) -> str:
    """Return the name of the tensor that holds a block's output in a dump."""
    return f"hidden_states.{block}"


@dataclass(frozen=True)
class StateTensor:
    """The states [L, H] of one layer, in the file's dtype."""

    name: str
    number: int | None
    """The layer's id in the file's own convention; None for the state after the final norm."""
    values: NDArray[Any]
    """bfloat16, float16, float32 or float64 [L, H]."""

    def rows(self, count: int) -> NDArray[np.float32]:
        """Return the first `count` rows as float32 [count, H]."""
        return self.values[:count].astype(np.float32)


@dataclass(frozen=True)
class StateFile:
    """The states of one forward, and the token ids that it read."""

    path: Path
    token_ids: NDArray[np.int64]
    states: list[StateTensor]
    details: dict[str, Any] | None
    """The metadata of a draftcache dump; None for a file that another program wrote."""
    by_position: bool = False
    """Whether the states were numbered 0, 1, .. because no ids were given."""

    @property
    def hidden_size(self) -> int:
        """The hidden size H."""
        return int(self.states[0].values.shape[1])


def read_dump(path: Path) -> StateFile:
    """Read a dump of `draftcache probe`. Raises InputError for anything else."""
    found = read_states(path)
    if found.details is None:
        raise InputError(
            f"{path}: expected a dump that `draftcache probe --output` wrote, found safetensors without its metadata; "
            "the first file of --compare is ours, the second may be another engine's"
        )
    return found


def read_states(path: Path, *, ids: tuple[int, ...] | None = None, layer_axis: int | None = None) -> StateFile:
    """Read states in any of the forms that this module describes.

    `ids` are the ids of a stacked tensor's entries, in order (default: 0, 1, ..); `layer_axis` is the tensor's axis of
    layers, which is needed if the shapes leave it open. Raises InputError, which names what was expected.
    """
    tensors, metadata = _load_safetensors(path)
    try:
        details = parse_json(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None
    except ValueError as exc:
        raise InputError(f"{path}: expected a dump's description as JSON, found something else ({exc})") from exc
    if details is not None and not isinstance(details, dict):
        raise InputError(f"{path}: expected a dump's description, a JSON object, found {type(details).__name__}")
    if details is not None and details.get("version") != VERSION:
        raise InputError(
            f"{path}: expected a dump of version {VERSION}, found {details.get('version')!r}; dump it again"
        )
    token_ids = _token_ids(path, tensors)
    stacked = _STACKED in tensors
    if stacked and any(_NUMBERED.fullmatch(name) for name in tensors):
        raise InputError(f"{path}: expected one stacked tensor or one per layer, found both: {_listed(tensors)}")
    if stacked:
        states = _unstack(path, tensors[_STACKED], len(token_ids), ids, layer_axis)
    elif ids is not None or layer_axis is not None:
        raise InputError(
            f"{path}: --ids and --axis are about one stacked tensor `{_STACKED}`, found {_listed(tensors)}"
        )
    else:
        states = _named(path, tensors, is_dump=details is not None)
    for state in states:
        _require_rows(path, state, len(token_ids))
    return StateFile(path, token_ids, states, details, by_position=stacked and ids is None)


def _load_safetensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return every tensor of numbers by name, and the metadata. Raises InputError for other files."""
    require_file(path, "a safetensors file")
    try:
        with safe_open(path, framework="np") as file:
            # Tensors of other dtypes, such as masks, are not read.
            names = [name for name in file.keys() if file.get_slice(name).get_dtype() in _DTYPES]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as exc:
        raise InputError(
            f"{path}: expected a safetensors file, found something else ({exc}); pickle files (.pt, .ckpt) are never "
            "read: save the states with safetensors.torch.save_file"
        ) from exc


def _listed(tensors: dict[str, NDArray[Any]]) -> str:
    shown = [f"{name} {list(values.shape)}" for name, values in sorted(tensors.items())]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "") if shown else "no tensors"


def _token_ids(path: Path, tensors: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    values = tensors.get("token_ids", tensors.get("input_ids"))
    if values is None:
        raise InputError(
            f"{path}: expected `token_ids` [L] beside the states, found {_listed(tensors)}; without them nothing shows "
            "that both forwards read the same input: save them too"
        )
    if values.ndim == 2 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != 1 or values.dtype.kind != "i" or not values.size:
        raise InputError(
            f"{path}: expected token_ids [L], int32 or int64, at least one, found {values.dtype} {list(values.shape)}"
        )
    return values.astype(np.int64)


def _named(path: Path, tensors: dict[str, NDArray[Any]], *, is_dump: bool) -> list[StateTensor]:
    """Return the states of a file with one tensor per layer, by ascending id."""
    states = []
    for name, values in tensors.items():
        if match := _NUMBERED.fullmatch(name):
            number: int | None = int(match[1])
        elif is_dump and name in (EMBEDDINGS, FINAL_NORM):
            number = EMBEDDINGS_BLOCK if name == EMBEDDINGS else None
        else:
            continue
        states.append(StateTensor(name, number, values[0] if values.ndim == 3 and values.shape[0] == 1 else values))
    if not states:
        raise InputError(
            f"{path}: expected tensors hidden_states.0, hidden_states.1, .. [L, H], or one stacked tensor "
            f"hidden_states, found {_listed(tensors)}"
        )
    return sorted(states, key=lambda state: (state.number is None, state.number or 0, state.name))


def _unstack(
    path: Path, values: NDArray[Any], length: int, ids: tuple[int, ...] | None, layer_axis: int | None
) -> list[StateTensor]:
    """Return the entries of one tensor [N, L, H] or [L, N, H]. A batch axis of size 1 is dropped."""
    if values.ndim == 4 and 1 in values.shape[:2]:
        values = values[:, 0] if values.shape[1] == 1 else values[0]
    if values.ndim != 3:
        raise InputError(f"{path}: expected hidden_states [N, L, H] or [L, N, H], found {list(values.shape)}")
    axis = _layer_axis(path, values.shape, length, ids, layer_axis)
    layers = np.moveaxis(values, axis, 0)
    if ids is not None and len(ids) != len(layers):
        raise InputError(
            f"{path}: expected --ids for the {len(layers)} layers of hidden_states {list(values.shape)}, "
            f"found {len(ids)}: {list(ids)}"
        )
    numbers = ids or range(len(layers))
    return [StateTensor(f"{_STACKED}[{at}]", number, layers[at]) for at, number in enumerate(numbers)]


def _layer_axis(path: Path, shape: tuple[int, ...], length: int, ids: tuple[int, ...] | None, given: int | None) -> int:
    """Return which of the first two axes counts layers; the other has as many entries as there are tokens, or one less.

    Raises InputError if no axis or either axis may be it.
    """
    if given is not None:
        return given
    possible = [axis for axis in (0, 1) if shape[1 - axis] in (length, length - 1)]
    if len(possible) == 2 and ids is not None:
        possible = [axis for axis in possible if shape[axis] == len(ids)]
    if len(possible) == 1:
        return possible[0]
    raise InputError(
        f"{path}: expected one axis of hidden_states {list(shape)} to count the {length} token ids (or one less), "
        "found " + ("two that may; say with --axis 0 or --axis 1 which one counts the layers" if possible else "none")
    )


def _require_rows(path: Path, state: StateTensor, length: int) -> None:
    shape = state.values.shape
    # Some engines leave the last token out. States with fewer rows belong to another input.
    if len(shape) != 2 or shape[0] not in (length, length - 1) or not all(shape) or state.values.dtype.kind == "i":
        raise InputError(
            f"{path}: {state.name}: expected states [L, H] in floating point with L = {length} as token_ids (or one "
            f"less), found {state.values.dtype} {list(shape)}"
        )
