"""A verifier's identity for the store's manifest, which is the same whether the model was loaded or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from draftcache.capture.verifier.norm import FinalNorm
from draftcache.capture.verifier.weights import full_weights_hash, weights_fingerprint
from draftcache.store.common.files import hash_json, read_json
from draftcache.store.format.head_form import HeadForm


def describe_parts(
    path: Path,
    config: Any,
    *,
    architecture: str,
    layers: int,
    hidden_size: int,
    head: nn.Linear,
    norm: FinalNorm,
    head_form: HeadForm,
    full_hash: bool,
) -> dict[str, Any]:
    """`describe_verifier` from the parts that it needs, `config` being the text model's; no model has to be loaded."""
    raw = read_json(path / "config.json")
    return {
        "name": path.resolve().name,
        "architecture": architecture,
        "model_type": str(config.model_type),
        "config_hash": hash_json(
            {key: raw[key] for key in raw if key not in ("transformers_version", "_name_or_path")}
        ),
        "weights_hash": weights_fingerprint(path),
        **({"full_weights_hash": full_weights_hash(path)} if full_hash else {}),
        "layers": layers,
        "hidden_size": hidden_size,
        **({} if head.in_features == hidden_size else {"head_size": int(head.in_features)}),
        "vocab_size": int(head.weight.shape[0]),
        "rms_norm_eps": norm.eps,
        **norm.to_json(),
        **head_form.to_json(),
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "bos_token_id": getattr(config, "bos_token_id", None),
        "eos_token_id": getattr(config, "eos_token_id", None),
        "pad_token_id": getattr(config, "pad_token_id", None),
    }
