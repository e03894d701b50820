"""Every error draftcache raises on purpose.

DraftcacheError
├── InputError (ValueError)        a row, flag or file that a user handed in is wrong
├── ManifestMismatchError          two things that must agree do not: the field that differs is named
├── StoreError                     a store on disk is not what it says it is
│   ├── StoreNotFoundError (FileNotFoundError)
│   ├── StoreVersionError          written by a newer draftcache
│   ├── ShardDamagedError          sizes, hashes or checksums differ from the commit record
│   ├── StorageError               the disk or object store refused or broke off
│   └── StreamingError             what reading tar shards in a stream cannot do
├── GateError                      a captured conversation failed a validity gate
├── PrecisionError                 the verifier's fp32 state contract is not met
├── RankError                      another process of a parallel run refused it, ended or does not answer
└── CheckpointError                a draft checkpoint is incomplete or belongs to something else

Messages name what was expected, what was found, the path, and what to do.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DraftcacheError",
    "GateError",
    "InputError",
    "ManifestMismatchError",
    "PrecisionError",
    "RankError",
    "ShardDamagedError",
    "StorageError",
    "StoreError",
    "StoreNotFoundError",
    "StoreVersionError",
    "StreamingError",
]


class DraftcacheError(Exception):
    """Base of all errors below; the command line prints it without a traceback and exits with 2."""


class InputError(DraftcacheError, ValueError):
    """A row, flag or file that the user handed in is wrong."""


class ManifestMismatchError(DraftcacheError):
    """Two things that must agree (a store and a job, a checkpoint and a vocabulary map) do not."""


class StoreError(DraftcacheError):
    """A store on disk is not what its manifest and commit records say."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store at this path."""


class StoreVersionError(StoreError):
    """The store was written by a newer version of the layout."""


class ShardDamagedError(StoreError):
    """A shard's files differ from its commit record."""


class StorageError(StoreError):
    """The disk or object store refused or broke off: full, read-only, not permitted, or not answering."""


class StreamingError(StoreError):
    """Something that reading tar shards in a stream cannot do, such as more ranks than shards."""


class GateError(DraftcacheError):
    """A captured conversation failed a validity gate (finite, non-zero, norms, distinct taps)."""


class PrecisionError(DraftcacheError):
    """The verifier's fp32 SSM contract is not met on this machine."""


class RankError(DraftcacheError):
    """Another process of a parallel training run refused it, ended, or does not answer."""


class CheckpointError(DraftcacheError):
    """A draft checkpoint is incomplete, or belongs to another store, vocabulary map or objective."""
