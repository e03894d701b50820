"""What a shard's layout offers to a reader and to a writer, and the layouts by name: zarr groups and tar files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from draftcache.store.format.array_spec import ArraySpec
from draftcache.store.format.commits import Record
from draftcache.store.format.schema import Conversation
from draftcache.store.layouts.shard_files import Files
from draftcache.store.layouts.tar_shards import TarShard, TarShardWriter
from draftcache.store.layouts.zarr_reader import ZarrShard
from draftcache.store.layouts.zarr_writer import ZarrShardWriter
from draftcache.store.storage.base import Stage, Storage


class ShardReader(Protocol):
    """One committed shard that is open for reads of any conversation's arrays."""

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
