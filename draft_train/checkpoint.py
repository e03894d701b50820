"""Checkpoints: directories of safetensors and JSON files, published by one rename, so that each is complete.

A checkpoint holds model.safetensors (float32 master weights), optimizer.safetensors (AdamW's moments by parameter
name), vocab_map.safetensors and state.json (the draft's architecture and shape, the step, settings, the verifier, the
hashes of the files beside it, and its own hash).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from draftcache.draft_train.drafts.protocol import CheckpointState, Draft
from draftcache.draft_train.drafts.registry import find_architecture
from draftcache.draft_train.state_file import STATE_NAME, read_state, state_bytes
from draftcache.store.common.attempts import remove_ended
from draftcache.store.common.errors import CheckpointError
from draftcache.store.common.files import atomic_directory, hash_file, read_json, remove_directory, write_json
from draftcache.store.common.tensor_files import save_tensors
from draftcache.store.format.vocab_map import VocabMap

BEST = "best.json"
"""File in a run's directory that names the checkpoint with the longest acceptance."""

_FILES = ("model.safetensors", "optimizer.safetensors", "vocab_map.safetensors")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter."""


def save_checkpoint(
    path: Path, state: CheckpointState, model: nn.Module, optimizer: torch.optim.AdamW, vocab_map: VocabMap
) -> None:
    """Write a checkpoint beside `path`, flush it to disk, then rename it. An existing checkpoint is left as it is."""
    with suppress(FileExistsError), atomic_directory(path) as partial:
        weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        save_tensors(partial / _FILES[0], weights)
        save_tensors(partial / _FILES[1], _optimizer_tensors(model, optimizer))
        vocab_map.save(partial / _FILES[2])
        hashes = {name: hash_file(partial / name) for name in _FILES}
        (partial / STATE_NAME).write_bytes(state_bytes(state, hashes))


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def load_state(path: Path) -> CheckpointState:
    """Read state.json, and compare the files beside it with the hashes that it holds.

    Raises CheckpointError where the checkpoint is incomplete, damaged or of another format.
    """
    state, hashes = read_state(path)
    if not isinstance(hashes, dict) or hashes.keys() != set(_FILES):
        raise CheckpointError(f"{path / STATE_NAME}: expected hashes of {list(_FILES)}, found {hashes!r}")
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: expected a file of the checkpoint, found none; it is incomplete")
        if (found := hash_file(file)) != expected:
            raise CheckpointError(f"{file}: expected xxh3-128 {expected}, found {found}; it was changed or damaged")
    return state


def load_draft(path: Path, state: CheckpointState, device: torch.device) -> Draft:
    """Return the draft with this checkpoint's float32 weights. Raises CheckpointError where tensors are missing."""
    draft = find_architecture(state.architecture).build(state.shape, device)
    load_weights(draft.model, path)
    return draft


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy model.safetensors into the model. Raises CheckpointError, naming tensors that are missing or misshapen."""
    model.load_state_dict(read_weights(path, model.state_dict()))


def read_weights(path: Path, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return model.safetensors. Raises CheckpointError where its names, shapes or dtypes are not those of `like`."""
    return _load_like(path / _FILES[0], like)


def load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Restore AdamW's moments and step counts, bit for bit.

    Raises CheckpointError, naming tensors that are missing or do not have the parameter's shape and dtype.
    """
    like: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        like |= {f"{name}/step": torch.zeros(()), f"{name}/exp_avg": parameter, f"{name}/exp_avg_sq": parameter}
    tensors = _load_like(path / _FILES[1], like)
    for name, parameter in model.named_parameters():
        state = {key: tensors[f"{name}/{key}"] for key in _MOMENTS}
        fused = optimizer.defaults.get("fused")
        optimizer.state[parameter] = {
            key: value.to(parameter.device) if key != "step" or fused else value for key, value in state.items()
        }


def _load_like(file: Path, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, which must have the names, shapes and dtypes of `like`."""
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{file}: expected safetensors of a checkpoint, found something else ({exc})") from exc
    expected, found = (
        {name: f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}" for name, value in values.items()}
        for values in (like, tensors)
    )
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        detail = ", ".join(f"{name}: expected {expected.get(name)}, found {found.get(name)}" for name in wrong)
        raise CheckpointError(f"{file}: {detail}")
    return tensors


def blank_optimizer(model: nn.Module, optimizer: torch.optim.AdamW) -> list[torch.Tensor]:
    """Give AdamW a state to overwrite, and return its tensors, in an order that the model's parameters decide."""
    for parameter in model.parameters():
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return [optimizer.state[parameter][key] for parameter in model.parameters() for key in _MOMENTS]


def load_vocab_map(path: Path, state: CheckpointState) -> VocabMap:
    """Return the checkpoint's vocabulary map. Raises CheckpointError where its hash is not the recorded one."""
    loaded = VocabMap.load(path / _FILES[2])
    if loaded.hash != state.draft_vocab_hash:
        raise CheckpointError(f"{path / _FILES[2]}: expected vocabulary {state.draft_vocab_hash}, found {loaded.hash}")
    return loaded


def checkpoint_path(output: Path, step: int) -> Path:
    """Return the directory of the checkpoint after `step` optimizer steps."""
    return output / "checkpoints" / f"step_{step:08d}"


def checkpoints(output: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the oldest first."""
    return sorted((output / "checkpoints").glob("step_*"))


def best_checkpoint(output: Path) -> tuple[Path, float] | None:
    """Return a run's checkpoint with the longest acceptance, and that length; None where none was evaluated.

    Raises CheckpointError where best.json names a checkpoint that does not exist, or has another length.
    """
    record = output / BEST
    if not record.is_file():
        return None
    body = read_json(record)
    try:
        path, length = checkpoint_path(output, int(body["step"])), float(body["eval_acceptance_length"])
    except (KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(f"{record}: expected a step and its acceptance length, found {body!r}") from exc
    if not path.is_dir():
        raise CheckpointError(
            f"{record}: expected {path.name}, which it names, found none; delete it to choose among later steps"
        )
    recorded = read_state(path)[0].metrics.get("eval_acceptance_length")
    if recorded != length:
        raise CheckpointError(
            f"{record}: expected the acceptance length of {path.name}, {recorded}, found {length}; delete it to choose "
            "among later steps"
        )
    return path, length


def is_best(output: Path, metrics: dict[str, Any]) -> bool:
    """Return whether `metrics` have a longer acceptance than the best so far. On a tie the earlier one stays best."""
    length = metrics.get("eval_acceptance_length")
    best = None if length is None else best_checkpoint(output)
    return length is not None and (best is None or length > best[1])


def note_best(output: Path, step: int, metrics: dict[str, Any]) -> None:
    """Record the checkpoint of `step` as the best if its `metrics` are."""
    if is_best(output, metrics):
        write_json(output / BEST, {"step": step, "eval_acceptance_length": metrics["eval_acceptance_length"]})


def resolve_checkpoint(path: Path) -> Path:
    """Return `path` if it is a checkpoint, the newest checkpoint of a run's directory, or the best one for RUN/best.

    Raises CheckpointError where there is no checkpoint.
    """
    if (path / STATE_NAME).is_file():
        return path
    if path.name == "best" and (best := best_checkpoint(path.parent)) is not None:
        return best[0]
    found = checkpoints(path)
    if not found:
        raise CheckpointError(
            f"{path}: expected a checkpoint, a training --output with checkpoints, or best in one that was evaluated "
            "by --eval-every, found none of them"
        )
    return found[-1]


def prune_checkpoints(output: Path, keep: int) -> None:
    """Delete all checkpoints but the best and the newest `keep`, and the leftovers of interrupted writes."""
    best = best_checkpoint(output)
    for path in checkpoints(output)[:-keep]:
        if best is None or path != best[0]:
            remove_directory(path)
    remove_leftovers(output)


def remove_leftovers(output: Path) -> None:
    """Delete what killed processes left half written or half deleted.

    A process that may still live keeps its files: where locks do not lock, it could publish them while they go.
    """
    remove_ended(output / "checkpoints")
