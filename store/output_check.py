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
    else:
        foreign = _foreign_files(root)
    if foreign:
        raise InputError(
            f"{storage.describe()}: expected a store, or nothing yet, found {', '.join(foreign[:5])}"
            + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
            + " and no manifest.json; choose another --output"
        )


def _foreign_files(root: Path) -> list[str]:
    """Return the names found at `root` that no store has put there: its own one, where it is no directory."""
    # One look decides: another writer, which begins now, may make this directory between two.
    try:
        found = sorted(path.name for path in root.iterdir())
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        return [root.name]
    # Looked for after the listing, as that writer makes this directory before any other file.
    return [] if (root / LOCKS_DIRECTORY).is_dir() else found
