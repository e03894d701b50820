"""Answers of an OpenAI-compatible server, with a bounded number of requests at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from draftcache.capture.generate.config import GenerateConfig
from draftcache.capture.generate.http_client import ClientLoop, HttpClient, RefusedError
from draftcache.capture.generate.prompts import PromptReader
from draftcache.capture.generate.responses import BadResponseError, ResponseReader
from draftcache.capture.generate.samples import Outcome, Prompt, Sample
from draftcache.capture.prepare.chat.tokenizer_files import TokenizerFiles
from draftcache.capture.prepare.rows.rejections import RowRejectedError, clip
from draftcache.store.common.errors import InputError

_PROBE = "Hello"


class ServerEngine(ClientLoop):
    """Asks a server for every sample. Implements `samples.Engine`."""

    def __init__(self, config: GenerateConfig, reader: PromptReader, files: TokenizerFiles) -> None:
        assert config.server is not None
        self._config = config
        self._reader = reader
        self._files = files
        self._path = "/chat/completions" if config.chat else "/completions"
        self._more = True  # whether the server takes what OpenAI's own API does not know
        self.model = config.model or ""
        self.context_tokens: int | None = None
        client = HttpClient(
            config.server,
            connections=config.concurrency,
            retries=config.retries,
            timeout_seconds=config.timeout_seconds,
        )
        super().__init__(client)

    @property
    def retried(self) -> int:
        """Requests that were sent again so far."""
        return self._client.retried

    def outcomes(self, samples: Iterator[Sample], finished: Callable[[Sample], bool]) -> Iterator[Outcome]:
        """Yield outcomes as they come. At most `concurrency` samples have been read and not yielded."""
        waiting = (sample for sample in samples if not finished(sample))
        pending: set[asyncio.Task[Outcome]] = set()
        try:
            while True:
                while len(pending) < self._config.concurrency and (sample := next(waiting, None)) is not None:
                    pending.add(self._runner.get_loop().create_task(self._outcome(sample)))
                if not pending:
                    return
                done, pending = self._runner.run(_first(pending))
                for task in sorted(done, key=lambda task: task.exception() is not None):  # none that is there is lost
                    yield task.result()
        finally:
            for task in pending:
                task.cancel()
            self._runner.run(_ended(pending))

    async def _begin(self) -> None:
        """Find the model and try one request. Raises InputError where the server does not serve what is asked for."""
        await super()._begin()
        served = await self._client.ask("GET", "/models", None, _models)
        names = [str(item.get("id")) for item in served]
        if self._config.model is None and len(served) != 1:
            raise InputError(f"--model: expected the name of one of the server's models {names}, found none")
        self.model = self._config.model or names[0]
        if self.model not in names:
            raise InputError(f"--model {self.model}: expected one of the server's models, found {names}")
        length = served[names.index(self.model)].get("max_model_len")
        self.context_tokens = length if isinstance(length, int) else None
        self._responses = ResponseReader(self._reader, self._files, self.model)
        await self._try()

    async def _try(self) -> None:
        """Ask for one token: what fails here would fail for every prompt."""
        messages = [{"role": "user", "content": _PROBE}]
        prompt = Prompt(
            token_ids=self._reader.encode(_PROBE), text=_PROBE, messages=messages, tools=None,
            file="", line=0, row_id=None, turn=0,
        )  # fmt: skip
        for more in (True, False):
            self._more = more
            try:
                payload = {**self._payload(prompt, seed=0), "max_tokens": 1}
                await self._client.ask("POST", self._path, payload, self._responses.require_known)
                return
            except RefusedError as exc:
                if not more or self._config.top_k:
                    raise InputError(
                        f"{self._client.url}{self._path}: expected an answer to {_PROBE!r}, found {exc.found}"
                        + ("" if self._config.chat else "; a server that takes no token ids may do with --chat")
                    ) from exc

    async def _outcome(self, sample: Sample) -> Outcome:
        try:
            if self._config.chat and sample.prompt.messages is None:
                raise RowRejectedError(
                    "no-messages", expected="a row of messages, as --chat sends them", found="a row of token ids"
                )
            payload = self._payload(sample.prompt, sample.seed)
            read = partial(self._responses.answer, sample.prompt)
            return sample, await self._client.ask("POST", self._path, payload, read)
        except RowRejectedError as exc:
            return sample, exc

    def _payload(self, prompt: Prompt, seed: int) -> dict[str, Any]:
        """The body of a request. Everything that a server might have defaults of its own for is said."""
        config = self._config
        sampling = config.sampling
        payload: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling["max_new_tokens"],
            "temperature": sampling["temperature"],
            "top_p": sampling["top_p"],
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n": 1,
            "stream": False,
        }
        if sampling["temperature"] > 0:
            payload["seed"] = seed
        if config.chat:
            payload["messages"] = prompt.messages
            if prompt.tools is not None:
                payload["tools"] = prompt.tools
        else:
            payload["prompt"] = prompt.token_ids
        if self._more:
            payload |= {
                "return_token_ids": True,
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
                "top_k": sampling["top_k"] or -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
            }
            if config.chat and config.rendering.template_args:
                payload["chat_template_kwargs"] = config.rendering.template_args
        return payload


def _models(body: Any) -> list[dict[str, Any]]:
    found = body.get("data") if isinstance(body, dict) else None
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise BadResponseError(f"expected a list of models, found {clip(body)}")
    return found


async def _first(tasks: set[asyncio.Task[Outcome]]) -> tuple[set[asyncio.Task[Outcome]], set[asyncio.Task[Outcome]]]:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _ended(tasks: set[asyncio.Task[Outcome]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
