"""Attempts to write a file or directory: under whose temporary name, and whether that process has ended.

On some filesystems locks do not lock (NFS without a lock service, Lustre with local locks, FUSE), so what a killed
process left is recognised without them. Process numbers mean something only within one boot of one machine, and there
within one namespace (a container); of processes elsewhere nothing is known, and only the age of their files tells.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import xxhash

_ATTEMPT = re.compile(r"\.(.+)\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.partial")
_IDLE_S = 24 * 3600.0


@dataclass(frozen=True)
class Attempt:
    """An attempt to write a file or directory, as the name of its temporary path tells it."""

    final: str
    """The name that the path is to take."""
    machine: str
    process: int

    @classmethod
    def named(cls, path: Path) -> Attempt | None:
        """Return the attempt of a path that `attempt_path` made, in any process, and None for any other path."""
        match = _ATTEMPT.fullmatch(path.name)
        return cls(match[1], match[2], int(match[3])) if match else None

    def is_of_this_process(self) -> bool:
        """Return whether this process made it."""
        return self.machine == _machine() and self.process == os.getpid()

    def has_ended(self) -> bool:
        """Return whether its process has certainly ended. False where nothing is known of the process."""
        if self.machine != _machine():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's
            return False
        return _is_zombie(self.process)


def attempt_path(final: Path) -> Path:
    """Return a temporary path beside `final` that no other attempt has, of this process or any other."""
    return final.with_name(f".{final.name}.{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")


def remove_ended(directory: Path, *, final: str | None = None) -> None:
    """Remove what attempts in `directory` left whose process has ended, and nothing else. Raises OSError.

    What processes elsewhere left goes once nothing has touched it for a day. With `final`, only attempts at that name
    are looked at.
    """
    for path in list(directory.iterdir()) if directory.is_dir() else []:
        attempt = Attempt.named(path)
        if attempt is None or (final is not None and attempt.final != final):
            continue
        if attempt.has_ended() or is_idle(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def is_idle(path: Path) -> bool:
    """Return whether nothing has touched a file, or anything in a directory, for a day."""
    try:
        newest = max(item.lstat().st_mtime for item in [path, *path.rglob("*")])
    except FileNotFoundError:  # its owner is at work, and removing it
        return False
    return time.time() - newest > _IDLE_S


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        identity = boot + str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        identity = platform.node()
    return xxhash.xxh3_128_hexdigest(identity.encode())[:8]


def _is_zombie(process: int) -> bool:
    """Return whether a process has ended, and its parent has not asked for its exit code yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2][1] == "Z"
    except (OSError, IndexError):
        return False
