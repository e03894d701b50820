"""States that vLLM extracts, as speculators keeps them: one safetensors file per conversation, `hs_N.safetensors`.

By the source of speculators 0.9 (train/data.py, data_generation/offline.py), hs_connectors 0.9 (fp8_utils.py) and
vLLM's ExampleHiddenStatesConnector:

- `hidden_states` [L, N, H]: the states of N layer ids, of which the last one is `num_hidden_layers`, so the residual
  stream behind the last block: the trainer applies the final norm itself. A layer id k is the output of block k - 1.
- `token_ids` [L] int64. With output tokens, the last one has no state and is left out here.
- with the FP8 connector `hidden_states` is float8_e4m3fn and `hidden_states_scales` [L, 1, 1] float32; both are
  multiplied in bfloat16, as speculators does.
- There is no loss mask and no layer id in the files. The masks are columns of the Arrow dataset beside the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftcache.capture.peers.samples import (
    DamagedSampleError,
    PeerCache,
    PeerSample,
    natural_order,
    require_sample,
)
from draftcache.store.common.errors import InputError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
_SCALES = "hidden_states_scales"


class SpeculatorsReader:
    """Reads speculators' and vLLM's files. Implements `PeerReader`."""

    name = "speculators"
    last_state = "before"

    def open(self, source: Path) -> PeerCache:
        """All safetensors files of the folder, or of its `hidden_states`. Raises InputError where there is none."""
        for folder in (source, source / "hidden_states"):
            if found := sorted(folder.glob("*.safetensors"), key=natural_order):
                return PeerCache(files=found, read=self.read)
        raise InputError(
            f"{source}: expected a folder with hs_0.safetensors, hs_1.safetensors, .. or with hidden_states/ that has "
            "them, found none"
        )

    def read(self, path: Path) -> Iterator[PeerSample]:
        """The one conversation of a file. Raises DamagedSampleError."""
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if not {"token_ids", "hidden_states"} <= names:
                    raise DamagedSampleError(f"{path}: expected token_ids and hidden_states, found {sorted(names)}")
                token_ids = file.get_tensor("token_ids").reshape(-1).numpy().astype(np.int64)
                states = file.get_slice("hidden_states")
                shape, kind = tuple(states.get_shape()), states.get_dtype()
        except (SafetensorError, OSError) as exc:
            raise DamagedSampleError(f"{path}: expected a whole safetensors file, found another ({exc})") from exc
        if len(shape) != 3 or shape[1] < 2:
            raise DamagedSampleError(
                f"{path}: expected hidden_states [{len(token_ids)}, N, H], of N - 1 auxiliary layers and the last one, "
                f"found {list(shape)}"
            )
        if kind == "F8_E4M3" and _SCALES not in names:
            raise DamagedSampleError(f"{path}: expected {_SCALES} beside float8 states, found none")
        yield require_sample(
            PeerSample(
                path=path,
                token_ids=token_ids[: shape[0]] if shape[0] == len(token_ids) - 1 else token_ids,
                loss_mask=None,
                dtype=torch.bfloat16 if kind == "F8_E4M3" else DTYPES.get(kind, torch.float64),
                taps=shape[1] - 1,
                hidden_size=shape[2],
                before_norm=None,
                load=lambda: _states(path),
            ),
            shape,
        )


def _states(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            states = file.get_tensor("hidden_states")
            if states.dtype == torch.float8_e4m3fn:
                states = states.to(torch.bfloat16) * file.get_tensor(_SCALES).to(torch.bfloat16)
    except (SafetensorError, OSError) as exc:
        raise DamagedSampleError(f"{path}: expected a whole safetensors file, found another ({exc})") from exc
    return states[:, :-1], states[:, -1]
