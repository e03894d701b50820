"""A verifier of a type that transformers does not know: what config.json and the names of its tensors say of it.

An engine may serve a new type of model before transformers has a class for it. Embeddings, final norm and head are then
the tensors of the usual names, and the norm an RMS norm with weight w or 1 + w; numbers of the configuration may scale
or cap the logits. Which it is is not assumed: the candidate is taken whose logits are the engine's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from draftcache.capture.peers.verifier_parts import StoredTensors, VerifierParts
from draftcache.capture.verifier.blocks import block_count
from draftcache.capture.verifier.head import candidate_forms
from draftcache.capture.verifier.load import load_config
from draftcache.capture.verifier.norm import measure_norm
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import read_json

_EMBEDDINGS = (
    "embed_tokens.weight",
    "embeddings.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "wte.weight",
)
_HEADS = ("lm_head.weight", "output.weight")
_NORMS = ("norm.weight", "norm_f.weight", "final_layernorm.weight", "ln_f.weight")
_EPSILONS = ("rms_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon", "layer_norm_eps")


def is_unknown(path: Path) -> bool:
    """Whether transformers has no class for the type that config.json names, nor does the checkpoint bring one."""
    raw = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    return "model_type" in raw and raw["model_type"] not in transformers.CONFIG_MAPPING and "auto_map" not in raw


def config_of(path: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration of the text model, as values without a class where the type is unknown. Raises InputError."""
    if not is_unknown(path):
        known: PretrainedConfig = load_config(path, trust_remote_code=trust_remote_code)
        return known
    raw = read_json(path / "config.json")
    try:
        return PretrainedConfig(**{"model_type": raw["model_type"]} | raw.get("text_config", raw))
    except Exception as exc:  # whatever values make transformers raise
        raise InputError(f"{path / 'config.json'}: expected a model's configuration, found another ({exc})") from exc


@torch.inference_mode()
def read_by_names(
    path: Path, config: PretrainedConfig, dtype: torch.dtype, off: Callable[[VerifierParts], float]
) -> VerifierParts:
    """The parts of a directory of an unknown type, of which `off` says how far their logits are from the engine's.

    Raises InputError where a tensor can't be told.
    """
    hidden, vocab = int(config.hidden_size), int(config.vocab_size)
    stored = StoredTensors(path)
    table = _read(path, stored, _EMBEDDINGS, (vocab, hidden))
    embeddings = nn.Embedding(vocab, hidden, device="meta")
    embeddings.weight = nn.Parameter(table.to(dtype), requires_grad=False)
    tied = bool(getattr(config, "tie_word_embeddings", False)) and not _named(stored, _HEADS, (vocab, hidden))
    head = nn.Linear(hidden, vocab, bias=False, device="meta")
    head.weight = nn.Parameter(table if tied else _read(path, stored, _HEADS, (vocab, hidden)), requires_grad=False)
    weight, eps = _read(path, stored, _NORMS, (hidden,)), _epsilon(path, config)
    architecture = read_json(path / "config.json").get("architectures") or [str(config.model_type)]
    found = []
    for added, form in itertools.product((0.0, 1.0), candidate_forms(config)):
        norm = _RmsNorm(weight, added, eps).to(dtype)
        parts = VerifierParts(
            config=config, architecture=str(architecture[0]), layers=int(block_count(config) or 0),
            embeddings=embeddings, final_norm=norm, head=head.to(dtype), norm=measure_norm(norm, config, hidden),
            head_form=form,
        )  # fmt: skip
        found.append(parts)
    return min(found, key=off)


class _RmsNorm(nn.Module):
    """`(added + w) * x / sqrt(mean(x^2) + eps)`, in float32."""

    def __init__(self, weight: Tensor, added: float, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps, self._added = eps, added

    def forward(self, states: Tensor) -> Tensor:
        """Normed states [.., H] in the dtype of `states`."""
        wide = states.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return ((self._added + self.weight.float()) * wide).to(states.dtype)


def _named(stored: StoredTensors, names: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    return [name for name in names if stored.candidates(name, shape)]


def _read(path: Path, stored: StoredTensors, names: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
    found = _named(stored, names, shape)
    if len(found) != 1:
        raise InputError(
            f"{path}: expected one tensor {list(shape)} outside of blocks named like one of {list(names)}, as its type "
            f"is unknown to transformers {transformers.__version__}, found {found}; a newer transformers may know it"
        )
    return stored.read(found[0], shape)


def _epsilon(path: Path, config: Any) -> float:
    for name in _EPSILONS:
        if isinstance(value := getattr(config, name, None), float):
            return value
    raise InputError(
        f"{path / 'config.json'}: expected the final norm's epsilon as one of {list(_EPSILONS)}, found none"
    )
