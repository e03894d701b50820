"""Plans of what goes wrong with the requests to an object store."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter

from draftcache.tools.campaign.object_server import KINDS, Request


class LyingPlan:
    """Tells one lie, the first `times` times that the same thing is asked of an object whose path matches."""

    def __init__(self, kind: str, times: float, *, path: str = "") -> None:
        """`kind` is one of LIES, `path` a regular expression that is searched for in objects' paths."""
        self.kind, self.times, self.path = kind, times, path
        self._told: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> str | None:
        """Decide whether this request is lied to."""
        is_list = "list-type" in request.query
        if is_list != (self.kind == "shortlist") or request.method not in ("GET", "HEAD"):
            return None
        if not is_list and not re.search(self.path, request.path):
            return None
        with self._lock:
            self._told[request.signature] += 1
            return self.kind if self._told[request.signature] <= self.times else None


class SeededPlan:
    """Faults drawn by hashing (seed, what is asked, how often it was asked before): threads do not change the draw.

    The same request never fails more than `most` times, so a client that tries once more than that comes through.
    """

    def __init__(self, seed: int, *, rate: float = 0.4, most: int = 2, kinds: tuple[str, ...] = KINDS) -> None:
        self.seed, self.rate, self.most, self.kinds = seed, rate, most, kinds
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> str | None:
        """Decide the fault for this request."""
        with self._lock:
            count = self._seen[request.signature]
            self._seen[request.signature] += 1
        digest = hashlib.blake2b(f"{self.seed} {count} {request.signature}".encode(), digest_size=16).digest()
        if count >= self.most or int.from_bytes(digest[:8], "big") / 2**64 >= self.rate:
            return None
        return self.kinds[int.from_bytes(digest[8:], "big") % len(self.kinds)]
