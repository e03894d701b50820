"""What prepare checks and finds out on the first conversations, before it begins: refusals come early and whole."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from draftcache.capture.prepare.chat.encoding import ChatTokenizer
from draftcache.capture.prepare.chat.rendering import Renderer
from draftcache.capture.prepare.chat.template_check import Sample, check_against_transformers, template_difference
from draftcache.capture.prepare.chat.tokenizer_files import NO_TEMPLATE, ChatTemplate, TokenizerFiles, choose_template
from draftcache.capture.prepare.chunks import RowSettings
from draftcache.capture.prepare.rows.files import read_conversations
from draftcache.capture.prepare.rows.forms import ChatRow
from draftcache.capture.prepare.rows.rejections import Rejection, RowRejectedError
from draftcache.capture.prepare.rows.roles import RoleMap
from draftcache.store.common.errors import InputError

# Conversations per file that both templates render, and conversations in all that transformers tokenises as well.
TEMPLATE_SAMPLE = 64
TRANSFORMERS_SAMPLE = 8


def job_template(
    given: Path | None, files: TokenizerFiles, splits: dict[str, list[Path]], roles: RoleMap
) -> ChatTemplate:
    """Return the template that renders conversations; NO_TEMPLATE where none is there and files begin with token ids.

    Raises InputError where none is there and a file begins with conversations.
    """
    try:
        return choose_template(files, given)
    except InputError:
        if given is not None or _sample(splits, roles):
            raise
        return NO_TEMPLATE


def check_sample(
    files: TokenizerFiles,
    template: ChatTemplate,
    settings: RowSettings,
    tokenizer: Any,
    splits: dict[str, list[Path]],
) -> dict[str, Any]:
    """Check the first conversations of every file. Returns `matched` and `traits` of the template for the manifest.

    Raises InputError where ids differ from transformers', or the text from the tokenizer's own template, and where
    tags are to mask and the template has none.
    """
    if template is NO_TEMPLATE:
        return {"matched": "rows of token ids need none", "traits": None}
    try:
        ours = ChatTokenizer(files, template, settings.chat)
    except TimeoutError as exc:
        raise InputError(
            f"chat template ({template.source}): expected it to render a short conversation at once, found: {exc}"
        ) from exc
    if settings.chat.loss_mask == "tags" and not ours.renderer.has_tags():
        raise InputError(
            f"--loss-mask tags: expected a {{% generation %}} block in the chat template ({template.source}), found "
            "none; leave the flag out, and the generation prompt tells what the model writes"
        )
    sample = _sample(splits, settings.roles)
    check_against_transformers(ours, tokenizer, sample[:TRANSFORMERS_SAMPLE])
    return {"matched": _matched(files, ours, settings, sample), "traits": ours.conversations.traits.as_json()}


def _matched(files: TokenizerFiles, ours: ChatTokenizer, settings: RowSettings, sample: list[Sample]) -> str:
    own = files.own_template
    if own is None:
        return "not matched: the tokenizer has no template of its own"
    if own is ours.renderer.template:
        return "the tokenizer's own template"
    theirs = Renderer(own, ours.renderer.variables, settings.chat.date)
    for file, line, row in sample:
        try:
            difference = template_difference(ours.renderer, theirs, ours.conversations.normalised(row))
        except RowRejectedError:
            continue
        if difference is None:
            continue
        if settings.allow_template_difference:
            return f"differs from the tokenizer's own template, as allowed: {file}:{line}: {difference}"
        raise InputError(
            f"--chat-template {ours.renderer.template.source}: expected the text of the tokenizer's own template, "
            f"found a difference: {file}:{line}: {difference}. Correct the template, or go on with "
            "--allow-template-difference"
        )
    return "compared with the tokenizer's own template on every row"


def _sample(splits: dict[str, list[Path]], roles: RoleMap) -> list[Sample]:
    """The first conversations of every file, those of token ids left out."""
    return [row for paths in splits.values() for path in paths for row in _first_rows(path, roles)]


def _first_rows(path: Path, roles: RoleMap) -> list[Sample]:
    usable = (item for item in read_conversations(path, roles) if not isinstance(item, Rejection))
    rows = islice(usable, TEMPLATE_SAMPLE)
    return [(str(path), number, row) for number, row in rows if isinstance(row, ChatRow)]
