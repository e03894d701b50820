"""A connection to an existing Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from draftcache.store.common.errors import InputError

_CONNECT_S = 10.0
"""Seconds that a cluster has to answer."""


@contextmanager
def connected_ray() -> Iterator[Any]:
    """The ray module, connected to the cluster; a connection made here is closed at the end. Raises InputError."""
    try:
        import ray
    except ImportError as exc:
        raise InputError("--launcher ray: expected Ray, found none; install draftcache[ray]") from exc
    connected = ray.is_initialized()
    if not connected:
        address = os.environ.get("RAY_ADDRESS") or "auto"
        try:
            _require_listener(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (OSError, ValueError, RuntimeError) as exc:
            raise InputError(
                f"--launcher ray: expected a running cluster at {address}, could not connect ({exc.__cause__ or exc}); "
                "start one with `ray start --head`, or set RAY_ADDRESS"
            ) from exc
    try:
        yield ray
    finally:
        if not connected:
            ray.shutdown()


def _require_listener(address: str) -> None:
    """Raise OSError where nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
