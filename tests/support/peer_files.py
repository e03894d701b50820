"""A tiny verifier's states in the layouts of other projects, by the definitions of their own sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from draftcache.capture.peers.deepspec_files import RECORD
from draftcache.capture.verifier.load import Verifier, load_verifier
from draftcache.capture.verifier.ssm_precision import enforce_contract
from support.tiny_models import make_model

TAPS = (0, 1, 2)
TOKENS = 440
"""Ids below it are in the vocabulary of the test tokenizers."""


@dataclass(frozen=True)
class Recorded:
    """One conversation with all of its states, in float32 on the CPU."""

    token_ids: np.ndarray
    loss_mask: np.ndarray
    taps: torch.Tensor
    """[L, N, H]."""
    before: torch.Tensor
    after: torch.Tensor
    """The last state before and after the final norm, [L, H]."""


def save_predictable(path: Path, kind: str = "llama") -> Path:
    """Write a tiny model whose norm has a weight other than ones, so that a norm too many or too few shows."""
    model = make_model(kind)
    generator = torch.Generator().manual_seed(1)
    norm = model.model.norm if kind == "llama" else model.model.norm_f
    with torch.no_grad():
        norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator))
        for block in model.model.layers:
            for weight in block.parameters():
                if weight.ndim == 2:
                    weight.mul_(3)
        model.lm_head.weight.mul_(10)
    model.save_pretrained(path)
    return path


def sampled(model: Any, prompt: list[int], length: int) -> list[int]:
    """The prompt with the model's own sampled answer: what follows a row is then likely by its last state."""
    ids, generator = list(prompt), torch.Generator().manual_seed(sum(prompt))
    with torch.inference_mode():
        while len(ids) < length:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :TOKENS].float()
            ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    return ids


def load(path: Path, dtype: torch.dtype = torch.float32) -> Verifier:
    """Load a tiny verifier on the CPU."""
    verifier = load_verifier(path, device=torch.device("cpu"), dtype=dtype, trust_remote_code=False)
    enforce_contract(verifier.model, path, allow_fallback=False)
    return verifier


@torch.inference_mode()
def record(verifier: Verifier, count: int = 5, layers: tuple[int, ...] = TAPS, seed: int = 0) -> list[Recorded]:
    """Sampled traces of the verifier, each of another length, with their states computed one by one."""
    rng = np.random.default_rng(seed)
    recorded = []
    for number in range(count):
        prompt = rng.integers(3, TOKENS, 8).tolist()
        ids = np.array(sampled(verifier.model, prompt, 40 + 3 * number))
        mask = np.arange(len(ids)) >= 8
        last_block = len(verifier.blocks) - 1
        (states,) = verifier.prefill(torch.from_numpy(ids)[None], tuple(sorted({*layers, last_block})), 1 << 15)
        taps = torch.stack([states.taps[layer][0] for layer in layers], 1)
        recorded.append(Recorded(ids, mask, taps, states.taps[last_block][0], states.final[0]))
    return recorded


def write_speculators(
    folder: Path,
    rows: list[Recorded],
    *,
    states: Callable[[torch.Tensor], torch.Tensor] = lambda item: item,
    float8: bool = False,
) -> Path:
    """`hs_N.safetensors` and their masks beside the folder; `states` may alter the states [L, N + 1, H]."""
    folder.mkdir(parents=True)
    for number, row in enumerate(rows):
        written = states(torch.cat([row.taps, row.before[:, None]], 1)).contiguous()
        tensors = {"hidden_states": written, "token_ids": torch.from_numpy(row.token_ids)}
        if float8:  # hs_connectors' quantize_tensor_to_fp8
            scale = (written.float().abs().amax((1, 2), keepdim=True) / 448).clamp(min=1e-12)
            tensors |= {
                "hidden_states": (written.float() / scale).to(torch.float8_e4m3fn),
                "hidden_states_scales": scale,
            }
        save_file(tensors, folder / f"hs_{number}.safetensors")
    write_masks(folder.parent / f"{folder.name}.masks.jsonl", rows)
    return folder


def write_masks(path: Path, rows: list[Recorded]) -> Path:
    """The rows' ids and masks, as speculators' dataset has them."""
    with path.open("w") as file:
        for row in rows:
            ids, mask = row.token_ids.tolist(), row.loss_mask.astype(int).tolist()
            file.write(json.dumps({"input_ids": ids, "loss_mask": mask, "seq_len": len(ids)}) + "\n")
    return path


def write_specforge(folder: Path, rows: list[Recorded], *, before_norm: bool = False) -> Path:
    """`.ckpt` files of torch.save, as SpecForge's offline reader wants them."""
    folder.mkdir(parents=True)
    for number, row in enumerate(rows):
        sample = {
            "input_ids": torch.from_numpy(row.token_ids),
            "loss_mask": torch.from_numpy(row.loss_mask).long(),
            "aux_hidden_state": row.taps.flatten(1)[None],
            "hidden_state": (row.before if before_norm else row.after)[None],
        }
        torch.save(sample, folder / f"data_{number}.ckpt")
    return folder


def write_modelopt(folder: Path, rows: list[Recorded], *, before_norm: bool | None = None, masks: bool = True) -> Path:
    """`.pt` files of torch.save, as ModelOpt's OfflineSupervisedDataset wants them."""
    folder.mkdir(parents=True)
    for number, row in enumerate(rows):
        sample: dict[str, Any] = {
            "input_ids": torch.from_numpy(row.token_ids),
            "hidden_states": row.before if before_norm else row.after,
            "aux_hidden_states": row.taps.flatten(1),
        }
        if masks:
            sample["loss_mask"] = torch.from_numpy(row.loss_mask).long()
        if before_norm is not None:
            sample["hidden_states_prenorm"] = before_norm
        torch.save(sample, folder / f"{number}.pt")
    return folder


def write_deepspec(
    folder: Path,
    rows: list[Recorded],
    *,
    hidden_dtype: str = "bfloat16",
    layer_ids: tuple[int, ...] = TAPS,
    per_shard: int = 2,
) -> Path:
    """A target cache of DeepSpec: manifest, index, and shards of a few conversations each."""
    folder.mkdir(parents=True)
    records = np.zeros(len(rows), RECORD)
    names = [f"shard-{number:05d}.bin" for number in range(-(-len(rows) // per_shard))]
    for number, row in enumerate(rows):
        length, shard = len(row.token_ids), number // per_shard
        arrays = {
            "token_ids": row.token_ids.astype("<i4").tobytes(),
            "attention_mask": np.ones(length, np.uint8).tobytes(),
            "loss_mask": row.loss_mask.astype(np.uint8).tobytes(),
        }
        for name, states in (("states", row.taps.flatten(1)), ("last_state", row.after)):
            cast = states.to(getattr(torch, hidden_dtype)).contiguous()
            arrays[name] = cast.view(torch.uint8).numpy().tobytes()
        records[number] = (number, shard, length, 0, 0, 0, 0, 0)
        with (folder / names[shard]).open("ab") as file:
            for name, values in arrays.items():
                records[name][number] = file.tell()
                file.write(values)
    records.tofile(folder / "samples.idx")
    manifest = {
        "version": 2, "num_samples": len(rows), "num_shards": len(names), "target_layer_ids": list(layer_ids),
        "hidden_dtype": hidden_dtype, "token_dtype": "int32", "mask_dtype": "uint8", "index_record_size": 56,
        "hidden_size": rows[0].after.shape[-1], "target_model_name_or_path": "somebody/a-model",
        "shards": [{"shard_id": number, "file_name": name} for number, name in enumerate(names)],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_automodel(
    folder: Path,
    rows: list[Recorded],
    verifier: Verifier,
    *,
    layer_ids: tuple[int, ...] = TAPS,
    attention: bool = False,
    pad: int = 2,
    per_shard: int = 2,
) -> Path:
    """A cache of Automodel's DSpark trainer: manifest, weights, and shards of rows padded with the token `pad`."""
    folder.mkdir(parents=True)
    length, width = max(len(row.token_ids) for row in rows) + 3, rows[0].after.shape[-1]
    for first in range(0, len(rows), per_shard):
        part = rows[first : first + per_shard]
        tensors = {
            "input_ids": torch.full((len(part), length), pad),
            "loss_mask": torch.zeros(len(part), length, dtype=torch.long),
            "target_hidden_states": torch.ones(len(part), length, len(layer_ids) * width),
            "target_last_hidden_states": torch.ones(len(part), length, width),
        }
        if attention:
            tensors["attention_mask"] = torch.zeros(len(part), length, dtype=torch.long)
        for number, row in enumerate(part):
            own = len(row.token_ids)
            tensors["input_ids"][number, :own] = torch.from_numpy(row.token_ids)
            tensors["loss_mask"][number, :own] = torch.from_numpy(row.loss_mask).long()
            tensors["target_hidden_states"][number, :own] = row.taps.flatten(1)
            tensors["target_last_hidden_states"][number, :own] = row.after
            if attention:
                tensors["attention_mask"][number, :own] = 1
        save_file(tensors, folder / f"shard-{first // per_shard:06d}.safetensors")
    embeddings, head = verifier.embeddings.weight, verifier.head.weight
    weights = {"embed_tokens.weight": embeddings.detach().clone(), "lm_head.weight": head.detach().clone()}
    save_file(weights, folder / "target_weights.safetensors")
    manifest = {
        "format_version": 1, "complete": True, "target_model": "somebody/a-model", "hidden_size": width,
        "num_hidden_layers": len(verifier.blocks), "num_samples": len(rows), "shard_size": per_shard,
        "target_layer_ids": list(layer_ids), "dtype": "fp32", "seq_length": length,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
