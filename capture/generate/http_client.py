"""Requests to a server, sent again after growing waits where it fails for a time.

A response that never ends, breaks off or is no JSON counts as a failure of the server, and so do 429 and 5xx. Any other
4xx is the request's own fault, but those by which the server refuses whoever asks.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import random
import ssl
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx2

from draftcache.capture.generate.responses import BadResponseError
from draftcache.capture.prepare.rows.rejections import RowRejectedError, clip
from draftcache.store.common.errors import InputError, ServerError
from draftcache.store.common.strict_json import parse_json

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the server's key. It is sent in requests, and written nowhere."""
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 60.0
_CONNECT_SECONDS = 30.0
_OF_ALL_REQUESTS = {
    401: f"set {KEY_VARIABLE} to the server's key",
    403: f"set {KEY_VARIABLE} to a key that may use the model",
    404: "is the URL right, and does it end with /v1? A server without /completions may do with --chat",
    405: "is the URL right, and does it end with /v1?",
    407: "the proxy of the environment asks for a login; NO_PROXY leaves it out",
}
_Read = TypeVar("_Read")


class RefusedError(RowRejectedError):
    """Raised where the server refuses one request, whose fault it is."""


class _FailedError(Exception):
    """The server failed, and may not the next time."""

    def __init__(self, what: str, wait_seconds: float = 0.0) -> None:
        super().__init__(what)
        self.wait_seconds = wait_seconds


class HttpClient:
    """Asks one server, many requests side by side. Use as an async context manager."""

    def __init__(
        self,
        url: str,
        *,
        connections: int,
        retries: int,
        timeout_seconds: float,
        flag: str = "--server",
        remedy: str = "what was answered is kept: run the same command again once the server is back",
    ) -> None:
        """`timeout_seconds` is for one response, from the request to its last byte. `flag` is the one that gives the
        URL, and `remedy` what to do where the server fails every time; errors name them.
        """
        self.url = url.rstrip("/")
        self._flag, self._remedy = flag, remedy
        self.retried = 0
        """Requests that were sent again."""
        self._retries = retries
        self._timeout = timeout_seconds
        key = os.environ.get(KEY_VARIABLE)
        near = _is_loopback(self.url)
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout_seconds, connect=min(_CONNECT_SECONDS, timeout_seconds), pool=None),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=not near,  # no proxy reaches this machine's own servers
            # Loading the certificates of all authorities takes 0.1 s.
            verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if near and self.url.startswith("http:") else True,
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, value, trace)

    async def ask(
        self,
        method: str,
        path: str,
        payload: Any,
        read: Callable[[Any], _Read],
        parse: Callable[[bytes], Any] = parse_json,
    ) -> _Read:
        """Send a request and return `read(parse(body))`, again and again where the server fails.

        Raises ServerError where it fails every time, RowRejectedError where `read` raises BadResponseError every time,
        RefusedError where the server refuses the request, and InputError where it would refuse any.
        """
        for attempt in range(self._retries + 1):
            if attempt:
                self.retried += 1
            try:
                return read(await self._once(method, path, payload, parse))
            except (_FailedError, BadResponseError) as exc:
                failure: Exception = exc
            if attempt < self._retries:
                least = failure.wait_seconds if isinstance(failure, _FailedError) else 0.0
                await asyncio.sleep(max(least, _wait_seconds(attempt)))
        times = f"{self._retries + 1} times"
        if isinstance(failure, BadResponseError):
            raise RowRejectedError("bad-response", expected="a response of the API", found=f"{times}: {failure}")
        raise ServerError(f"{self.url}{path}: expected an answer, found {failure}, {times}; {self._remedy}")

    async def _once(self, method: str, path: str, payload: Any, parse: Callable[[bytes], Any]) -> Any:
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._client.stream(method, self.url + path, json=payload) as response,
            ):
                data = await _body(response)
        except (TimeoutError, httpx2.TimeoutException) as exc:
            raise _FailedError(f"none in {self._timeout:g} s") from exc
        except httpx2.TransportError as exc:
            raise _FailedError(f"{type(exc).__name__} ({exc})") from exc
        except httpx2.InvalidURL as exc:
            raise InputError(f"{self._flag}: expected a URL such as http://host:8000/v1, found {self.url!r}") from exc
        if response.status_code != 200:
            raise self._refusal(response.status_code, _message(data), response.headers, path)
        try:
            return parse(data)
        except ValueError as exc:
            raise BadResponseError(f"a body that is no {'JSON' if parse is parse_json else 'text'} ({exc})") from exc

    def _refusal(self, status: int, said: str, headers: httpx2.Headers, path: str) -> Exception:
        if status in (408, 425, 429) or status >= 500:
            return _FailedError(f"status {status} ({said})", _retry_after(headers))
        if status in _OF_ALL_REQUESTS or status < 400:
            remedy = _OF_ALL_REQUESTS.get(status, "give the URL that the server itself answers at")
            return InputError(f"{self.url}{path}: expected status 200, found {status} ({said}): {remedy}")
        return RefusedError("refused-by-server", expected="status 200", found=f"status {status}: {said}")


class ClientLoop:
    """A client with an event loop of its own, for code that is not asynchronous. Use as a context manager."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        """Ask what has to be known first. Raises what `_begin` raises."""
        try:
            self._runner.run(self._begin())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._runner.run(self._client.__aexit__(None, None, None))
        finally:
            self._runner.close()

    async def _begin(self) -> None:
        """Open the client. Classes add their first questions."""
        await self._client.__aenter__()


async def _body(response: httpx2.Response) -> bytes:
    """The whole body. Raises BadResponseError where it breaks off, or can't be decoded."""
    try:
        return await response.aread()
    except httpx2.TimeoutException:
        raise
    except (httpx2.TransportError, httpx2.DecodingError) as exc:
        raise BadResponseError(f"a body that breaks off ({exc})") from exc


def _wait_seconds(attempt: int) -> float:
    """Between half and all of a span that doubles: requests that failed together do not come back together."""
    span = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0**attempt)
    return span * random.uniform(0.5, 1.0)


def _retry_after(headers: httpx2.Headers) -> float:
    text = headers.get("retry-after", "")
    return min(float(text), LONGEST_WAIT_SECONDS) if text.isdecimal() else 0.0


def _message(data: bytes) -> str:
    """What an error's body says."""
    try:
        body = parse_json(data)
    except ValueError:
        return clip(data.decode("utf-8", "replace"))
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and key in body:
            body = body[key]
    return clip(body)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
