"""Checkpoints: directories of safetensors and JSON files, published by one rename, so that each is complete.

A checkpoint holds model.safetensors (float32 master weights), optimizer.safetensors (AdamW's moments by parameter
name), vocab_map.safetensors and state.json (the draft's architecture and shape, the step, settings, the verifier, and
the hashes of the files beside it).
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from draftcache.draft_train.drafts.protocol import CheckpointState, Draft
from draftcache.draft_train.drafts.registry import DEFAULT, find_architecture
from draftcache.store.common.errors import CheckpointError, DraftcacheError
from draftcache.store.common.files import atomic_directory, hash_file, read_json, write_json
from draftcache.store.common.tensor_files import save_tensors
from draftcache.store.format.vocab_map import VocabMap

FORMAT = "draftcache-checkpoint"
VERSION = 1
BEST = "best.json"
"""File in a run's directory that names the checkpoint with the longest acceptance."""

_FILES = ("model.safetensors", "optimizer.safetensors", "vocab_map.safetensors")


def save_checkpoint(
    path: Path, state: CheckpointState, model: nn.Module, optimizer: torch.optim.AdamW, vocab_map: VocabMap
) -> None:
    """Write a checkpoint beside `path`, flush it to disk, then rename it. An existing checkpoint is left as it is."""
    if path.exists():
        return
    with atomic_directory(path) as partial:
        weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        save_tensors(partial / _FILES[0], weights)
        save_tensors(partial / _FILES[1], _optimizer_tensors(model, optimizer))
        vocab_map.save(partial / _FILES[2])
        body = {"format": FORMAT, "version": VERSION, **asdict(state)}
        write_json(partial / "state.json", body | {"files": {name: hash_file(partial / name) for name in _FILES}})


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def load_state(path: Path) -> CheckpointState:
    """Read state.json, and check the hashes of the files that it names.

    Raises CheckpointError where the checkpoint is incomplete, damaged or of another format.
    """
    try:
        body = read_json(path / "state.json")
    except DraftcacheError as exc:
        raise CheckpointError(f"{path}: expected a checkpoint with state.json ({exc})") from exc
    if not isinstance(body, dict) or body.get("format") != FORMAT or body.get("version") != VERSION:
        raise CheckpointError(f"{path}/state.json: expected {FORMAT} version {VERSION}, found something else")
    for name, expected in body["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: expected a file of the checkpoint, found none; it is incomplete")
        if (found := hash_file(file)) != expected:
            raise CheckpointError(f"{file}: expected xxh3-128 {expected}, found {found}; it was changed or damaged")
    values = {"architecture": DEFAULT} | {
        name: body[name] for name in CheckpointState.__dataclass_fields__ if name in body
    }
    missing = sorted(CheckpointState.__dataclass_fields__.keys() - values.keys())
    if missing:
        raise CheckpointError(f"{path}/state.json: expected the fields {missing}, found none of them")
    shape = find_architecture(values["architecture"]).read_shape(values["shape"])
    return CheckpointState(**values | {"shape": shape})


def load_draft(path: Path, state: CheckpointState, device: torch.device) -> Draft:
    """Return the draft with this checkpoint's float32 weights. Raises CheckpointError where tensors are missing."""
    draft = find_architecture(state.architecture).build(state.shape, device)
    load_weights(draft.model, path)
    return draft


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy model.safetensors into the model. Raises CheckpointError, naming missing or misshapen tensors."""
    tensors = load_file(path / _FILES[0])
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    found = {name: list(value.shape) for name, value in tensors.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        detail = ", ".join(f"{name}: expected {expected.get(name)}, found {found.get(name)}" for name in wrong)
        raise CheckpointError(f"{path / _FILES[0]}: {detail}")
    model.load_state_dict(tensors)


def load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Restore AdamW's moments and step counts, bit for bit."""
    tensors = load_file(path / _FILES[1])
    for name, parameter in model.named_parameters():
        state = {key: tensors[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        fused = optimizer.defaults.get("fused")
        optimizer.state[parameter] = {
            key: value.to(parameter.device) if key != "step" or fused else value for key, value in state.items()
        }


def blank_optimizer(model: nn.Module, optimizer: torch.optim.AdamW) -> list[torch.Tensor]:
    """Give AdamW a state to overwrite, and return its tensors, in an order that the model's parameters decide."""
    for parameter in model.parameters():
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    keys = ("step", "exp_avg", "exp_avg_sq")
    return [optimizer.state[parameter][key] for parameter in model.parameters() for key in keys]


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

    Raises CheckpointError where best.json names a checkpoint that does not exist.
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
    return path, length


def note_best(output: Path, step: int, metrics: dict[str, Any]) -> None:
    """Record the checkpoint of `step` as the best if its `metrics` have a longer acceptance than the best so far.

    On a tie the earlier checkpoint stays the best.
    """
    length, best = metrics.get("eval_acceptance_length"), best_checkpoint(output)
    if length is not None and (best is None or length > best[1]):
        write_json(output / BEST, {"step": step, "eval_acceptance_length": length})


def resolve_checkpoint(path: Path) -> Path:
    """Return `path` if it is a checkpoint, the newest checkpoint of a run's directory, or the best one for RUN/best.

    Raises CheckpointError where there is no checkpoint.
    """
    if (path / "state.json").is_file():
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
    old = [path for path in checkpoints(output)[:-keep] if best is None or path != best[0]]
    for path in [*old, *(output / "checkpoints").glob(".step_*.partial")]:
        shutil.rmtree(path)
