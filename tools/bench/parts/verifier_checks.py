"""Compare a store with plain transformers: every conversation is read alone, in one piece, by a freshly loaded model.

Nothing of capture is used here, and of the store only its reader. What is expected:

- `rows`: the rows and teacher positions that the loss mask asks for, counted with a loop;
- `tap_K`: `output_hidden_states[K + 1]`; for the last block, what the final norm reads, as transformers' own list ends
  with the norm's output;
- `log_z_full`, `log_z_draft`, `next_token_logit`, `teacher_max`, `top_k`, `argmax`: of the model's own logits;
- `causal`: the logits of the longest conversation's first half do not depend on its second half, so that the teacher is
  the distribution that a decoder would have;
- `embed_tokens`, `lm_head`: the weights that training takes from the store, up to one factor each, as a scale of the
  logits may be a part of them. Where they are of another width than the model's own, they are its own times the weight
  of one of its linear layers.

States are compared by rows, |found - expected| / |expected|, logits as differences beside the largest logit. The worst
row of all conversations counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from draftcache.store.reader import StoreReader

TOLERANCE = 1e-3
"""Of float32 on a CPU, where another order of sums costs 1e-5."""
_GAPS_TOLERANCE = 4e-3  # top-k gaps are stored in float16, which costs up to 1 / 2048 of a gap

Conversation = tuple[NDArray[np.uint32], NDArray[np.bool_]]


@dataclass
class Differences:
    """The largest difference of each kind, and where it was found."""

    worst: dict[str, float] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, values: Any, where: str) -> None:
        """Take the largest of `values`; NaN counts as infinite."""
        found = np.nan_to_num(np.abs(np.asarray(values, np.float64)), nan=np.inf).ravel()
        if found.size == 0:
            return
        value, row = float(found.max()), int(found.argmax())
        if name not in self.worst or value > self.worst[name]:
            self.worst[name], self.where[name] = value, f"{where}, row {row}"

    def wrong(self) -> list[str]:
        """Each difference above its limit in words, the largest first."""
        limits = {"top_k": _GAPS_TOLERANCE}
        names = sorted(self.worst, key=lambda name: -self.worst[name])
        return [
            f"{name} {self.worst[name]:.3g} ({self.where[name]})"
            for name in names
            if not self.worst[name] <= limits.get(name, TOLERANCE)
        ]


@torch.inference_mode()
def compare_store(store: Path, model_path: Path, conversations: Sequence[Conversation]) -> Differences:
    """Compare a store whose only split has these conversations, in the dataset's order, with the model's own code."""
    model = plain_model(model_path)
    reader = StoreReader(store)
    found = Differences()
    target_ids = reader.vocab_map().target_ids
    _compare_frozen(found, load_file(reader.files.frozen), model, target_ids)
    _compare_half(found, model, max((ids for ids, _ in conversations), key=len))
    found.add("rows", 0 if len(reader) == len(conversations) else np.inf, f"{len(reader)} conversations")
    for number, row in enumerate(reader.index):
        token_ids, mask = conversations[int(row["dataset_index"])]
        where = f"conversation of {len(token_ids)} tokens"
        arrays = reader.read(number).arrays
        rows, teacher = expected_rows(mask)
        for name, expected in (("positions", rows), ("teacher_positions", teacher), ("token_ids", token_ids)):
            found.add("rows", 0 if np.array_equal(arrays[name], expected) else np.inf, f"{where}: {name}")
        states, logits = reference(model, torch.from_numpy(token_ids.astype(np.int64)))
        for tap in reader.manifest.taps:
            expected_tap = states[tap.layer + 1][rows]
            found.add(f"tap_{tap.layer}", _row_differences(arrays[f"tap_{tap.layer}"], expected_tap), where)
        _compare_logits(found, arrays, logits[teacher], token_ids[teacher + 1], target_ids, where)
    reader.close()
    return found


def plain_model(path: Path) -> Any:
    """Load a model directory by transformers alone, in float32.

    NemotronH's time step has no lower limit: the vendor's code and vLLM have none, transformers adds one by mistake.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    if model.config.model_type == "nemotron_h":
        for module in model.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = (0.0, float("inf"))
    return model


def expected_rows(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows that any start row reads with an unlimited window, and the teacher positions, ascending."""
    starts = [row for row in range(len(mask) - 2) if mask[row + 1] and mask[row + 2]]
    return np.arange(starts[-1] + 1), np.array([row + 1 for row in starts])


def reference(model: Any, token_ids: torch.Tensor) -> tuple[list[NDArray[Any]], NDArray[Any]]:
    """Return the embedding's and every block's output, [L, H] each, and the logits [L, V], float32."""
    calls: list[tuple[str, Any, Any]] = []

    def note(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, torch.Tensor) and inputs and isinstance(inputs[0], torch.Tensor):
                calls.append((name, inputs[0], output))

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        output = model(input_ids=token_ids[None], use_cache=False, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    states = _block_outputs(list(output.hidden_states), calls)
    length = token_ids.shape[0]
    rows = [state.reshape(-1, *state.shape[2:])[:length] for state in states]  # some models pad to whole chunks
    return [state.reshape(length, -1).float().numpy() for state in rows], output.logits[0].float().numpy()


def _block_outputs(states: list[torch.Tensor], calls: list[tuple[str, Any, Any]]) -> list[torch.Tensor]:
    """Return the embeddings and every block's output from a model's `hidden_states` and its modules' calls.

    The list of transformers ends with the final norm's output, so the last block's output is what that norm read. Some
    models leave out the embeddings instead: there, the entry before the last is what the norm read.
    """
    for name, read, written in calls:  # the innermost module comes first
        if written.numel() == states[-1].numel() == read.numel() and torch.equal(written.ravel(), states[-1].ravel()):
            if any(part.isdigit() for part in name.split(".")):
                return states  # the last block's own: there is no final norm
            if torch.equal(read.ravel(), states[-2].ravel()):
                return [torch.full_like(read, torch.nan), *states[:-1]]
            return [*states[:-1], read.reshape(states[-1].shape)]
    return states


def _compare_half(found: Differences, model: Any, token_ids: NDArray[np.uint32]) -> None:
    ids = torch.from_numpy(token_ids.astype(np.int64))
    half = len(ids) // 2
    whole, alone = (reference(model, part)[1][:half] for part in (ids, ids[:half]))
    found.add("causal", _row_differences(whole, alone), f"conversation of {len(ids)} tokens")


def _row_differences(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[Any]:
    if found.shape != expected.shape:
        return np.array([np.inf])
    difference = np.linalg.norm(found.astype(np.float64) - expected, axis=-1)
    norms = np.linalg.norm(expected.astype(np.float64), axis=-1)
    return np.asarray(difference / np.maximum(norms, 1e-30))


def _compare_logits(
    found: Differences,
    arrays: dict[str, NDArray[Any]],
    logits: NDArray[Any],
    next_tokens: NDArray[Any],
    target_ids: NDArray[Any],
    where: str,
) -> None:
    """Compare the teacher of P positions with their logits [P, V]."""
    exact = logits.astype(np.float64)
    scale = np.maximum(1.0, np.abs(exact).max(axis=-1))
    every = np.arange(len(exact))
    highest = exact.max(axis=-1)
    stored = arrays["teacher_max"][:, None] - arrays["teacher_gaps"].astype(np.float64)
    values = np.take_along_axis(exact, arrays["teacher_ids"].astype(np.int64), axis=-1)
    best = -np.sort(-exact, axis=-1)[:, : values.shape[1]]
    found.add("log_z_full", (arrays["log_z_full"] - _log_sum_exp(exact)) / scale, where)
    found.add("log_z_draft", (arrays["log_z_draft"] - _log_sum_exp(exact[:, target_ids])) / scale, where)
    found.add("next_token_logit", (arrays["next_token_logit"] - exact[every, next_tokens]) / scale, where)
    found.add("teacher_max", (arrays["teacher_max"] - highest) / scale, where)
    found.add("argmax", (highest - exact[every, arrays["argmax"].astype(np.int64)]) / scale, where)
    found.add("top_k", np.maximum(np.abs(stored - values), np.abs(values - best)).max(axis=-1) / scale, where)


def _log_sum_exp(logits: NDArray[Any]) -> NDArray[Any]:
    highest = logits.max(axis=-1)
    total: NDArray[Any] = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=-1))
    return total


def _compare_frozen(found: Differences, tensors: dict[str, Any], model: Any, target_ids: NDArray[Any]) -> None:
    embeddings = model.get_input_embeddings().weight.detach().numpy()
    head = model.get_output_embeddings().weight.detach().numpy()[target_ids]
    for name, expected in (("embed_tokens", embeddings), ("lm_head", head)):
        candidates = [expected] if tensors[name].shape == expected.shape else _projected(model, expected)
        differences = [_difference_up_to_a_factor(tensors[name], candidate) for candidate in candidates]
        found.add(name, min(differences, default=np.inf), "frozen.safetensors")


def _projected(model: Any, weight: NDArray[Any]) -> list[NDArray[Any]]:
    """A matrix [V, E] times the weight of every linear layer that reads or gives E channels."""
    layers = [module.weight.detach().numpy() for module in model.modules() if isinstance(module, torch.nn.Linear)]
    into = [weight @ layer.T for layer in layers if layer.shape[1] == weight.shape[1]]
    return into + [weight @ layer for layer in layers if layer.shape[0] == weight.shape[1]]


def _difference_up_to_a_factor(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Relative difference of two matrices, after the second one is scaled to fit best."""
    if found.shape != expected.shape:
        return float(np.inf)
    factor = float((found * expected).sum() / (expected * expected).sum())
    return float(np.linalg.norm(found - factor * expected) / np.linalg.norm(found))
