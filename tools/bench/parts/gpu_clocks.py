"""Clocks and power of NVIDIA GPUs while a benchmark runs, by nvidia-smi.

A GPU at its power cap lowers its clock, by an amount that differs from card to card and with a host's cooling. Rates of
several GPUs are compared fairly only beside the clocks at which they ran.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType

_COMMAND = ("nvidia-smi", "--query-gpu=index,clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "500")


class GpuClocks:
    """Reads the SM clock and the power of all GPUs twice per second, as a context, until it is left."""

    def __enter__(self) -> GpuClocks:
        """Start reading. Raises FileNotFoundError where there is no nvidia-smi."""
        self._samples: list[tuple[float, int, float, float]] = []
        self._process = subprocess.Popen(_COMMAND, stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._thread.join()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with suppress(ValueError):  # a GPU that reports no power says [N/A]
                    index, clock, power = (float(word) for word in line.split(","))
                    self._samples.append((time.time(), int(index), clock, power))

    def means(self, first: float, last: float, gpus: Iterable[int]) -> dict[str, float]:
        """Mean SM clock (MHz) and power (W) of these GPUs between two times of `time.time`; empty without a sample."""
        wanted = set(gpus)
        found = [sample for sample in self._samples if first <= sample[0] <= last and sample[1] in wanted]
        if not found:
            return {}
        return {
            "sm_clock_mhz": sum(sample[2] for sample in found) / len(found),
            "power_w": sum(sample[3] for sample in found) / len(found),
        }
