"""Child processes that don't outlive the process that started them."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def end_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    """Return a `preexec_fn` for Popen: the child gets signal `number` when the thread that starts it ends.

    So it does when this process is killed by SIGKILL. Returns None on systems that have no such call.
    """
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)  # loaded before the fork, after which as little as possible may be done

    def ask() -> None:
        library.prctl(_PR_SET_PDEATHSIG, int(number))

    return ask
