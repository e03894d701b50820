"""A running vLLM or SGLang: its greedy answers, and the verify steps of each, as its own HTTP interface tells them.

vLLM counts verify steps over all requests, at `/metrics`. They belong to one answer only if nothing else is answered
meanwhile: the count of generated tokens tells, and an answer whose count does not fit is refused. SGLang tells the
verify steps of each answer with it (`meta_info` of `/generate`, by the sources of 0.5.12 to 0.5.23): their number, what
they drafted, and in how many of them 0, 1, 2, .. draft tokens were accepted.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from draftcache.capture.generate.http_client import ClientLoop, HttpClient
from draftcache.capture.generate.responses import BadResponseError
from draftcache.capture.prepare.rows.rejections import RowRejectedError, clip
from draftcache.store.common.errors import InputError

FLAG = "--engine"
COUNTED_SECONDS = 10.0
"""How long an engine may take to count an answer that it has given."""
_PAUSE_SECONDS = 0.02
_VLLM = "vllm:"
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)", re.MULTILINE)
_POSITION = re.compile(r'(?:^|,)position="(\d+)"')


@dataclass(frozen=True)
class Answer:
    """A greedy answer and what it took."""

    token_ids: list[int]
    verify_steps: int
    drafted: int | None
    """Draft tokens of all verify steps; None where the engine does not tell."""
    accepted: dict[int, int]
    """Accepted draft tokens by their position in a verify step, from 0; empty where the engine does not tell."""


class RunningEngine(ClientLoop):
    """One server, asked for one answer at a time. Use as a context manager.

    Raises ServerError where it can't be reached, and InputError where it is neither vLLM nor SGLang, serves several
    models, does not decode speculatively, or gives answers to others meanwhile.
    """

    def __init__(self, url: str, *, timeout_seconds: float = 600.0) -> None:
        """`url` is that of the OpenAI-compatible API, such as http://host:8000/v1, or of the server itself."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self.name = self.version = self.model = ""
        """Of the engine; all are known inside the context."""
        client = HttpClient(
            self.url,
            connections=1,
            retries=0,  # an answer that is asked for twice is counted twice
            timeout_seconds=timeout_seconds,
            flag=FLAG,
            remedy="run the command again once the server is back",
        )
        super().__init__(client)

    def answer(self, prompt: list[int], max_tokens: int) -> Answer:
        """Return the greedy answer to these token ids, of `max_tokens`: the end of a turn does not end it."""
        ask = self._of_vllm if self.name == "vllm" else self._of_sglang
        try:
            return self._runner.run(ask(prompt, max_tokens))
        except RowRejectedError as exc:
            raise InputError(
                f"{FLAG} {self.url}: expected an answer to a prompt of {len(prompt):,} tokens and "
                f"{max_tokens:,} more, found {exc.found}"
            ) from exc

    async def _begin(self) -> None:
        """Find out what the server is."""
        await super()._begin()
        counters = await self._counters(required=False)
        self.name = "vllm" if any(name.startswith(_VLLM) for name in counters) else "sglang"
        try:
            path = "/version" if self.name == "vllm" else "/server_info"
            told = await self._client.ask("GET", path, None, _object)
            served = await self._client.ask("GET", "/v1/models", None, lambda body: body["data"])
        except (InputError, RowRejectedError, KeyError, TypeError) as exc:
            raise InputError(
                f"{FLAG} {self.url}: expected vLLM, whose /metrics has counters named vllm:..., or SGLang, which "
                f"answers at /server_info; found neither ({exc})"
            ) from exc
        names = [str(item.get("id")) for item in served]
        if self.name == "vllm" and len(names) != 1:
            raise InputError(f"{FLAG} {self.url}: expected a server of one model, found {names}")
        self.version, self.model = str(told.get("version", "unknown")), names[0] if names else "unknown"

    async def _of_vllm(self, prompt: list[int], max_tokens: int) -> Answer:
        before = await self._counters()
        payload = {
            "model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0,
            "ignore_eos": True, "return_token_ids": True, "skip_special_tokens": False,
        }  # fmt: skip
        ids = await self._client.ask("POST", "/v1/completions", payload, _ids_of_vllm)
        after = await self._counted(before, len(ids))
        gained = {name: after[name] - before.get(name, 0) for name in after}
        positions = {}
        for name, value in gained.items():
            if name.startswith(f"{_VLLM}spec_decode_num_accepted_tokens_per_pos_total#"):
                positions[int(name.partition("#")[2])] = value
        return Answer(
            token_ids=ids,
            verify_steps=gained[f"{_VLLM}spec_decode_num_drafts_total"],
            drafted=gained[f"{_VLLM}spec_decode_num_draft_tokens_total"],
            accepted=positions,
        )

    async def _counted(self, before: Mapping[str, int], tokens: int) -> dict[str, int]:
        """Return the counters as soon as they hold an answer of this many tokens."""
        name, deadline = f"{_VLLM}generation_tokens_total", time.monotonic() + COUNTED_SECONDS
        while True:
            after = await self._counters()
            gained = after[name] - before[name]
            if gained == tokens:
                return after
            if gained > tokens or time.monotonic() > deadline:
                raise InputError(
                    f"{FLAG} {self.url}: expected {tokens:,} more tokens in its counters after an answer of as many, "
                    f"found {gained:,}; its counters can be read only while nobody else asks it"
                )
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _counters(self, *, required: bool = True) -> dict[str, int]:
        """Return the counters of /metrics by name, those by position as NAME#POSITION, each summed over its labels."""
        try:
            found = await self._client.ask("GET", "/metrics", None, parse_counters, parse=bytes.decode)
        except InputError:
            if required:
                raise
            return {}
        needed = ("generation_tokens_total", "spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total")
        missing = [name for name in needed if _VLLM + name not in found]
        if missing and any(name.startswith(_VLLM) for name in found):
            raise InputError(
                f"{FLAG} {self.url}: expected counters of speculative decoding at /metrics, found none named "
                f"{_VLLM}{missing[0]}; start it with --speculative-config, and without --disable-log-stats"
            )
        return found

    async def _of_sglang(self, prompt: list[int], max_tokens: int) -> Answer:
        sampling = {"temperature": 0.0, "max_new_tokens": max_tokens, "ignore_eos": True}
        payload = {"input_ids": prompt, "sampling_params": sampling, "stream": False}
        ids, told = await self._client.ask("POST", "/generate", payload, _ids_of_sglang)
        if "spec_verify_ct" not in told and len(ids) > 1:  # an answer that the prefill gives has no verify step to tell
            raise InputError(
                f"{FLAG} {self.url}: expected spec_verify_ct in the answer's meta_info, found {sorted(told)}; start "
                "SGLang with --speculative-algorithm"
            )
        steps = int(told.get("spec_verify_ct", 0))
        drafted = told.get("spec_num_proposed_drafts", None if steps else 0)
        by_count = [int(number) for number in told.get("spec_correct_drafts_histogram", [])]
        return Answer(
            token_ids=ids,
            verify_steps=steps,
            drafted=None if drafted is None else int(drafted),
            accepted={place: sum(by_count[place + 1 :]) for place in range(len(by_count) - 1)},
        )


def parse_counters(text: str) -> dict[str, int]:
    """Return the counters of a page of Prometheus' text format, by name as `RunningEngine` needs them.

    Counters are the samples whose names end in `_total`. Values of one name are summed over their labels, but for the
    label `position`.
    """
    found: defaultdict[str, int] = defaultdict(int)
    for name, labels, value in _SAMPLE.findall(text):
        if name.endswith("_total"):
            position = _POSITION.search(labels)
            found[name if position is None else f"{name}#{position[1]}"] += int(float(value))
    return dict(found)


def _object(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise BadResponseError(f"expected an object, found {clip(body)}")
    return body


def _ids_of_vllm(body: Any) -> list[int]:
    try:
        return [int(number) for number in body["choices"][0]["token_ids"]]
    except (KeyError, IndexError, TypeError, ValueError) as exc:
        raise BadResponseError(f"expected a choice with token_ids, found {clip(body)}") from exc


def _ids_of_sglang(body: Any) -> tuple[list[int], dict[str, Any]]:
    try:
        return [int(number) for number in body["output_ids"]], dict(body["meta_info"])
    except (KeyError, TypeError, ValueError) as exc:
        raise BadResponseError(f"expected output_ids and meta_info, found {clip(body)}") from exc
