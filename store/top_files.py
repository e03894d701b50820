"""The top-level files of a store on a local disk: the frozen weights and the vocabulary maps."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from draftcache.store.common.errors import StoreError
from draftcache.store.common.files import hash_file
from draftcache.store.format.commits import (
    SETTINGS_HASH,
    RecordMissingError,
    check_hash,
    require_manifest,
    require_record,
    require_size,
)
from draftcache.store.format.frozen import FROZEN_NAME
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.local_copies import copy_file
from draftcache.store.storage.asking import ask_again
from draftcache.store.storage.base import Storage


@dataclass(frozen=True)
class StoreFiles:
    """Paths, on a local disk, of the top-level files that a trainer needs besides the shards."""

    frozen: Path
    """The verifier's frozen weights; `format.frozen` lists the tensors."""
    vocab_map: Path
    """The map of the main draft vocabulary."""
    more_vocab_maps: dict[int, Path]
    """The maps of the further draft vocabularies, by size."""


class TopFiles:
    """The top-level files, checked against their commit records.

    Files of an object store are copied to a temporary directory, which `close` removes.
    """

    def __init__(self, storage: Storage, manifest: StoreManifest) -> None:
        self._storage, self._manifest = storage, manifest
        self._copies: tempfile.TemporaryDirectory[str] | None = None

    def paths(self) -> StoreFiles:
        """Return the files' paths.

        Raises StoreError where a file has no commit record, and ShardDamagedError where it differs from its record.
        """
        form = self._manifest.teacher_form
        return StoreFiles(
            frozen=self._local_file(FROZEN_NAME),
            vocab_map=self._local_file(form.main.map_name),
            more_vocab_maps={vocab.size: self._local_file(vocab.map_name) for vocab in form.vocabularies[1:]},
        )

    def _local_file(self, name: str) -> Path:
        """Return the path of a file whose hash is the record's, which may itself be one of a moment ago."""
        return ask_again(self._storage, partial(self._look, name))

    def _look(self, name: str) -> Path:
        try:
            record = require_record(self._storage, Path(name).stem)
        except RecordMissingError as exc:
            raise StoreError(
                f"{self._storage.describe()}: expected {name} with its commit record, found none; rerun capture to "
                "finish it"
            ) from exc
        settings = self._manifest.settings_hash
        require_manifest(self._storage, Path(name).stem, record, settings, field=SETTINGS_HASH)
        size = require_size(self._storage, record, name)
        if self._storage.local_root is not None:
            path = self._storage.local_root / name
            check_hash(self._storage, record, name, hash_file(path))
            return path
        self._copies = self._copies or tempfile.TemporaryDirectory(prefix="draftcache-")
        path = Path(self._copies.name) / name
        check_hash(self._storage, record, name, copy_file(self._storage, name, size, path))
        return path

    def close(self) -> None:
        """Remove the copies of an object store's files."""
        if self._copies is not None:
            self._copies.cleanup()
            self._copies = None
