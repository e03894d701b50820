"""An S3 server on loopback, and a proxy in front of it that fails on plan.

The server is moto's, which speaks the S3 protocol over real sockets and keeps objects in memory. The proxy passes
requests on and logs them; asked to, it answers 503, drops connections, cuts bodies short, stalls, or loses answers.
"""

from __future__ import annotations

import http.client
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import boto3  # type: ignore[import-untyped]
from moto.backends import get_backend
from moto.core import DEFAULT_ACCOUNT_ID  # type: ignore[attr-defined]
from moto.server import ThreadedMotoServer

BUCKET = "states"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclass(kw_only=True)
class Request:
    """One request as the proxy saw it; times are of time.monotonic, the fault is filled in when one is injected."""

    method: str
    path: str
    query: str
    range: str | None
    conditional: bool
    started: float
    ended: float = 0.0
    sent: int = 0
    """Bytes of the body that the client was sent."""
    fault: str | None = None

    @property
    def signature(self) -> str:
        """What the client asked for, without what differs from run to run (prefixes, attempt names, upload ids)."""
        path = re.sub(r"-[0-9a-f]{8}(?=/|$)|[0-9a-f]{32}", "", self.path)
        query = parse_qs(self.query, keep_blank_values=True)
        return f"{self.method} {path} {sorted(set(query) - {'uploadId'})} {query.get('partNumber')} {self.range}"


def rounds(log: Iterable[Request]) -> int:
    """Count the requests of the longest chain in which each began after the one before had ended.

    So many times a client waited for an answer, however many requests were under way meanwhile.
    """
    count, last = 0, -1.0
    for request in sorted(log, key=lambda request: request.ended):
        if request.started >= last:
            count, last = count + 1, request.ended
    return count


Plan = Callable[[Request], str | None]
"""Which fault a request meets: one of KINDS or of LIES, "deny", "unlisted", or None."""

KINDS = ("error", "drop", "lose", "truncate", "stall", "slow")
LIES = ("absent", "short", "stale", "shortlist")
"""Whole answers that are not true: no such object, half of it, another content, half of a list."""


class FlakyProxy(ThreadingHTTPServer):
    """A reverse proxy on 127.0.0.1; `plan` says what goes wrong, `log` what was asked."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream: tuple[str, int], *, stall: float = 1.5, slow: float = 0.05) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.stall, self.slow = upstream, stall, slow
        self.plan: Plan = lambda request: None
        self.log: list[Request] = []
        self.former: dict[str, bytes] = {}
        """What a stale answer holds, by the object's path; the object's bytes inverted where it is not given here."""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def faults(self) -> Counter[str]:
        """Count the injected faults of each kind."""
        return Counter(request.fault for request in self.log if request.fault)

    def __enter__(self) -> FlakyProxy:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do nothing: clients that were stalled hang up, as they should."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FlakyProxy
    _request: Request

    def _serve(self) -> None:
        split = urlsplit(self.path)
        request = Request(
            method=self.command,
            path=split.path,
            query=split.query,
            range=self.headers.get("Range"),
            conditional="If-None-Match" in self.headers,
            started=time.monotonic(),
        )
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request.fault = self.server.plan(request)
        self.server.log.append(request)
        self._request = request
        try:
            self._answer(request, body)
        finally:
            request.ended = time.monotonic()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815

    def _answer(self, request: Request, body: bytes) -> None:
        if request.fault == "error":
            self._send(503, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        if request.fault == "deny":
            self._send(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
            return
        if request.fault == "drop":
            self.close_connection = True
            return
        if request.fault == "absent":
            self._send(404, {"Content-Type": "application/xml"}, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        status, headers, answer = self._forward(body)
        if status in (200, 206):
            headers, answer = self._lie(request, headers, answer)
        if request.fault == "lose":  # it was done, but the client does not learn of it
            self.close_connection = True
            return
        if request.fault == "unlisted":  # a whole answer of an empty list
            answer = re.sub(rb"<Contents>.*</Contents>", b"", answer, flags=re.DOTALL)
        if request.fault in ("stall", "slow"):
            time.sleep(self.server.stall if request.fault == "stall" else self.server.slow)
        self._send(status, headers, answer, cut=request.fault == "truncate")

    def _lie(self, request: Request, headers: dict[str, str], answer: bytes) -> tuple[dict[str, str], bytes]:
        """Return an answer that is whole but not true, where that is the request's fault."""
        if request.fault == "stale":
            former = self.server.former.get(request.path)
            return headers, bytes(255 - byte for byte in answer) if former is None else former
        if request.fault == "short":
            sizes = {name: str(int(value) // 2) for name, value in headers.items() if name.lower() == "content-length"}
            return headers | sizes, answer[: len(answer) // 2]
        if request.fault == "shortlist":
            parts = re.findall(rb"<Contents>.*?</Contents>", answer, flags=re.DOTALL)
            for part in parts[len(parts) // 2 :]:
                answer = answer.replace(part, b"")
        return headers, answer

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.server.upstream, timeout=30)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            connection.request(self.command, self.path, body=body, headers=headers)
            response = connection.getresponse()
            answer = response.read()
            return response.status, dict(response.getheaders()), answer
        finally:
            connection.close()

    def _send(self, status: int, headers: dict[str, str], answer: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        lengths = [value for name, value in headers.items() if name.lower() == "content-length"]
        for name, value in headers.items():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", lengths[0] if self.command == "HEAD" and lengths else str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            body = answer[: len(answer) // 2] if cut else answer
            self.wfile.write(body)
            self._request.sent = len(body)
        if cut:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Do nothing: the proxy keeps its own log."""


class S3Server:
    """moto's S3 server with one bucket, and a client to look behind the code under test."""

    quiet: ClassVar[tuple[str, ...]] = ("werkzeug", "botocore", "boto3")

    def __init__(self) -> None:
        for name in self.quiet:
            logging.getLogger(name).setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.address = self._server.get_host_and_port()
        self.url = f"http://{self.address[0]}:{self.address[1]}"
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            region_name=CREDENTIALS["AWS_REGION"],
        )
        self.client.create_bucket(Bucket=BUCKET)

    def open_uploads(self) -> list[str]:
        """List the keys of the multipart uploads that were neither completed nor aborted."""
        return [item["Key"] for item in self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]

    def fill(self, keys: Iterable[str]) -> None:
        """Make many empty objects, past the protocol: 1,000 requests would take seconds."""
        backend = get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"]
        for key in keys:
            backend.put_object(BUCKET, key, b"")

    def load(self, directory: Path, prefix: str) -> int:
        """Put the files of a local directory under a prefix, past the protocol. Returns their bytes."""
        backend, total = get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"], 0
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(directory).as_posix()
            if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
                backend.put_object(BUCKET, f"{prefix}/{name}", path.read_bytes())
                total += path.stat().st_size
        return total

    def keys(self, prefix: str) -> list[str]:
        """List the keys that begin with `prefix`, up to 1,000 of them."""
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for item in found.get("Contents", [])]

    def stop(self) -> None:
        """Close the client's connections and the server."""
        self.client.close()
        self._server.stop()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start a server, and stop it in the end."""
    server = S3Server()
    try:
        yield server
    finally:
        server.stop()
