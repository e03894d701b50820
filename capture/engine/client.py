"""Asks a running vLLM for the states of conversations, many at a time, and reads the files that it names.

A conversation is a completion request: its token ids are the prompt, and one token is generated, of which the log
probabilities are kept (`likely`). The answer names a file (`extracted`). Requests are sent ahead, in the order in which
their states will be needed. At most `requests` of them are in flight or have a file that nobody has read yet, so that
the files never fill the folder.

The event loop runs only while states are waited for. In between, while the caller works on the states before, the
server computes what it was asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.capture.engine.extracted import MissingStatesError, discard, take_states
from draftcache.capture.generate.http_client import ClientLoop, HttpClient
from draftcache.capture.generate.responses import BadResponseError
from draftcache.capture.peers.recorded import tokens_key
from draftcache.capture.peers.samples import PeerSample
from draftcache.capture.prepare.rows.rejections import RowRejectedError, clip
from draftcache.store.common.errors import DraftcacheError, GateError, InputError, ServerError

FLAG = "--engine"
LIKELY = 5
"""Token ids of which the engine says the log probability, behind each conversation's last token."""
_TOKEN = "token_id:"


@dataclass(frozen=True)
class Answer:
    """What the engine answers to a conversation."""

    path: Path
    """The file of its states."""
    likely: dict[int, float]
    """Log probabilities of the likeliest ids behind its last token, by the engine's own head."""


@dataclass(frozen=True)
class Extracted:
    """The states of a conversation, in memory, and what the engine says of the token behind it."""

    sample: PeerSample
    likely: dict[int, float]


class StatesClient(ClientLoop):
    """One vLLM that extracts hidden states. Use as a context manager.

    Raises ServerError where it can't be reached, and InputError where it is no vLLM, or serves several models.
    """

    name = "vllm"

    def __init__(self, url: str, *, serve: str, requests: int, retries: int, timeout_seconds: float) -> None:
        """`serve` is the command that starts the server as it is needed; errors show it."""
        self.url = url
        self.serve = serve
        self.version = self.model = self.served = ""
        """Of the engine: its version, the model's name in requests, and what it was started with."""
        self._slots = asyncio.Semaphore(requests)
        self._ahead: dict[str, asyncio.Task[Answer]] = {}
        self._written: NDArray[np.int64] | None = None
        """A conversation of which there was a file."""
        client = HttpClient(
            url,
            connections=requests + 1,
            retries=retries,
            timeout_seconds=timeout_seconds,
            flag=FLAG,
            remedy=f"what was committed stays: start the server with: {serve}; then run the same command again",
        )
        super().__init__(client)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._drop_ahead()
        finally:
            super().__exit__(kind, value, trace)

    async def _begin(self) -> None:
        """Find out what the server is."""
        await super()._begin()
        try:
            self.version = await self._client.ask("GET", "/version", None, lambda body: str(body["version"]))
            served = await self._client.ask("GET", "/v1/models", None, lambda body: list(body["data"]))
            names = [str(item["id"]) for item in served]
        except ServerError:
            raise
        except (DraftcacheError, KeyError, TypeError) as exc:
            raise InputError(
                f"{FLAG} {self.url}: expected a vLLM, which answers at /version and /v1/models, found another server "
                f"({exc}); start it with: {self.serve}"
            ) from exc
        if len(names) != 1:
            raise InputError(f"{FLAG} {self.url}: expected a server of one model, found {names}")
        self.model, self.served = names[0], str(served[0].get("root") or names[0])

    def read_ahead(self, conversations: Sequence[NDArray[np.int64]]) -> None:
        """Take the conversations [L] that will be asked for next, in their order, in the place of those named before.

        Requests for them are sent as soon as the first of them is asked for.
        """
        self._drop_ahead()
        for token_ids in conversations:
            if (key := tokens_key(token_ids)) not in self._ahead:
                self._ahead[key] = self._runner.get_loop().create_task(self._ask_ahead(token_ids))

    def states_of(self, token_ids: NDArray[np.int64]) -> Extracted:
        """The states of token ids [L].

        Raises GateError where the server refuses these ids or gives states of others, MissingStatesError, which is one
        too, where it gives no whole states, ServerError where it fails every time, and InputError where it extracts
        no states.
        """
        sent = self._ahead.pop(tokens_key(token_ids), None)
        try:
            if sent is None:
                return self._received(self._ask(token_ids), token_ids)
            try:
                return self._received(_result(sent), token_ids)
            finally:
                self._free_slot_of(sent)
        except MissingStatesError:  # as of a server that was killed and is back
            pass
        try:
            return self._received(self._ask(token_ids), token_ids)
        except MissingStatesError:
            self._require_writing()
            raise

    def _require_writing(self) -> None:
        """Raise ServerError unless the server still writes a file that it has written before."""
        if self._written is None:
            return
        try:
            self._received(self._ask(self._written), self._written)
        except MissingStatesError as exc:
            raise ServerError(
                f"{self.url}: expected files of states, found none, of a conversation either that it had written one "
                f"of before: {exc}. Is its folder full? What was committed stays: then run the same command again"
            ) from exc

    def _received(self, answer: Coroutine[Any, Any, Answer], token_ids: NDArray[np.int64]) -> Extracted:
        try:
            found = self._runner.run(answer)
        except RowRejectedError as exc:
            raise GateError(
                f"expected states of {len(token_ids):,} tokens from {self.url}, found that it refuses them: {exc.found}"
            ) from exc
        sample = take_states(found.path, token_ids)
        self._written = token_ids if self._written is None else self._written
        return Extracted(sample, found.likely)

    async def _ask(self, token_ids: NDArray[np.int64]) -> Answer:
        payload = {
            "model": self.model, "prompt": token_ids.tolist(), "max_tokens": 1, "temperature": 0.0, "logprobs": LIKELY,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        return await self._client.ask("POST", "/v1/completions", payload, self._answer_in)

    async def _ask_ahead(self, token_ids: NDArray[np.int64]) -> Answer:
        """The answer, once a slot is free. The slot is kept until the file was read, or the request has failed.

        What is waited for right now takes no slot: all of them may be kept by what will be read after it.
        """
        await self._slots.acquire()
        try:
            return await self._ask(token_ids)
        except BaseException:
            self._slots.release()
            raise

    def _free_slot_of(self, sent: asyncio.Task[Answer]) -> None:
        """Free the slot of an answer that was taken; a failed request has freed its own."""
        if sent.done() and not sent.cancelled() and sent.exception() is None:
            self._slots.release()

    def _answer_in(self, body: Any) -> Answer:
        try:
            (choice,) = body["choices"]
            named = (body.get("kv_transfer_params") or {}).get("hidden_states_path")
            (top,) = choice["logprobs"]["top_logprobs"]
            likely = {int(name.removeprefix(_TOKEN)): float(value) for name, value in top.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise BadResponseError(f"expected a completion of one token with logprobs, found {clip(body)}") from exc
        if not isinstance(named, str):
            raise InputError(
                f"{FLAG} {self.url}: expected an answer that names a file of hidden states, found none: this server "
                f"does not extract them. Start it with: {self.serve}"
            )
        return Answer(Path(named), likely)

    def _drop_ahead(self) -> None:
        """Forget conversations that were named and not asked for, and delete their files."""
        dropped, self._ahead = list(self._ahead.values()), {}
        if not dropped:
            return
        for task in dropped:
            if task.done() and not task.cancelled() and task.exception() is None:
                with suppress(OSError):
                    discard(task.result().path)
            self._free_slot_of(task)
            task.cancel()
        self._runner.run(_ended(dropped))


async def _result(sent: asyncio.Task[Answer]) -> Answer:
    return await sent


async def _ended(tasks: Sequence[asyncio.Task[Answer]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
