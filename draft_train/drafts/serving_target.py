"""For what a draft is exported or checked: the engine, its version, the form of the files, and the verifier beside it.

What is said of engines here and in the architectures' `served` and `served_checks` was read in the sources of vLLM
0.26.0, 0.27.0 and 0.32.0, of SGLang 0.5.12 to 0.5.23, and of speculators 0.9.0. This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.common.files import read_json

FORMS = ("classic", "speculators")
"""The draft's own config.json, or the one of the speculators library, whose layer is a config inside the config."""


@dataclass(frozen=True, kw_only=True)
class ServingTarget:
    """The engine that is to load a draft. Raises InputError for a form or a version that can't be."""

    engine: str
    version: str | None = None
    """Version of the engine; None where it is not known, which is refused where versions differ."""
    form: str = FORMS[0]
    verifier_name: str | None = None
    """Where the engine finds the verifier, which the speculators form names; None for the name that the store knows."""

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise InputError(f"--format: expected one of {list(FORMS)}, found {self.form!r}")
        if self.version is not None:
            try:
                Version(self.version)
            except InvalidVersion as exc:
                raise InputError(
                    f"--engine-version: expected a version such as 0.5.13, found {self.version!r}"
                ) from exc

    def since(self, version: str) -> bool | None:
        """Return whether the engine is of this version or a later one; None where its version is not known."""
        return None if self.version is None else Version(self.version) >= Version(version)


@dataclass(frozen=True, kw_only=True)
class VerifierFacts:
    """What a draft has to fit of its verifier. None stands for what is not known."""

    model_type: str | None = None
    architecture: str | None = None
    layers: int | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None

    @property
    def nemotron_h(self) -> bool:
        """Whether it is a NemotronH. The class is compared where an older manifest names no type."""
        return self.model_type == "nemotron_h" or self.architecture == "NemotronHForCausalLM"

    @classmethod
    def of_manifest(cls, verifier: dict[str, Any]) -> VerifierFacts:
        """Return the facts that a store's manifest or a checkpoint holds."""
        return cls(**{name: verifier.get(name) or None for name in cls.__dataclass_fields__})

    @classmethod
    def of_config(cls, directory: Path) -> VerifierFacts:
        """Return the facts of a verifier's config.json. Raises InputError where the directory has none."""
        path = directory / "config.json"
        try:
            whole = read_json(path)
            config = whole.get("text_config") or whole
            names = ("model_type", "hidden_size", "vocab_size", "max_position_embeddings")
            values = {name: config.get(name) for name in names}
            architectures = whole.get("architectures") or [None]
        except (DraftcacheError, OSError, ValueError, AttributeError) as exc:
            raise InputError(
                f"--verifier {directory}: expected a model's directory with config.json ({exc}); give the verifier's"
            ) from exc
        blocks = config.get("layers_block_type") or config.get("hybrid_override_pattern") or ()
        layers = config.get("num_hidden_layers") or len(blocks) or None
        return cls(**values, layers=layers, architecture=architectures[0])

    def filled_from(self, other: VerifierFacts) -> VerifierFacts:
        """Return these facts, and those of `other` where nothing is known."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__}
        return VerifierFacts(**{name: own if own is not None else known for name, (own, known) in pairs.items()})


_SGLANG_DFLASH_ROPE = 1e6
"""RoPE's base of a DFlash draft where SGLang does not read it."""
_SGLANG_DEEPSEEK = {
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_k2", "kimi_k25",
}  # fmt: skip
"""Types of verifiers whose SGLang class changed what it takes aux ids for."""
SGLANG_DEEPSEEK_CHANGE = "0.5.13"
"""From this version on SGLang adds 1 to the ids beside those verifiers only if the first one is 1."""
_SGLANG_LAST_BLOCK = {
    "gpt_oss": "0.5.17", "nemotron_h": "0.5.23", "gemma3": "0.5.23", "gemma3_text": "0.5.23", "gemma4": "0.5.23",
    "gemma4_text": "0.5.23", "minimax_m3": "0.5.23",
}  # fmt: skip
"""Types of verifiers whose SGLang class captures the last block's output, by the version where that was read. Others
capture before each block only, so that the last one's output is left out."""


def takes_last_block(verifier: VerifierFacts, target: ServingTarget) -> bool:
    """Return whether the engine is known to hand the output of this verifier's last block to a draft, as vLLM does."""
    if target.engine != "sglang":
        return True
    since = _SGLANG_LAST_BLOCK.get(verifier.model_type or "")
    return since is not None and bool(target.since(since))


def sglang_adds_one(verifier: VerifierFacts, target: ServingTarget) -> bool | None:
    """Return whether SGLang takes aux id i of an Eagle3 draft for the output of block i, counted from 0.

    Otherwise id i is the output of block i - 1, if the first id is not 1. Returns None where that depends on a version
    that is not known.
    """
    if verifier.model_type not in _SGLANG_DEEPSEEK:
        return True
    changed = target.since(SGLANG_DEEPSEEK_CHANGE)
    return None if changed is None else not changed


def sglang_dflash_needs(slides: bool, rope_theta: float | None) -> dict[str, tuple[str, str]]:
    """Return what SGLang has to read of a DFlash's config: by field, since which version, and what earlier ones do.

    `slides` says whether one of its layers is a sliding one.
    """
    needs = {}
    if slides:
        needs["layer_types"] = ("0.5.14", "earlier ones attend to everything and in both directions, in every layer")
    if rope_theta != _SGLANG_DFLASH_ROPE:
        needs["rope_theta"] = ("0.5.13", f"earlier ones take {_SGLANG_DFLASH_ROPE:,.0f}")
    return needs


def eagle3_ids(blocks: list[int], target: ServingTarget, verifier: VerifierFacts) -> list[int]:
    """Return the aux ids by which an engine knows the outputs of these blocks, counted from 0.

    vLLM's id k is the state before its layer k, so the output of block i has id i + 1. SGLang adds one itself, so there
    the id is i, but beside DeepSeek's family from 0.5.13 on. Raises InputError for another engine, where the version
    decides and is not known, and for a block that the engine has no id for.
    """
    if target.engine == "vllm":
        return [block + 1 for block in blocks]
    if target.engine != "sglang":
        raise InputError(f"--engine: expected vllm or sglang, found {target.engine!r}")
    adds = sglang_adds_one(verifier, target)
    if adds is None:
        old, new = (
            f"{text} ({ids})"
            for text, ids in (
                (f"older than {SGLANG_DEEPSEEK_CHANGE}", blocks),
                (f"{SGLANG_DEEPSEEK_CHANGE} or later", [block + 1 for block in blocks]),
            )
        )
        raise InputError(
            "--engine-version: expected the version of SGLang that serves the draft, as its class for "
            f"{verifier.model_type} takes aux ids in two ways: name one that is {old}, or {new}; found none"
        )
    if adds:
        return list(blocks)
    if blocks and blocks[0] == 0:
        raise InputError(
            f"--engine sglang: expected taps from block 1 on beside {verifier.model_type}, found block 0, for whose "
            f"output SGLang has no id from {SGLANG_DEEPSEEK_CHANGE} on; train on other taps, or serve it with vLLM"
        )
    return [block + 1 for block in blocks]
