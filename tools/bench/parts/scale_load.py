"""How long N workers take to hold a verifier's weights, and how much host memory of their own they take for it.

`python -m draftcache.tools.bench.parts.scale_load MODEL DEVICE WAY` is one of them: it loads the weights by `WAY`,
`load_verifier`'s or through host memory as it was done before, and prints what it saw as one JSON line.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from draftcache.store.common.errors import WorkerError

WAYS = ("as-it-is", "through-host")
_LOOK_S = 0.01


def load_metrics(model: Path, devices: list[str], weights_bytes: int, way: str = WAYS[0]) -> dict[str, float]:
    """Start a process per device, let each load the weights, and return the case's metrics.

    `seconds` pass from the start of the processes to the moment when all of them hold the weights, `load_s` in the
    slowest one's loading alone. `gb_s` are the weights of all of them over `load_s`. `host_gb` is the most private host
    memory (RssAnon) that one of them had while it loaded, beyond what it had before.
    """
    command = [sys.executable, "-m", __spec__.name, str(model)]
    started = time.time()
    workers = [subprocess.Popen([*command, device, way], stdout=subprocess.PIPE, text=True) for device in devices]
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise WorkerError(f"expected {len(devices)} processes to load {model}, found one that failed; see above")
    found: list[dict[str, float]] = [json.loads(output.splitlines()[-1]) for output in outputs]
    slowest = max(item["load_s"] for item in found)
    return {
        "seconds": max(item["loaded"] for item in found) - started,
        "load_s": slowest,
        "gb_s": len(devices) * weights_bytes / slowest / 1e9,
        "host_gb": max(item["host_bytes"] for item in found) / 1e9,
    }


def private_bytes() -> int:
    """Return this process's private host memory, which no other process shares: RssAnon."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"^RssAnon:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None, "Linux has it since 4.5"
    return 1024 * int(found[1])


class PrivateMemory:
    """The most private memory of this process while the context is open: `most`, and `before` it."""

    def __enter__(self) -> PrivateMemory:
        self.before = self.most = private_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self.most = max(self.most, private_bytes())

    def _look(self) -> None:
        while not self._ended.wait(_LOOK_S):
            self.most = max(self.most, private_bytes())


def main() -> None:
    """Load once and say how it went."""
    import torch

    from draftcache.capture.verifier import load

    path, device, way = Path(sys.argv[1]), torch.device(sys.argv[2]), sys.argv[3]
    if device.type == "cuda":
        torch.zeros(1, device=device)  # what a CUDA context takes is no part of loading
    arguments: dict[str, Any] = {"device": device, "dtype": load.choose_dtype("auto", device)}
    with PrivateMemory() as memory:
        began = time.time()
        with patch.object(load, "can_stream", return_value=False) if way == "through-host" else nullcontext():
            load.load_verifier(path, trust_remote_code=False, **arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        loaded = time.time()
    host = memory.most - memory.before
    print(json.dumps({"load_s": loaded - began, "loaded": loaded, "host_bytes": host}), flush=True)


if __name__ == "__main__":
    main()
