"""Whether a new store may begin at a place: not among files that are not its own."""

from __future__ import annotations

from pathlib import Path

from draftcache.store.common.errors import InputError
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.storage.base import Storage
from draftcache.store.storage.local import LOCKS_DIRECTORY


def require_own_or_empty(storage: Storage) -> None:
    """Raise InputError where a store would begin among files that are not its own: nothing foreign is overwritten.

    A directory counts as ours once a writer has locked something there, which only happens after this check.
    """
    if StoreManifest.exists(storage):  # whether it is a store's manifest is checked when it is read
        return
    root = storage.local_root
    if root is None:
        foreign = [name for name in storage.list("") if Path(name).suffix not in (".safetensors", ".json")]
    elif root.is_dir():
        foreign = sorted(path.name for path in root.iterdir())
        # Looked for after the listing: another writer, which begins now, makes this directory before any other file.
        if (root / LOCKS_DIRECTORY).is_dir():
            foreign = []
    else:
        foreign = [root.name] if root.exists() else []
    if foreign:
        raise InputError(
            f"{storage.describe()}: expected a store, or nothing yet, found {', '.join(foreign[:5])}"
            + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
            + " and no manifest.json; choose another --output"
        )
