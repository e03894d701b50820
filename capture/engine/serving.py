"""How vLLM has to be started so that it extracts the states that a capture needs.

vLLM numbers states so that id k is the output of block k - 1, and it writes them in ascending order of their ids. The
last block's output is always asked for, because the final norm and the head turn it into the teacher's logits.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

FOLDER = "/dev/shm/draftcache"
"""Where the command has vLLM write states: memory, which both processes of one machine see."""


def layer_ids(layers: tuple[int, ...], blocks: int) -> tuple[int, ...]:
    """vLLM's ids of the outputs of these blocks and of the last one."""
    return tuple(sorted({*(layer + 1 for layer in layers), blocks}))


def serve_command(verifier: Path, config: Any, ids: tuple[int, ...], max_model_len: int) -> str:
    """The line that starts vLLM for a capture of these layer ids; `config` is the text model's configuration.

    A prompt has to be read whole, in one step: a beginning that comes from a cache of prefixes has no states.
    """
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(ids)}},
    }
    transfer = {
        "kv_connector": "ExampleHiddenStatesConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": FOLDER},
    }
    words = [
        *("vllm", "serve", str(verifier), "--max-model-len", str(max_model_len)),
        *("--no-enable-prefix-caching", "--no-enable-chunked-prefill"),
        *(("--mamba-ssm-cache-dtype", "float32") if _has_mamba(config) else ()),
        *("--speculative-config", json.dumps(speculative), "--kv-transfer-config", json.dumps(transfer)),
    ]
    return shlex.join(words)


def _has_mamba(config: Any) -> bool:
    """Whether blocks of the model carry a state space's state."""
    return any(getattr(config, name, None) is not None for name in ("ssm_state_size", "mamba_d_state", "state_size"))
