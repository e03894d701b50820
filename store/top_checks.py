"""Checks the files of a store beside its shards: the frozen weights, the vocabulary maps and the store's index."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from draftcache.store.common.errors import StorageError, StoreError
from draftcache.store.file_checks import checked_files
from draftcache.store.format.commits import (
    SETTINGS_HASH,
    Record,
    read_committed,
    require_manifest,
    require_record,
)
from draftcache.store.format.frozen import FROZEN_NAME, require_frozen
from draftcache.store.format.index import (
    INDEX_NAME,
    INDEX_RECORD,
    find_index_record,
    join_indexes,
    load_index,
    read_shard_index,
)
from draftcache.store.format.manifest import StoreManifest, top_level_names
from draftcache.store.format.vocab_map import VocabMap
from draftcache.store.shard_checks import REFUSED, Damage, brief
from draftcache.store.storage.base import Storage


def check_top_level(storage: Storage, manifest: StoreManifest, quick: bool) -> list[Damage]:
    """Check the frozen weights, the vocabulary maps, and the store's index where one is committed."""
    damages = []
    for name in (*top_level_names(manifest), INDEX_NAME):
        found = _check_top_file(storage, manifest, name, quick)
        for pause in storage.pauses if found else ():  # the record itself may be one of a moment ago
            time.sleep(pause)
            found = found and _check_top_file(storage, manifest, name, quick)
        damages += found
    return damages


def _check_top_file(storage: Storage, manifest: StoreManifest, name: str, quick: bool) -> list[Damage]:
    stem = Path(name).stem
    try:
        record = find_index_record(storage) if name == INDEX_NAME else require_record(storage, stem)
        if record is None:
            return []  # the store is not finished
        if name == INDEX_NAME:
            require_manifest(storage, stem, record, manifest.hash)
        else:
            require_manifest(storage, stem, record, manifest.settings_hash, field=SETTINGS_HASH)
        with checked_files(storage, record, [*record["files"], name], quick=quick) as (held, damaged):
            if not quick and held.local_root is not None and name not in damaged:
                _require_readable(held.local_root / name, manifest)
            return [Damage(name=file, problem=problem) for file, problem in damaged.items()]
    except REFUSED as exc:
        if isinstance(exc, StorageError) and storage.local_root is None:
            raise  # an object store that does not answer is not damaged
        return [Damage(name=name, problem=brief(exc))]


def _require_readable(path: Path, manifest: StoreManifest) -> None:
    """Raise an error unless a top-level file is what its name says, whatever its hash."""
    vocabularies = manifest.teacher_form.vocabularies
    maps = {vocab.map_name: vocab.hash for vocab in vocabularies}
    if path.name in maps and (found := VocabMap.load(path).hash) != maps[path.name]:
        raise StoreError(f"{path}: expected vocabulary {maps[path.name]}, found {found}")
    if path.name == FROZEN_NAME:
        require_frozen(
            path, manifest.hidden_size, manifest.head_size, {vocab.head: vocab.size for vocab in vocabularies}
        )
    if path.name == INDEX_NAME:
        load_index(path.read_bytes(), str(path))


def is_indexed(storage: Storage) -> bool:
    """Return whether the store's index is committed. A damaged record counts: `check_top_level` reports it."""
    try:
        return find_index_record(storage) is not None
    except StorageError:
        raise
    except StoreError:
        return True


def check_store_index(storage: Storage, records: dict[int, Record], *, whole: bool) -> list[Damage]:
    """Check that the store's index is its shards' indexes, one after the other.

    `records` holds the commit records of shards by number. Unless they are the `whole` store's, the index is checked at
    their rows only.
    """
    record = require_record(storage, INDEX_RECORD)
    index = load_index(read_committed(storage, record, INDEX_NAME), storage.describe(INDEX_NAME))
    if not whole:
        index = index[np.isin(index["shard"], list(records))]
    try:
        joined = join_indexes(storage, [records[number] for number in sorted(records)])
    except StoreError:
        return _damaged_indexes(storage, records)
    if not np.array_equal(index, joined):
        return [Damage(name=INDEX_NAME, problem="expected the rows of the shards' indexes in order, found others")]
    return []


def _damaged_indexes(storage: Storage, records: dict[int, Record]) -> list[Damage]:
    """Return the shards' indexes that can't be read. They belong to shards that only a journal calls good."""
    damages = []
    for number, record in sorted(records.items()):
        try:
            read_shard_index(storage, record)
        except StorageError:
            raise
        except StoreError as exc:
            damages.append(Damage(name=f"{record['directory']}/{INDEX_NAME}", problem=str(exc), shard=number))
    return damages
