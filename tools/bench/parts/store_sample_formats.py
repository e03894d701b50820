"""Formats of the store benchmark that keep conversations apart: as samples of one tar, or as one file each."""

from __future__ import annotations

import io
import os
import tarfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from webdataset import tariterators

from draftcache.store.common.files import fsync_directory
from draftcache.tools.bench.parts.store_formats import Arrays, Case, Window, sync, window_spans

_NPY_HEADER = 128  # numpy pads a small array's header to this


class Webdataset(Case):
    """Implements `Case` by one tar of .npy members, written and read by the webdataset library.

    The library has no random access. So `read` passes over all conversations before the one that is read, and
    `read_windows` yields windows in the order of the tar, in one pass that decodes only conversations with windows.
    """

    name = "webdataset"

    def write(self) -> None:
        self.root.mkdir(parents=True)
        with self._path.open("wb") as file:
            with webdataset.TarWriter(file) as tar:
                for number, item in enumerate(self.content.conversations):
                    tar.write({"__key__": f"{number:09d}"} | {f"{name}.npy": item.arrays[name] for name in self.specs})
            sync(file, self.durable)
        fsync_directory(self.root)

    def open(self) -> NDArray[np.int64]:
        """Compute lengths from the sizes in the members' tar headers, skipping from one header to the next."""
        lengths = []
        with tarfile.open(self._path) as tar:
            for member in tar:
                if member.name.endswith(".token_ids.npy"):
                    lengths.append((member.size - _NPY_HEADER) // np.dtype(np.uint32).itemsize)
        return np.array(lengths, np.int64)

    def read(self, number: int) -> Arrays:
        return next(arrays for index, arrays in enumerate(self.read_all()) if index == number)

    def read_window(self, number: int, first: int, count: int) -> Arrays:
        return next(self.read_windows([(number, first, count)]))

    def read_all(self) -> Iterator[Arrays]:
        with self._path.open("rb") as file:
            for sample in webdataset.DataPipeline(lambda: _samples(file), webdataset.decode()):
                yield {name: sample[f"{name}.npy"] for name in self.specs}

    def read_windows(self, windows: Sequence[Window]) -> Iterator[Arrays]:
        wanted: dict[int, list[Window]] = {}
        for window in windows:
            wanted.setdefault(window[0], []).append(window)
        with self._path.open("rb") as file:
            for number, sample in enumerate(_samples(file)):
                if number not in wanted:
                    continue
                arrays = {name: np.load(io.BytesIO(sample[f"{name}.npy"])) for name in self.window_names}
                for _, first, count in wanted[number]:
                    spans = window_spans(first, count, arrays.__getitem__)
                    yield {name: values[slice(*spans[self.specs[name].axis])] for name, values in arrays.items()}

    @property
    def _path(self) -> Path:
        return self.root / "00000.tar"


def _samples(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Run the stages of webdataset.WebDataset over an open file, which the caller closes: WebDataset leaves it open."""
    streams = [{"url": file.name, "stream": file}]
    samples: Iterator[dict[str, Any]] = tariterators.group_by_keys(tariterators.tar_file_expander(streams))
    return samples


class _PerConversation(Case):
    """A format with one file per conversation."""

    suffix: ClassVar[str]

    @abstractmethod
    def save(self, arrays: Arrays, path: Path) -> None:
        """Write one conversation's file, without fsync."""

    @abstractmethod
    def length(self, path: Path) -> int:
        """Return the number of tokens of a conversation, from as little of its file as the format allows."""

    def write(self) -> None:
        self.root.mkdir(parents=True)
        for number, item in enumerate(self.content.conversations):
            path = self._path(number)
            self.save({name: item.arrays[name] for name in self.specs}, path)
            if self.durable:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        fsync_directory(self.root)

    def open(self) -> NDArray[np.int64]:
        """Open every file, because only the file holds its conversation's length."""
        paths = sorted(entry.path for entry in os.scandir(self.root))
        return np.array([self.length(Path(path)) for path in paths], np.int64)

    def _path(self, number: int) -> Path:
        return self.root / f"{number:09d}.{self.suffix}"


class TorchSave(_PerConversation):
    """Implements `Case` by torch.save of one dict per conversation, memory-mapped by reads.

    This is SpecForge's form, with our arrays in it.
    """

    name = "torch-save"
    suffix = "pt"

    def save(self, arrays: Arrays, path: Path) -> None:
        with path.open("wb") as file:
            torch.save({name: torch.from_numpy(values) for name, values in arrays.items()}, file)

    def length(self, path: Path) -> int:
        return len(self._load(path)["token_ids"])

    def read(self, number: int) -> Arrays:
        return {name: self._into(name, values.numpy()) for name, values in self._load(self._path(number)).items()}

    def read_window(self, number: int, first: int, count: int) -> Arrays:
        mapped = {name: values.numpy() for name, values in self._load(self._path(number)).items()}
        spans = window_spans(first, count, mapped.__getitem__)
        return {
            name: self._into(name, mapped[name][slice(*spans[self.specs[name].axis])]) for name in self.window_names
        }

    def _load(self, path: Path) -> dict[str, torch.Tensor]:
        loaded: dict[str, torch.Tensor] = torch.load(path, mmap=True, weights_only=True)
        return loaded


class Safetensors(_PerConversation):
    """Implements `Case` by one safetensors file per conversation, memory-mapped by reads."""

    name = "safetensors"
    suffix = "safetensors"

    def save(self, arrays: Arrays, path: Path) -> None:
        save_file(arrays, path)

    def length(self, path: Path) -> int:
        with safe_open(path, "pt") as file:
            return int(file.get_slice("token_ids").get_shape()[0])

    def read(self, number: int) -> Arrays:
        with safe_open(self._path(number), "pt") as file:
            return {name: self._into(name, file.get_tensor(name).numpy()) for name in self.specs}

    def read_window(self, number: int, first: int, count: int) -> Arrays:
        with safe_open(self._path(number), "pt") as file:
            spans = window_spans(first, count, lambda name: file.get_tensor(name).numpy())
            slices = {name: slice(*spans[self.specs[name].axis]) for name in self.window_names}
            return {name: self._into(name, file.get_slice(name)[part].numpy()) for name, part in slices.items()}
