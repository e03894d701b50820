"""Writes a checkpoint of random weights in the form that is published, several files at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import torch

from draftcache.capture.verifier.ssm_precision import stand_in_for_extension
from draftcache.store.common.files import write_json
from draftcache.store.common.tensor_files import save_tensors
from draftcache.tools.bench.parts.verifier_shape import fill

Entry: TypeAlias = tuple[str, tuple[int, ...], torch.dtype]
_IN_FLOAT32 = ("A_log", "D", "dt_bias", "e_score_correction_bias")
_MOST_WRITERS = 16


def write_checkpoint(path: Path, config: Any, device: str, file_bytes: int) -> int:
    """Write a model directory of `config` with random bf16 weights, one tensor per expert; return the weights' bytes.

    A file has at most `file_bytes`, or one tensor. The weights are made on `device`; with "cuda" on all GPUs in turn,
    by several processes.
    """
    path.mkdir(parents=True)
    config.architectures, config.dtype = ["NemotronHForCausalLM"], torch.bfloat16
    config.save_pretrained(path)
    files = list(_cut(published_tensors(config), file_bytes))
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    places = [f"cuda:{number % gpus}" if gpus else device for number in range(len(files))]
    jobs = [(path / names[number], files[number], places[number], number) for number in range(len(files))]
    if gpus:
        writers = min(len(jobs), _MOST_WRITERS, max(2, len(os.sched_getaffinity(0)) // 2))
        with ProcessPoolExecutor(writers, mp_context=get_context("spawn")) as pool:
            list(pool.map(_write_file, *zip(*jobs, strict=True)))
    else:
        for job in jobs:
            _write_file(*job)
    total = sum(map(entry_bytes, (entry for entries in files for entry in entries)))
    places_of = {entry[0]: name for name, entries in zip(names, files, strict=True) for entry in entries}
    write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places_of})
    return total


def published_tensors(config: Any) -> list[Entry]:
    """Return names, shapes and dtypes of the tensors that transformers would save of this NemotronH."""
    stand_in_for_extension()
    from transformers import NemotronHForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = NemotronHForCausalLM(config).to(torch.bfloat16)
    found = revert_weight_conversion(model, model.state_dict())
    return [
        (name, tuple(value.shape), torch.float32 if name.rpartition(".")[2] in _IN_FLOAT32 else torch.bfloat16)
        for name, value in found.items()
    ]


def entry_bytes(entry: Entry) -> int:
    """Return the bytes of a tensor."""
    return math.prod(entry[1]) * entry[2].itemsize


def _cut(entries: list[Entry], file_bytes: int) -> Iterator[list[Entry]]:
    """Yield the tensors in runs of at most `file_bytes`, at least one tensor each."""
    part: list[Entry] = []
    size = 0
    for entry in entries:
        if part and size + entry_bytes(entry) > file_bytes:
            yield part
            part, size = [], 0
        part.append(entry)
        size += entry_bytes(entry)
    yield part


@torch.no_grad()
def _write_file(path: Path, entries: list[Entry], place: str, seed: int) -> None:
    generator = torch.Generator(device=place).manual_seed(seed)
    tensors = {}
    for name, shape, dtype in entries:
        made = torch.empty(shape, dtype=dtype, device=place)
        fill(name, made, generator)
        tensors[name] = made.cpu()
    save_tensors(path, tensors, metadata={"format": "pt"})
