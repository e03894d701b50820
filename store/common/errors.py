"""The errors that draftcache raises on purpose.

DraftcacheError
├── InputError (ValueError)        a row, flag or file that a user handed in is wrong
├── ManifestMismatchError          two things that must agree do not; the message names the field that differs
├── StoreError                     a store is not what its manifest and commit records say
│   ├── StoreNotFoundError (FileNotFoundError)  there is no store, or no file of it, at this path
│   ├── StoreVersionError          the store is of another version of the layout
│   ├── ShardDamagedError          sizes, hashes or checksums differ from the commit record
│   ├── StorageError               the disk or object store refused or broke off
│   └── StreamingError             a stream of tar shards cannot do what was asked of it
├── GateError                      a captured conversation failed a validity gate
├── PrecisionError                 the verifier's fp32 state contract is not met
├── RankError                      another process of a parallel run ended, or does not answer
│   └── RankRefusedError           another process refused the run
├── ServerError                    a server that answers prompts is not there, or fails again and again
├── WorkerError                    the worker processes of a command ended before the work was done
└── CheckpointError                a draft checkpoint is incomplete or belongs to something else

A message names what was expected, what was found, the path, and what to do.
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
    "RankRefusedError",
    "ServerError",
    "ShardDamagedError",
    "StorageError",
    "StoreError",
    "StoreNotFoundError",
    "StoreVersionError",
    "StreamingError",
    "WorkerError",
]


class DraftcacheError(Exception):
    """Base class of all errors of draftcache. The command line prints such an error without a trace."""

    exit_code = 2
    """Exit status of a command that this error ends: 2 where it refuses, 3 where it fails."""


class InputError(DraftcacheError, ValueError):
    """A row, flag or file that a user handed in is wrong."""


class ManifestMismatchError(DraftcacheError):
    """Two things that must agree, such as a store and a job or a checkpoint and a vocabulary map, do not."""


class StoreError(DraftcacheError):
    """A store is not what its manifest and commit records say."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store, or no file of a store, at this path."""


class StoreVersionError(StoreError):
    """The store is of another version of the layout than this draftcache reads."""


class ShardDamagedError(StoreError):
    """A file of a store differs from its commit record, in size, hash or checksum, or is missing."""


class StorageError(StoreError):
    """The disk or object store refused or broke off: it is full, read-only, not permitted, or does not answer."""

    exit_code = 3


class StreamingError(StoreError):
    """A stream of tar shards cannot do what was asked of it, such as to serve more ranks than there are shards."""


class GateError(DraftcacheError):
    """A captured conversation failed a validity gate (finite, non-zero, norms, distinct taps)."""


class PrecisionError(DraftcacheError):
    """The contract that a verifier's SSM state is kept in fp32 is not met on this machine."""


class RankError(DraftcacheError):
    """Another process of a parallel training run ended, or does not answer."""

    exit_code = 3


class RankRefusedError(RankError):
    """Another process of a parallel training run refused it, and says why in an error of its own."""

    exit_code = 2


class ServerError(DraftcacheError):
    """A server that answers prompts can't be reached, or fails however often it is asked."""

    exit_code = 3


class WorkerError(DraftcacheError):
    """The worker processes of a command ended before the work was done, for a reason that is no other error here."""

    exit_code = 3


class CheckpointError(DraftcacheError):
    """A draft checkpoint is incomplete, or belongs to another store, vocabulary map or objective."""
