"""Takes shards and files that `verify` found damaged out of a store, so that capture redoes only these.

Nothing is thrown away: they are moved to `quarantine/`.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from draftcache.store.common.errors import StoreError
from draftcache.store.format.commits import SHARDS_DIRECTORY, record_name, shard_name, shard_number
from draftcache.store.format.index import INDEX_NAME, INDEX_RECORD, write_store_index
from draftcache.store.format.manifest import MANIFEST_NAME, StoreManifest, top_level_names
from draftcache.store.storage.base import Location, Storage, open_storage
from draftcache.store.verify_report import VerifyReport

QUARANTINE_DIRECTORY = "quarantine"


@dataclass(frozen=True)
class Repair:
    """What `repair_store` took out of a store."""

    shards: list[int]
    """Numbers of the shards, ascending."""
    files: list[str]
    """Names of the top-level files."""
    directory: str
    """The directory, relative to the store, that they were moved to; empty if nothing was taken out."""
    index_rebuilt: bool
    """Whether the whole store's index was written again, from shards that are all there."""


def repair_store(location: Location, report: VerifyReport) -> Repair:
    """Move the damaged shards and files of a report by `verify_store` to quarantine.

    Run the capture command afterwards, which makes them again. A call that is killed half-way leaves a store that
    verify still calls damaged: run both again. Raises StoreError where another job is writing the store, or where the
    manifest itself is damaged, which the shards cannot replace; StorageError.
    """
    storage = open_storage(location)
    lock = storage.lock("store")
    if lock is None:
        raise StoreError(f"{storage.describe()}: another job is writing this store; wait for it, then repair")
    try:
        return _repair(storage, report)
    finally:
        lock.release()


def _repair(storage: Storage, report: VerifyReport) -> Repair:
    names = {item.name for item in report.damages}
    if MANIFEST_NAME in names:
        raise StoreError(
            f"{storage.describe(MANIFEST_NAME)}: expected a readable manifest; the shards can not replace it. Put "
            "back a copy of it, or move it away and run the same capture command: shards of equal settings are kept"
        )
    manifest = StoreManifest.load(storage)
    files = sorted(names & set(top_level_names(manifest)))
    shards = report.damaged_shards
    # Two repairs may begin within a second, in a bucket even at once: each has a directory of its own.
    started = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    target = f"{QUARANTINE_DIRECTORY}/{started}-{uuid.uuid4().hex[:8]}"
    # The store's index is removed first: a finished store without one of its shards must never be seen.
    rebuild = bool(shards) or INDEX_NAME in names
    if rebuild:
        storage.delete(record_name(INDEX_RECORD))
        storage.delete(INDEX_NAME)
    for shard in shards:
        name = shard_name(shard)
        held = [path for path in storage.list(SHARDS_DIRECTORY) if shard_number(path) == shard]
        for directory in sorted({"/".join(path.split("/")[:2]) for path in held}):
            storage.move_directory(directory, f"{target}/{directory}")
        _move_file(storage, record_name(name), target)
    for file in files:
        _move_file(storage, file, target)
        _move_file(storage, record_name(Path(file).stem), target)
    rebuilt = rebuild and write_store_index(storage, manifest)
    return Repair(shards=shards, files=files, directory=target if shards or files else "", index_rebuilt=rebuilt)


def _move_file(storage: Storage, name: str, target: str) -> None:
    """Copy a file, then remove it. A process that is killed between the two leaves both."""
    if storage.size(name) is not None:
        storage.put(f"{target}/{name}", storage.read(name))
        storage.delete(name)
