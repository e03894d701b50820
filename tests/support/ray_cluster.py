"""A Ray cluster of this machine, for tests."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from support.processes import ONE_THREAD

DEADLINE_S = 240
RAY_ENVIRONMENT = ONE_THREAD | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@contextlib.contextmanager
def ray_cluster() -> Iterator[str]:
    """A Ray cluster of this machine in a process of its own, which takes it along when it ends; its address."""
    code = (
        "import logging, ray, sys\n"
        "context = ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=100_000_000,\n"
        "                   logging_level=logging.ERROR, _temp_dir=sys.argv[1])\n"
        "print(context.address_info['gcs_address'], flush=True)\n"
        "sys.stdin.read()\n"
        "ray.shutdown()\n"
    )
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as place,  # short: it holds sockets
        subprocess.Popen(
            [sys.executable, "-c", code, place],
            env=RAY_ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(DEADLINE_S)
