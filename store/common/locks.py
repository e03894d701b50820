"""Locks among the processes of one machine: an flock on a file, which the kernel releases however a process ends."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of filesystems that have none


class FileLock:
    """A lock, held until `release` or the end of the process. Implements `draftcache.store.storage.base.Lock`."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        """Open for reading and writing. It is -1 once the lock is released."""

    def release(self) -> None:
        """Release the lock. The file stays."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def take_lock(path: Path, *, shared: bool = False) -> FileLock | None:
    """Take the lock of the file `path`, which is created, or return None where another process holds it.

    A `shared` lock may be held by several processes at once. Where the filesystem has no locks, everyone gets one:
    nothing may depend on them alone. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened for writing, because NFS locks bytes instead, and an exclusive lock on bytes needs that.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as exc:
        if exc.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    return FileLock(descriptor)
