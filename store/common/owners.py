"""Whose temporary file this is, and whether that process is gone: told by the file's name, with no need for locks.

On some filesystems locks do not lock (NFS without a lock service, Lustre with local locks, FUSE), so what a killed
process left is recognised without them. Process numbers mean something only within one boot of one machine, and there
within one namespace (a container); of processes elsewhere nothing is known, and only the age of their files tells.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

import xxhash

OWNER_PATTERN = r"([0-9a-f]{8})-(\d+)"
"""Regular expression of `owner()`, in two groups."""


def owner() -> str:
    """Return a name for this process: its machine and namespace, and its number."""
    return f"{_machine()}-{os.getpid()}"


def is_gone(machine: str, process: int) -> bool:
    """Return whether the process of an owner's name has certainly ended. False where nothing is known of it."""
    if machine != _machine():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return _is_zombie(process)


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
