"""Formats of the store benchmark that keep each conversation by itself: in one tar, or one file for each."""

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
from draftcache.tools.bench.store_formats import Arrays, Case, Window, sync, window_spans

_NPY_HEADER = 128  # numpy pads a small array's header to this


class Webdataset(Case):
    """One tar of .npy members, written and read by the library. It has no random access, so windows cost one pass."""

    name = "webdataset"

    def write(self) -> None:
        """See Case."""
        self.root.mkdir(parents=True)
        with self._path.open("wb") as file:
            with webdataset.TarWriter(file) as tar:
                for number, item in enumerate(self.content.conversations):
                    tar.write({"__key__": f"{number:09d}"} | {f"{name}.npy": item.arrays[name] for name in self.specs})
            sync(file, self.durable)
        fsync_directory(self.root)

    def open(self) -> NDArray[np.int64]:
        """See Case. Lengths are in the members' tar headers, found by hopping from one to the next."""
        lengths = []
        with tarfile.open(self._path) as tar:
            for member in tar:
                if member.name.endswith(".token_ids.npy"):
                    lengths.append((member.size - _NPY_HEADER) // np.dtype(np.uint32).itemsize)
        return np.array(lengths, np.int64)

    def read(self, number: int) -> Arrays:
        """See Case: a pass up to the conversation."""
        return next(arrays for place, arrays in enumerate(self.read_all()) if place == number)

    def read_window(self, number: int, first: int, count: int) -> Arrays:
        """See Case."""
        return next(self.read_windows([(number, first, count)]))

    def read_all(self) -> Iterator[Arrays]:
        """See Case."""
        with self._path.open("rb") as file:
            for sample in webdataset.DataPipeline(lambda: _samples(file), webdataset.decode()):
                yield {name: sample[f"{name}.npy"] for name in self.specs}

    def read_windows(self, windows: Sequence[Window]) -> Iterator[Arrays]:
        """See Case, but in the order of the tar: only members of conversations that are asked for are decoded."""
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
    """The stages of webdataset.WebDataset, over a file that is ours to close: WebDataset leaves it open."""
    streams = [{"url": file.name, "stream": file}]
    samples: Iterator[dict[str, Any]] = tariterators.group_by_keys(tariterators.tar_file_expander(streams))
    return samples


class _PerConversation(Case):
    """One file per conversation."""

    suffix: ClassVar[str]

    @abstractmethod
    def save(self, arrays: Arrays, path: Path) -> None:
        """Write one conversation's file; fsync is left to the caller."""

    @abstractmethod
    def length(self, path: Path) -> int:
        """Tokens of a conversation, from as little of its file as the format allows."""

    def write(self) -> None:
        """See Case."""
        self.root.mkdir(parents=True)
        for number, item in enumerate(self.content.conversations):
            path = self._path(number)
            self.save({name: item.arrays[name] for name in self.specs}, path)
            if self.durable:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        fsync_directory(self.root)

    def open(self) -> NDArray[np.int64]:
        """See Case: every file has to be opened."""
        paths = sorted(entry.path for entry in os.scandir(self.root))
        return np.array([self.length(Path(path)) for path in paths], np.int64)

    def _path(self, number: int) -> Path:
        return self.root / f"{number:09d}.{self.suffix}"


class TorchSave(_PerConversation):
    """One torch.save of a dict per conversation, mapped when it is read: SpecForge's form, with our arrays in it."""

    name = "torch-save"
    suffix = "pt"

    def save(self, arrays: Arrays, path: Path) -> None:
        """See _PerConversation."""
        with path.open("wb") as file:
            torch.save({name: torch.from_numpy(values) for name, values in arrays.items()}, file)

    def length(self, path: Path) -> int:
        """See _PerConversation."""
        return len(self._load(path)["token_ids"])

    def read(self, number: int) -> Arrays:
        """See Case."""
        return {name: self._into(name, values.numpy()) for name, values in self._load(self._path(number)).items()}

    def read_window(self, number: int, first: int, count: int) -> Arrays:
        """See Case."""
        mapped = {name: values.numpy() for name, values in self._load(self._path(number)).items()}
        spans = window_spans(first, count, mapped.__getitem__)
        return {
            name: self._into(name, mapped[name][slice(*spans[self.specs[name].axis])]) for name in self.window_names
        }

    def _load(self, path: Path) -> dict[str, torch.Tensor]:
        loaded: dict[str, torch.Tensor] = torch.load(path, mmap=True, weights_only=True)
        return loaded


class Safetensors(_PerConversation):
    """One safetensors file per conversation, mapped when it is read."""

    name = "safetensors"
    suffix = "safetensors"

    def save(self, arrays: Arrays, path: Path) -> None:
        """See _PerConversation."""
        save_file(arrays, path)

    def length(self, path: Path) -> int:
        """See _PerConversation."""
        with safe_open(path, "pt") as file:
            return int(file.get_slice("token_ids").get_shape()[0])

    def read(self, number: int) -> Arrays:
        """See Case."""
        with safe_open(self._path(number), "pt") as file:
            return {name: self._into(name, file.get_tensor(name).numpy()) for name in self.specs}

    def read_window(self, number: int, first: int, count: int) -> Arrays:
        """See Case."""
        with safe_open(self._path(number), "pt") as file:
            spans = window_spans(first, count, lambda name: file.get_tensor(name).numpy())
            slices = {name: slice(*spans[self.specs[name].axis]) for name in self.window_names}
            return {name: self._into(name, file.get_slice(name)[part].numpy()) for name, part in slices.items()}
