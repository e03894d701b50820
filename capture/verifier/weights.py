"""A verifier's weight files: whether all of them reached the model, whether they fit, and their fingerprint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from draftcache.store.common.errors import InputError
from draftcache.store.common.files import hash_blocks, hash_file, require_file

_WHOLE_BYTES = 4 << 20
"""Tensors up to this size are hashed whole: norms, biases, decay rates, and the routers of mixtures of experts."""
_SAMPLE_BYTES = 1 << 16
_STRIDE_BYTES = 16 << 20
_SHOWN_NAMES = 6


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a model directory in order of name. Raises InputError where there is none."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"{path}: expected *.safetensors weights, found none")
    for file in files:
        require_file(file, "safetensors weights")
    return files


def require_all_weights(path: Path, report: Mapping[str, Any]) -> None:
    """Raise InputError unless every weight of the model came from the files, and every tensor of the files was used.

    `report` is what transformers' `from_pretrained` returns with `output_loading_info`. transformers itself only warns,
    and fills what is missing with random numbers, so the capture of an incomplete checkpoint would succeed. Tensors
    that the model class declares as ignorable, such as those of a multi-token-prediction head, are not in the report.
    """
    mismatched = [f"{name} (file {list(file)}, model {list(model)})" for name, file, model in report["mismatched_keys"]]
    found = [
        f"{what} {_listed(names)}"
        for what, names in (
            ("weights of the model that no file holds:", report["missing_keys"]),
            ("tensors of other shapes:", mismatched),
            ("tensors that the model has no place for:", report["unexpected_keys"]),
            ("errors:", report.get("error_msgs", ())),
        )
        if names
    ]
    if found:
        raise InputError(
            f"{path}: expected files that hold exactly the weights that config.json describes, found "
            f"{'; '.join(found)}. Such a model would compute with random or wrongly scaled weights: complete the "
            "download, or use a checkpoint of this architecture whose weights are not quantized"
        )


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = len(ordered) - _SHOWN_NAMES
    return ", ".join(ordered[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def require_room(path: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError where the weights can't fit on the GPU, before minutes are spent on reading them."""
    needed = 0
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError) as exc:
            raise InputError(f"{file}: expected a safetensors file, found something else ({exc})") from exc
        # Counted in the dtype that the model computes with, which need not be the stored one.
        needed += dtype.itemsize * sum(math.prod(shape) for shape in shapes)
    free, total = torch.cuda.mem_get_info(device)
    if needed > free:
        raise InputError(
            f"{path}: expected weights of at most the {free / 1e9:.1f} GB that are free of {total / 1e9:.1f} GB on "
            f"{device}, found {needed / 1e9:.1f} GB; use a larger GPU, or --tensor-parallel N to split them over N "
            "of this node"
        )


def weights_fingerprint(path: Path) -> str:
    """Return the xxh3-128, in hex, of the weight files' names, sizes and headers, and of parts of their tensors.

    Tensors up to 4 MiB are hashed whole, so that a fine-tune of norms or routers alone is told apart. Of a larger
    tensor 64 KiB are hashed in every 16 MiB, at least one sample: about 0.6 % of a checkpoint of 63 GB is read. Raises
    InputError where there is no safetensors file, or one that can't be read.
    """
    return hash_blocks(block for file in weight_files(path) for block in _sampled_blocks(file))


def former_fingerprint(path: Path) -> str:
    """Return the fingerprint by which stores of former versions name these weights, so that their capture can go on.

    It is the xxh3-128 of names, sizes and 256 evenly spaced samples of 64 KiB of each file, wherever they fall.
    """
    digest = xxhash.xxh3_128()
    for item in weight_files(path):
        size = item.stat().st_size
        digest.update(json.dumps([item.name, size]).encode())
        with item.open("rb") as file:
            for offset in range(0, size, max(_SAMPLE_BYTES, size // 256)):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def full_weights_hash(path: Path) -> str:
    """Return the xxh3-128, in hex, of the weight files' names and all of their bytes.

    Raises InputError where there is no safetensors file.
    """
    digest = xxhash.xxh3_128()
    for file in weight_files(path):
        digest.update(json.dumps([file.name, hash_file(file)]).encode())
    return digest.hexdigest()


def _sampled_blocks(path: Path) -> Iterator[bytes]:
    yield json.dumps([path.name, path.stat().st_size]).encode()
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = _header(path, file, header_bytes)
        yield header
        start = 8 + header_bytes
        for name, record in json.loads(header).items():
            if name == "__metadata__":
                continue
            first, last = (start + offset for offset in record["data_offsets"])
            size = last - first
            count = 1 if size <= _WHOLE_BYTES else math.ceil(size / _STRIDE_BYTES)
            for sample in range(count):
                file.seek(first + sample * size // count)
                yield file.read(size if size <= _WHOLE_BYTES else _SAMPLE_BYTES)


def _header(path: Path, file: BinaryIO, header_bytes: int) -> bytes:
    """Return a safetensors file's JSON header, once the library has checked it. Raises InputError where it is wrong."""
    try:
        with safe_open(path, framework="np"):
            return file.read(header_bytes)
    except (SafetensorError, OSError) as exc:
        raise InputError(f"{path}: expected a safetensors file, found something else ({exc})") from exc
