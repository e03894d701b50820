"""Embeddings, final norm and head of a verifier directory, without its blocks' weights.

The model class is built on torch's meta device, which takes no memory, so that its own modules say which tensors these
parts are and what the norm computes; then only their weights are read. Where the class and the files name them
differently, the one tensor of the same last name and shape outside of the blocks is taken, and several are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from draftcache.capture.verifier.blocks import find_blocks, find_final_norm, model_class
from draftcache.capture.verifier.head import candidate_forms
from draftcache.capture.verifier.load import Verifier, load_config
from draftcache.capture.verifier.norm import FinalNorm, measure_norm
from draftcache.capture.verifier.weights import weight_files
from draftcache.store.common.errors import InputError
from draftcache.store.format.head_form import IDENTITY, HeadForm


@dataclass(frozen=True)
class VerifierParts:
    """What is needed of a verifier beside its states, in one dtype."""

    config: Any
    """The text model's."""
    architecture: str
    layers: int
    """Number of blocks."""
    embeddings: nn.Embedding
    final_norm: nn.Module
    head: nn.Linear
    norm: FinalNorm
    head_form: HeadForm


def parts_of(verifier: Verifier) -> VerifierParts:
    """The parts of a verifier that was loaded."""
    return VerifierParts(
        config=verifier.model.config.get_text_config(),
        architecture=type(verifier.model).__name__,
        layers=len(verifier.blocks),
        embeddings=verifier.embeddings,
        final_norm=verifier.final_norm,
        head=verifier.head,
        norm=verifier.norm,
        head_form=verifier.head_form,
    )


@torch.inference_mode()
def read_parts(
    path: Path,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
    off: Callable[[VerifierParts], float] | None = None,
) -> VerifierParts:
    """Read the parts from a model directory.

    `off` says how far the logits of parts are from true ones. With it, what the configuration's numbers do to the
    logits is what brings them nearest. Raises InputError where a part can't be told, for a model whose embeddings or
    head are of another width than its blocks, and, without `off`, for one whose logits its configuration may scale or
    cap: those can only be told by running the model.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    advice = "; give --probe, which loads the verifier and finds it there"
    try:
        whole = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
        with torch.device("meta"):
            model = model_class(whole).from_config(whole, trust_remote_code=trust_remote_code)
        holder, blocks = find_blocks(model)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        norm = find_final_norm(model, holder, head)
    except InputError:
        raise
    except Exception as exc:  # whatever a config's contents make a model class raise
        raise InputError(
            f"{path}: expected a model whose parts can be told without its weights, found one of which they can't "
            f"({type(exc).__name__}: {exc}){advice}"
        ) from exc
    if not isinstance(head, nn.Linear) or not isinstance(embeddings, nn.Embedding):
        raise InputError(
            f"{path}: expected a linear head and an embedding table, found {type(head).__name__} and "
            f"{type(embeddings).__name__}"
        )
    if not config.hidden_size == embeddings.embedding_dim == head.in_features:
        raise InputError(f"{path}: expected embeddings and head of the blocks' {config.hidden_size} channels{advice}")
    if len(forms := candidate_forms(model.config)) > 1 and off is None:
        raise InputError(
            f"{path}: expected logits that are the head's output, found numbers in config.json that may scale or cap "
            f"them ({', '.join(map(str, forms[1:4]))}){advice}"
        )
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    stored = StoredTensors(path)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    _fill(embeddings, names[id(embeddings)], stored, dtype)
    if buffers := [part for part, buffer in norm.named_buffers() if buffer.is_meta]:
        raise InputError(f"{path}: expected a final norm without buffers, found {buffers}{advice}")
    _fill(norm, names[id(norm)], stored, dtype)
    if tied and not stored.candidates(f"{names[id(head)]}.weight", tuple(head.weight.shape)):
        head.weight = embeddings.weight
    else:
        _fill(head, names[id(head)], stored, dtype)
    parts = VerifierParts(
        config=config, architecture=type(model).__name__, layers=len(blocks), embeddings=embeddings, final_norm=norm,
        head=head, norm=measure_norm(norm, model.config, head.in_features), head_form=IDENTITY,
    )  # fmt: skip
    return parts if off is None else min((replace(parts, head_form=form) for form in forms), key=off)


def _fill(module: nn.Module, name: str, stored: StoredTensors, dtype: torch.dtype) -> None:
    """Give a module of the meta device its weights. Raises InputError where they can't be told."""
    for part, parameter in list(module.named_parameters()):
        values = stored.read(f"{name}.{part}", tuple(parameter.shape)).to(dtype)
        owner = module.get_submodule(part.rpartition(".")[0])
        setattr(owner, part.rpartition(".")[2], nn.Parameter(values, requires_grad=False))


class StoredTensors:
    """The tensors of a model directory's safetensors files, by name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for weights in weight_files(path):
            with safe_open(weights, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # no dict
                    self._files[name] = weights
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())

    def candidates(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """The tensor of this name, or else those outside of blocks whose last two parts are the same."""
        if name in self._files:
            return [name]
        tail = ".".join(name.split(".")[-2:])
        return [
            other
            for other in self._files
            if (other == tail or other.endswith(f".{tail}"))
            and self._shapes[other] == shape
            and not any(part.isdigit() for part in other.split("."))
        ]

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read the one tensor that this name means. Raises InputError for none, several, or a quantised one."""
        found = self.candidates(name, shape)
        if len(found) != 1 or self._shapes[found[0]] != shape:
            raise InputError(
                f"{self._path}: expected one tensor {name} {list(shape)} in its safetensors files, found "
                f"{ {other: list(self._shapes[other]) for other in found} or 'none' }; give --probe, which loads the "
                "whole verifier"
            )
        with safe_open(self._files[found[0]], framework="pt") as file:
            values: Tensor = file.get_tensor(found[0])
        if values.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise InputError(
                f"{self._path}: expected {found[0]} in bfloat16, float16 or float32, found {values.dtype}, which is "
                "quantised: use the checkpoint that is not"
            )
        return values
