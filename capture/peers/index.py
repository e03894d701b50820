"""Which conversations a peer's cache holds: token ids, masks and files, and what is set aside with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from draftcache.capture.peers.recorded import tokens_key
from draftcache.capture.peers.samples import (
    CacheDescription,
    DamagedSampleError,
    LoadStates,
    PeerCache,
    PeerReader,
    PeerSample,
    SetAside,
)
from draftcache.capture.prepare.rows.files import read_conversations
from draftcache.capture.prepare.rows.rejections import Rejection
from draftcache.capture.prepare.rows.sources import expand_input
from draftcache.capture.prepare.rows.token_rows import TokenRow
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import atomic_path

ALL = "all"
"""The value of --masks by which every token carries loss."""
PROBED = 4096
"""Tokens of the conversations that are kept for the probe."""
SET_ASIDE = "set_aside.jsonl"
"""Name of the list of files that are not imported, in the rows' folder."""


class PeerIndex:
    """The conversations of all splits; the states of equal token ids are taken from the first file that has them.

    Token ids and masks go to the rows' files as they are read. Memory holds a key and a path per conversation, and the
    first few conversations whole, for the probe.
    """

    def __init__(self, folder: Path) -> None:
        """Rows for prepare are written to `folder`, and what is set aside."""
        self._folder = folder
        self.loads: dict[str, LoadStates] = {}
        """How to read a conversation's states, by `recorded.tokens_key`."""
        self.first_samples: list[PeerSample] = []
        """The first conversations, of at least PROBED tokens where there are so many."""
        self.rows: dict[str, Path] = {}
        """The file of rows of each split."""
        self.set_aside: list[SetAside] = []
        self.files = 0
        self.description = CacheDescription()
        """What the caches say of themselves; all of them say the same."""
        self.longest = 0
        """Tokens of the longest conversation."""
        self._kept_tokens = 0

    @property
    def first(self) -> PeerSample:
        """A conversation that stands for all: they have one dtype, one number of taps and one hidden size."""
        return self.first_samples[0]

    def add_split(
        self, name: str, reader: PeerReader, source: Path, masks: Masks, advance: Callable[[], object]
    ) -> None:
        """Read the heads of all files of a source, set aside what is damaged, and call `advance` after each file.

        Raises InputError where there is no file, where a conversation has no loss mask and none were given, and where
        a cache says that it is of another verifier, or of other blocks, than the one before.
        """
        cache, count = reader.open(source), 0
        self._require_same_cache(source, cache.description)
        self._folder.mkdir(parents=True, exist_ok=True)
        self.rows[name] = self._folder / f"{name}.jsonl"
        with atomic_path(self.rows[name]) as partial, partial.open("w", encoding="utf-8") as rows:
            for path in cache.files:
                self.files += 1
                for item in _items(cache, path):
                    if isinstance(item, SetAside):
                        self.set_aside.append(item)
                        continue
                    try:
                        self._require_like_first(item)
                        rows.write(_row(item, masks.of(item)))
                        self._add(item)
                        count += 1
                    except DamagedSampleError as exc:
                        self.set_aside.append(SetAside.of(item.path, exc))
                advance()
            if not count:
                shown = "; ".join(f"{item.file}: {item.reason}" for item in self.set_aside[:3])
                raise InputError(f"{source}: expected at least one whole conversation, found none: {shown}")

    def _require_same_cache(self, source: Path, found: CacheDescription) -> None:
        first = self.description
        if self.rows and (found.verifier, found.layers) != (first.verifier, first.layers):
            raise InputError(
                f"{source}: expected a cache of {first.verifier} with blocks {list(first.layers)} as the first one, "
                f"found one of {found.verifier} with blocks {list(found.layers)}"
            )
        self.description = first if self.rows else found

    def _add(self, sample: PeerSample) -> None:
        self.loads.setdefault(tokens_key(sample.token_ids), sample.load)
        self.longest = max(self.longest, len(sample.token_ids))
        if self._kept_tokens < PROBED:
            self.first_samples.append(sample)
            self._kept_tokens += len(sample.token_ids)

    def _require_like_first(self, sample: PeerSample) -> None:
        if not self.first_samples:
            return
        first = self.first
        for what, found, expected in (
            ("states in", sample.dtype, first.dtype),
            ("auxiliary states per token:", sample.taps, first.taps),
            ("hidden size", sample.hidden_size, first.hidden_size),
            ("last state before the final norm:", sample.before_norm, first.before_norm),
        ):
            if found != expected:
                raise DamagedSampleError(f"{sample.path}: expected {what} {expected} as in {first.path}, found {found}")

    def write_set_aside(self) -> None:
        """Write what was set aside, one JSON object per line."""
        with atomic_path(self._folder / SET_ASIDE) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"file": item.file, "reason": item.reason}) + "\n" for item in self.set_aside)


def _items(cache: PeerCache, path: Path) -> Iterator[PeerSample | SetAside]:
    """What a file holds, and what of it is damaged: the whole of it, or single conversations."""
    try:
        yield from cache.read(path)
    except DamagedSampleError as exc:
        yield SetAside.of(path, exc)


def _row(sample: PeerSample, mask: NDArray[np.bool_]) -> str:
    row = {"token_ids": sample.token_ids.tolist(), "loss_mask": mask.astype(int).tolist()}
    return json.dumps(row | {"file": sample.path.name}) + "\n"


class Masks:
    """Loss masks by token ids: of rows that were given, of the files themselves, or of every token."""

    def __init__(self, text: str = "") -> None:
        """`text` is "all", what `draftcache prepare` takes as an input, or empty. Raises InputError for other rows."""
        self._all = text == ALL
        self._given = None if self._all or not text else _read_masks(text)

    @staticmethod
    def origin_of(text: str) -> str:
        """Where the masks of such a `text` come from, for the store's provenance."""
        return {ALL: "every token, by --masks all", "": "the files"}.get(text, "--masks")

    def of(self, sample: PeerSample) -> NDArray[np.bool_]:
        """The loss mask [L] of a conversation, of which the first token never carries loss.

        Raises DamagedSampleError where the rows that were given have none, and InputError where none were given.
        """
        if self._all:
            return np.arange(len(sample.token_ids)) > 0
        if self._given is not None:
            found = self._given.get(tokens_key(sample.token_ids))
            if found is None:
                raise DamagedSampleError(f"{sample.path}: expected a row of these token ids in --masks, found none")
            return np.unpackbits(found, count=len(sample.token_ids)).astype(np.bool_)
        if sample.loss_mask is None:
            raise InputError(
                f"{sample.path}: expected a loss mask, found none in the file: give --masks ROWS, the rows (token_ids "
                "or input_ids, with loss_mask) that the states were computed from, such as the folder of "
                "datasets.save_to_disk that speculators prepared, or --masks all, if every token is to carry loss"
            )
        return sample.loss_mask


def _read_masks(text: str) -> dict[str, NDArray[np.uint8]]:
    """The rows' masks by `tokens_key`, eight tokens in a byte. Raises InputError for rows of another form."""
    masks: dict[str, NDArray[np.uint8]] = {}
    for path in expand_input(text):
        for item in read_conversations(path):
            if isinstance(item, Rejection):
                raise InputError(f"{item.file}:{item.line}: expected {item.expected}, found {item.found}")
            number, row = item
            if not isinstance(row, TokenRow):
                raise InputError(
                    f"{path}:{number}: expected a row of token_ids or input_ids with loss_mask, found messages: "
                    "`draftcache prepare` makes such rows' masks, but the ids have to be those of the states"
                )
            masks[tokens_key(row.token_ids)] = np.packbits(row.loss_mask)
            # A conversation whose last token was never read has states, and so ids, of one token less.
            masks.setdefault(tokens_key(row.token_ids[:-1]), np.packbits(row.loss_mask[:-1]))
    return masks


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states of this dtype are kept without rounding: float16 becomes float32."""
    return torch.float32 if dtype == torch.float16 else dtype
