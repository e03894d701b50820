"""How a command or a worker process ends when an error reaches it: an exit code and one line, or the trace on request.

0    done
1    done, with rows quarantined or damage found
2    refused: something that was handed in is wrong or does not fit
3    failed: the disk is full, a device or process was lost, or draftcache has a bug
130  interrupted by SIGINT, 143 by SIGTERM
141  nobody reads the output any more, as after `| head`
"""

from __future__ import annotations

import errno
import os
import traceback

from draftcache.store.common.errors import DraftcacheError
from draftcache.store.common.stopping import Stopped

REFUSED = 2
FAILED = 3
INTERRUPTED = 130
NOBODY_READS = 141

DEBUG_VARIABLE = "DRAFTCACHE_DEBUG"
"""Environment variable that asks for traces. `--debug` sets it, so that worker processes inherit it."""

_WRONG_PATHS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
WRONG_PATH_NUMBERS = (errno.ELOOP, errno.ENAMETOOLONG)
"""Numbers of OSErrors that no mended cause and no second try changes: the path that was handed in is none."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a process that this error ends."""
    if isinstance(error, DraftcacheError | Stopped):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return NOBODY_READS
    wrong_path = isinstance(error, OSError) and error.errno in WRONG_PATH_NUMBERS
    return REFUSED if wrong_path or isinstance(error, _WRONG_PATHS) else FAILED


def describe_failure(error: BaseException) -> str:
    """Return one line that says what ended the process, and what to do; with DRAFTCACHE_DEBUG set, the trace before it.

    Libraries' errors are told apart by the module of their class, because nothing is imported here for their sake.
    """
    line = " ".join(_describe(error).split())
    return f"{''.join(traceback.format_exception(error))}{line}" if os.environ.get(DEBUG_VARIABLE) else line


def _describe(error: BaseException) -> str:
    if isinstance(error, DraftcacheError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        remedy = "; free some space and run the same command again" if error.errno in _FULL else ""
        return f"{where}{error.strerror or error}{remedy}"
    if isinstance(error, MemoryError):
        return f"out of memory ({error or 'MemoryError'}); use smaller batches or fewer workers"
    library, text = type(error).__module__.partition(".")[0], str(error)
    if library == "wandb":
        return f"wandb: {text}; log in with `wandb login`, or use --track wandb-offline, tensorboard or off"
    if library in ("safetensors_rust", "safetensors"):
        return f"safetensors: {text}; a file is damaged or could not be written"
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of GPU memory: {text}; use smaller batches (`draftcache size --train` estimates them)"
    if "CUDA error" in text or type(error).__name__ == "AcceleratorError":
        return f"the GPU failed: {text}; what was committed stays, run the same command again"
    return f"internal error, {type(error).__name__}: {text} (run with --debug for the trace, and please report it)"
