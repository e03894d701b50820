"""What a shard's layout offers to a reader and to a writer, and the layouts by name: zarr groups and tar files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from draftcache.store.format.array_spec import ArraySpec
from draftcache.store.format.commits import Record
from draftcache.store.format.index import INDEX_NAME
from draftcache.store.format.schema import Conversation
from draftcache.store.layouts.shard_files import Files
from draftcache.store.layouts.tar_shards import DATA_NAME, MEMBERS_NAME, TarShard, TarShardWriter
from draftcache.store.layouts.zarr_format import METADATA, data_file
from draftcache.store.layouts.zarr_reader import ZarrShard
from draftcache.store.layouts.zarr_writer import ZarrShardWriter
from draftcache.store.storage.base import Stage, Storage


class ShardReader(Protocol):
    """One committed shard that is open for reads of any conversation's arrays."""

    whole_arrays: bool
    """Whether a read of some rows of a conversation's array fetches all of them, as they share one checksum."""

    def read(self, row: np.void, name: str, first: int, count: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Read rows `first .. first+count` of one conversation's slice of the array `name`.

        `row` is the conversation's index row. The result [count, *inner] has the stored dtype. It is `out` where that
        is given, which must be contiguous and of this shape and dtype. Raises ShardDamagedError where the file is not
        the committed one or a checksum fails.
        """

    def close(self) -> None:
        """Close the shard's files."""


class ShardWriter(Protocol):
    """One shard that is being written."""

    def append(self, item: Conversation) -> None:
        """Add one conversation, with its arrays in the form in which they are stored."""

    def close(self) -> Files:
        """Finish every file. Returns the table of files, with names relative to the shard."""


def expected_files(layout: str, record: Record, specs: dict[str, ArraySpec]) -> list[str]:
    """Return the names, in the store, of the files that a shard of this commit record must have, for its index first.

    As in zarr, an array without rows has no file of its own.
    """
    names = [INDEX_NAME]
    if layout == "webdataset":
        names += [DATA_NAME, MEMBERS_NAME]
    else:
        names += [METADATA, *(f"{name}/{METADATA}" for name in specs)]
        names += [data_file(name, spec) for name, spec in specs.items() if record["lengths"][spec.axis]]
    return [f"{record['directory']}/{name}" for name in names]


SHARD_READERS: dict[str, Callable[[Storage, Record, dict[str, ArraySpec]], ShardReader]] = {
    "zarr": ZarrShard,
    "webdataset": TarShard,
}
"""By the manifest's `layout`, the class that reads a shard: of a storage, a commit record and the arrays' specs."""

SHARD_WRITERS: dict[str, Callable[[Stage, dict[str, ArraySpec]], ShardWriter]] = {
    "zarr": ZarrShardWriter,
    "webdataset": TarShardWriter,
}
"""By the manifest's `layout`, the class that writes a shard: to a stage, with the arrays' specs."""
