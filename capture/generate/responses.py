"""What a server's response says: the ids that the model wrote, or why they can't be known.

Where the server returns ids, they are the truth. Where it returns text alone, prompt and text are tokenised together,
and the answer's ids are taken only if nothing shows that the model wrote others: the prompt's own ids come first, the
ids decode to the text, and there are as many as the server counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from draftcache.capture.generate.prompts import PromptReader
from draftcache.capture.generate.samples import Answer, Prompt
from draftcache.capture.prepare.chat.tokenizer_files import TokenizerFiles
from draftcache.capture.prepare.rows.rejections import RowRejectedError, clip
from draftcache.store.common.errors import ManifestMismatchError

_FINISHED = ("stop", "length", "tool_calls", "function_call")
_REPLACEMENT = "\ufffd"  # what bytes that are no whole character decode to


class BadResponseError(Exception):
    """Raised for a response that is not what the API says: it is asked for again."""


class ResponseReader:
    """Reads the responses of one server that runs one model."""

    def __init__(self, reader: PromptReader, files: TokenizerFiles, model: str) -> None:
        """`model` is the name that was asked for, which every response must bear."""
        self._reader = reader
        self._model = model
        found = {token: reader.tokenizer.token_id(token) for token in files.stop_tokens}
        self._stop_ids = [token_id for token_id in found.values() if token_id is not None]
        self._eos_id = found.get(files.special_tokens.get("eos_token", ""))

    def answer(self, prompt: Prompt, body: Any) -> Answer:
        """Return the answer of a response's parsed body.

        Raises BadResponseError for a body that is no such response, RowRejectedError where the answer's ids can't be
        known, and ManifestMismatchError where another model answers.
        """
        self.require_known(body)
        choices = body.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise BadResponseError(f"expected choices, found {clip(body)}")
        choice = choices[0]
        if (finish := choice.get("finish_reason")) not in _FINISHED:
            raise BadResponseError(f"expected a finish_reason of {', '.join(_FINISHED)}, found {clip(finish)}")
        raw_usage = body.get("usage")
        usage = raw_usage if isinstance(raw_usage, dict) else {}
        self._require_prompt(prompt, choice.get("prompt_token_ids") or body.get("prompt_token_ids"), usage)
        ids = choice.get("token_ids", choice.get("response_token_ids"))  # the latter in SGLang's chat
        if ids is not None:
            return Answer(token_ids=self._given(ids, finish, choice), finish_reason=finish)
        ids = self._retokenised(prompt, _text(choice), finish, choice, usage.get("completion_tokens"))
        return Answer(token_ids=ids, finish_reason=finish, retokenised=True)

    def require_known(self, body: Any) -> None:
        """Raise BadResponseError for what is no JSON object, and ManifestMismatchError where another model answers."""
        if not isinstance(body, dict):
            raise BadResponseError(f"expected a JSON object, found {clip(body)}")
        if body.get("model") not in (None, self._model):
            raise ManifestMismatchError(
                f"--server: expected answers of model {self._model!r}, found one of {body.get('model')!r}; ask for "
                "the model that is served with --model"
            )

    def _require_prompt(self, prompt: Prompt, given: Any, usage: dict[str, Any]) -> None:
        """Raise RowRejectedError where the model was given other ids than the prompt's."""
        ours = prompt.token_ids
        if given is not None and list(given) != ours:
            at = next((i for i, pair in enumerate(zip(given, ours, strict=False)) if pair[0] != pair[1]), None)
            where = f"{len(given)} ids" if at is None else f"id {given[at]} for {ours[at]} at position {at}"
            raise RowRejectedError("prompt-differs", expected=f"the prompt's own {len(ours)} ids", found=where)
        counted = usage.get("prompt_tokens")
        if given is None and isinstance(counted, int) and counted != len(ours):
            raise RowRejectedError(
                "prompt-differs", expected=f"a prompt of {len(ours)} tokens", found=f"{counted}, as the server counts"
            )

    def _given(self, ids: Any, finish: str, choice: dict[str, Any]) -> list[int]:
        limit = self._reader.vocab_size
        if not isinstance(ids, list) or not all(type(value) is int and 0 <= value < limit for value in ids):
            raise BadResponseError(f"expected token_ids below {limit}, found {clip(ids)}")
        return _not_empty(self._with_stop(ids, finish, choice))

    def _with_stop(self, ids: Sequence[int], finish: str, choice: dict[str, Any]) -> list[int]:
        """The ids with the token that stopped generation, which some servers cut off."""
        if finish == "length" or (ids and ids[-1] in self._stop_ids):
            return list(ids)
        reason = choice.get("stop_reason", choice.get("matched_stop"))
        if type(reason) is int:
            return [*ids, reason] if list(ids[-1:]) != [reason] else list(ids)
        named = "stop_reason" in choice or "matched_stop" in choice
        if reason is None and named and self._eos_id is not None:  # vLLM names every stop but the model's own EOS
            return [*ids, self._eos_id]
        if reason is None and len(self._stop_ids) == 1:
            return [*ids, self._stop_ids[0]]
        raise RowRejectedError(
            "stop-token-unknown",
            expected=f"ids that end with one of the tokens {self._stop_ids}, or a server that names it",
            found=f"finish_reason {finish!r}, stop_reason {clip(reason)}",
        )

    def _retokenised(
        self, prompt: Prompt, text: str, finish: str, choice: dict[str, Any], counted: Any
    ) -> list[int]:  # fmt: skip
        if _REPLACEMENT in text:
            raise _drift("text without U+FFFD, which stands for bytes of no whole character", clip(text[-80:]))
        ids = self._reader.encode(prompt.text + text)
        common = len(prompt.token_ids)
        if ids[:common] != prompt.token_ids:
            raise _drift("the prompt's ids before the answer's", "tokens that reach from the prompt into the answer")
        before = self._reader.tokenizer.decode(prompt.token_ids)
        if (decoded := self._reader.tokenizer.decode(ids)) != before + text:
            raise _drift(f"ids that decode to {clip(text[-80:])!r}", repr(clip(decoded[-80:])))
        answer = self._with_stop(ids[common:], finish, choice)
        # Servers count the token that stopped generation, or don't.
        possible = {len(answer)} | ({len(answer) - 1} if finish != "length" else set())
        if isinstance(counted, int) and counted not in possible:
            raise _drift(f"{counted} tokens, as the server counts", f"{len(answer)}")
        return _not_empty(answer)


def _text(choice: dict[str, Any]) -> str:
    """The text of a completion or of a chat message. Raises RowRejectedError where the server took it apart."""
    message = choice.get("message")
    if isinstance(message, dict):
        for key in ("tool_calls", "function_call", "reasoning_content", "reasoning"):
            if message.get(key):
                raise RowRejectedError(
                    "answer-taken-apart",
                    expected="the answer as the model wrote it: leave --chat out, or serve without parsers of "
                    "reasoning and tool calls, or with a server that returns token ids",
                    found=f"{key}: {clip(message[key])}",
                )
    text = choice.get("text") if message is None else message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise BadResponseError(f"expected a text, found {clip(choice)}")
    return text


def _drift(expected: str, found: str) -> RowRejectedError:
    return RowRejectedError("drift", expected=f"{expected}, as the server returns no token ids", found=found)


def _not_empty(ids: list[int]) -> list[int]:
    if not ids:
        raise BadResponseError("expected an answer of at least one token, found none")
    return ids
