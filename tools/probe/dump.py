"""Dumps the states of one verifier forward over a fixed input, with their numbers in several conventions.

The dump is the reference for porting a draft to an engine: run the engine on the dump's `token_ids`, and
`draftcache probe --compare` names the offset between the engine's layer ids and our block numbers.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from draftcache.capture.job.config import require_ascending
from draftcache.capture.prepare.chat.tokenizer_files import load_tokenizer
from draftcache.capture.verifier.load import Verifier, choose_dtype, describe_verifier, load_verifier
from draftcache.capture.verifier.ssm_precision import enforce_contract
from draftcache.store.common.device import use_device
from draftcache.store.common.errors import GateError, InputError
from draftcache.store.common.files import atomic_path, canonical_json
from draftcache.store.common.tensor_files import save_tensors
from draftcache.store.format.manifest import Tap
from draftcache.tools.probe.files import EMBEDDINGS, FINAL_NORM, METADATA_KEY, VERSION, block_tensor

TEXT = """\
The lighthouse keeper counted 38 ships before noon. "That makes 1,204 this year," she told the apprentice, "and only \
two of them ever asked what the weather would do." He wrote the number down, drew a line under it, and looked out.

Question: a tank holds 240 litres and loses 3 litres every hour. After how many hours is it a quarter full?
Answer: a quarter of 240 is 60, so it has to lose 240 - 60 = 180 litres. At 3 litres an hour that takes 180 / 3 = 60 \
hours, which is two and a half days.

def running_mean(values, width):
    total, means = 0.0, []
    for index, value in enumerate(values):
        total += value
        if index >= width:
            total -= values[index - width]
        means.append(total / min(index + 1, width))
    return means

The function above keeps one sum and never looks at a value more than twice; its rounding errors add up, though, so \
for long inputs one would start the sum afresh every few thousand values.
"""
"""The default input, about 250 tokens of prose, arithmetic and code. On random ids a trained model's states would be
outliers, and rounding would change more of its routing."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The verifier to run, its input, and the states to dump."""

    verifier: Path
    output: Path
    layers: tuple[int, ...]
    """The taps: block numbers, counted from 0, ascending."""
    text: str | None = None
    """Input text, to which the tokenizer adds no special tokens; TEXT where neither text nor token ids are given."""
    token_ids: tuple[int, ...] | None = None
    """Input as token ids, instead of text."""
    only_layers: bool = False
    """Dump the taps alone: the file is small, but states of an engine with other layer ids can't be compared with the
    blocks beside the taps."""
    source: str = "draftcache"
    """ "draftcache" for the forward that capture runs, "transformers" for the model's own output_hidden_states."""
    device: str = "auto"
    compute_dtype: str = "auto"
    allow_fallback: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require_ascending(self.layers)
        if self.output.exists():
            raise InputError(f"{self.output}: expected a new file, found one that exists; remove it or choose another")


def dump_states(config: ProbeConfig) -> dict[str, Any]:
    """Run the forward and write `config.output` atomically; return the file's metadata and `tokens`, as JSON values.

    The file holds `token_ids` [L] int64 and, in the compute dtype [L, H]: `embeddings`, `hidden_states.K` after block
    K, and `final_norm`. The metadata holds, among others, `layers`, `tensors` ({name: `conventions`}), `dtype`,
    `forward`, `verifier` and `ssm`. Raises InputError, PrecisionError if the float32 contract of Mamba states is not
    met, and GateError for states that are not finite.
    """
    token_ids = _input_ids(config)
    device = use_device(config.device)
    verifier = load_verifier(
        config.verifier,
        device=device,
        dtype=choose_dtype(config.compute_dtype, device),
        trust_remote_code=config.trust_remote_code,
    )
    _require_in_range(config, token_ids, verifier)
    ssm = enforce_contract(verifier.model, config.verifier, allow_fallback=config.allow_fallback)
    states = _own_states(verifier, token_ids) if config.source == "draftcache" else _model_states(verifier, token_ids)
    if config.only_layers:
        states = {block_tensor(layer): states[block_tensor(layer)] for layer in config.layers}
    blocks = len(verifier.blocks)
    details = {
        "version": VERSION,
        "source": config.source,
        "forward": verifier.body_forward.name if config.source == "draftcache" else "transformers",
        "layers": list(config.layers),
        "tensors": {name: conventions(name, blocks) for name in states},
        "dtype": str(verifier.head.weight.dtype).removeprefix("torch."),
        "verifier": describe_verifier(config.verifier, verifier),
        "ssm": ssm,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }
    tensors = {name: state.detach().cpu().contiguous() for name, state in states.items()}
    for name, state in tensors.items():
        if not torch.isfinite(state).all():
            raise GateError(f"{name}: expected finite states, found NaN or infinity in {details['forward']}'s forward")
    with atomic_path(config.output) as partial:
        save_tensors(partial, tensors | {"token_ids": token_ids}, {METADATA_KEY: canonical_json(details)})
    return details | {"tokens": len(token_ids)}


def conventions(name: str, blocks: int) -> dict[str, Any]:
    """Return the numbers of a dump's tensor in several conventions, for a verifier of `blocks` blocks, as JSON values.

    The keys are `layer`, `point`, `hf_hidden_states_index` and `vllm_aux_id`; a convention without a number has None.
    """
    if name == EMBEDDINGS:
        return {"layer": None, "point": "input of block 0", "hf_hidden_states_index": 0, "vllm_aux_id": 0}
    if name == FINAL_NORM:
        return {"layer": None, "point": "after the final norm", "hf_hidden_states_index": blocks, "vllm_aux_id": None}
    names = Tap(layer=int(name.rpartition(".")[2])).to_json()
    if names["layer"] == blocks - 1:
        names["hf_hidden_states_index"] = None  # Hugging Face's last entry is after the final norm
    return names


def _input_ids(config: ProbeConfig) -> Tensor:
    """Return the input's token ids [L] int64. Raises InputError if there are none."""
    if config.token_ids is not None:
        ids = list(config.token_ids)
    else:
        _, tokenizer = load_tokenizer(config.verifier, trust_remote_code=config.trust_remote_code)
        ids = tokenizer.encode(TEXT if config.text is None else config.text, add_special_tokens=False)
    if not ids:
        raise InputError("--text or --token-ids: expected at least one token, found none")
    return torch.tensor(ids, dtype=torch.int64)


def _require_in_range(config: ProbeConfig, token_ids: Tensor, verifier: Verifier) -> None:
    blocks, rows = len(verifier.blocks), verifier.embeddings.weight.shape[0]
    if config.layers[-1] >= blocks:
        raise InputError(f"--layers: expected blocks 0 .. {blocks - 1} of {config.verifier}, found {config.layers[-1]}")
    if config.source == "transformers" and config.layers[-1] == blocks - 1:
        raise InputError(
            f"--layers: with --source transformers expected blocks 0 .. {blocks - 2}, found {blocks - 1}: the last "
            "entry of output_hidden_states is after the final norm; leave it out, or take --source draftcache"
        )
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= rows:
        raise InputError(f"--token-ids: expected ids 0 .. {rows - 1} of {config.verifier}, found {low} .. {high}")


@torch.inference_mode()
def _own_states(verifier: Verifier, token_ids: Tensor) -> dict[str, Tensor]:
    """Return all states [L, H] by name, from the forward that capture runs."""
    entered: list[Tensor] = []

    def keep(_block: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        entered.append((arguments[0] if arguments else named["hidden_states"])[0])

    handle = verifier.blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        found = verifier.forward(token_ids, tuple(range(len(verifier.blocks))))
    finally:
        handle.remove()
    # Our forwards call no block module and begin with the embedding table's rows, which other models' code may scale.
    embeddings = entered[0] if entered else verifier.embeddings(token_ids.to(verifier.device))
    blocks = {block_tensor(layer): tap for layer, tap in sorted(found.taps.items())}
    return {EMBEDDINGS: embeddings, **blocks, FINAL_NORM: found.final}


@torch.inference_mode()
def _model_states(verifier: Verifier, token_ids: Tensor) -> dict[str, Tensor]:
    """Return states [L, H] by name from the model's own `output_hidden_states`, which lacks the last block's output.

    Raises InputError if the model returns another number of states than blocks + 1.
    """
    ids = token_ids[None].to(verifier.device)
    output = verifier.body(input_ids=ids, use_cache=False, output_hidden_states=True)
    entries = [entry[0] for entry in output.hidden_states]
    if len(entries) != len(verifier.blocks) + 1:
        raise InputError(
            f"{type(verifier.model).__name__}: expected {len(verifier.blocks) + 1} entries of output_hidden_states, "
            f"found {len(entries)}; this model's conventions are not supported"
        )
    blocks = {block_tensor(index - 1): entries[index] for index in range(1, len(entries) - 1)}
    return {EMBEDDINGS: entries[0], **blocks, FINAL_NORM: entries[-1]}
