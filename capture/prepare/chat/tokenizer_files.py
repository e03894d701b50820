"""Load a tokenizer directory into the plain strings that worker processes need, without transformers objects.

Only `load_tokenizer` imports transformers: the import takes a second and brings torch along, so workers must not need
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftcache.store.common.errors import InputError
from draftcache.store.common.files import (
    canonical_json,
    hash_bytes,
    hash_file,
    hash_json,
    read_json,
    require_file,
    require_regular_files,
)

SHIPPED_TEMPLATE = Path(__file__).parents[1] / "templates" / "nemotron_chatml.jinja"

# The files that decide which ids a text becomes. The chat template has its own hash.
_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
)
_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A chat template as text: one template for rows without tools and one for rows with tools."""

    plain: str
    with_tools: str
    source: str  # `tokenizer`, or the name of the --chat-template file

    @property
    def hash(self) -> str:
        """xxh3-128 of both texts."""
        return hash_json([self.plain, self.with_tools])

    def text(self, tools: list[dict[str, Any]] | None) -> str:
        """The template of a row with these tools. `tools: []` counts as tools, as in transformers."""
        return self.plain if tools is None else self.with_tools


_NOT_THERE = (
    "{{- raise_exception('the files begin with rows of token ids alone, so no template was needed; give one') -}}"
)
NO_TEMPLATE = ChatTemplate(plain=_NOT_THERE, with_tools=_NOT_THERE, source="none")
"""For rows of token ids alone: a conversation among them goes to quarantine, and its record says what to do."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """A loaded tokenizer directory: cheap to pickle, and sufficient to render and to encode."""

    directory: str  # the last component of its path
    files: dict[str, str]  # name -> xxh3-128
    backend_json: str  # the `tokenizers` serialisation
    special_tokens: dict[str, str]  # template variables such as `bos_token`
    encode_special_tokens: bool  # transformers' `split_special_tokens`
    stop_tokens: tuple[str, ...]  # texts of the tokens at which generation stops
    own_template: ChatTemplate | None
    vocab_size: int
    vocab_size_from: str

    @property
    def hash(self) -> str:
        """xxh3-128 of the names and hashes of the files that decide the ids; the chat template does not count."""
        return hash_json(self.files)


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> tuple[TokenizerFiles, Any]:
    """Load `directory` as transformers does, without network. Returns (files, the transformers tokenizer).

    `vocab_size` is the verifier's where `directory` holds its config.json (the head may have more rows than the
    tokenizer has tokens, and the vocabulary map is over those rows), else the tokenizer's length. Raises InputError
    where there is no tokenizer, or only a slow one without character offsets.
    """
    from transformers import AutoTokenizer

    if not directory.is_dir():
        raise InputError(f"--tokenizer {directory}: expected a directory with a tokenizer, found nothing there")
    require_regular_files(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as exc:  # transformers raises OSError, ValueError, KeyError and bare Exception here
        raise InputError(
            f"--tokenizer {directory}: expected a tokenizer that transformers loads, found: {exc}"
        ) from exc
    if not tokenizer.is_fast:
        raise InputError(
            f"--tokenizer {directory}: expected a fast tokenizer (tokenizer.json), found "
            f"{type(tokenizer).__name__}, which gives no character offsets; convert it first"
        )
    vocab_size, vocab_size_from = _vocab_size(directory, len(tokenizer))
    files = TokenizerFiles(
        directory=directory.resolve().name,
        files=_file_hashes(directory),
        backend_json=tokenizer.backend_tokenizer.to_str(),
        special_tokens=dict(tokenizer.special_tokens_map),
        encode_special_tokens=bool(getattr(tokenizer, "split_special_tokens", False)),
        stop_tokens=_stop_tokens(directory, tokenizer),
        own_template=_own_template(directory, tokenizer.chat_template),
        vocab_size=vocab_size,
        vocab_size_from=vocab_size_from,
    )
    return files, tokenizer


def choose_template(files: TokenizerFiles, template_file: Path | None) -> ChatTemplate:
    """The template of `--chat-template`, else the tokenizer's own. Raises InputError where there is none."""
    if template_file is not None:
        require_file(template_file, "--chat-template to be a text file")
        try:
            text = template_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise InputError(f"--chat-template {template_file}: expected a text file, found: {exc}") from exc
        template = ChatTemplate(plain=text, with_tools=text, source=template_file.name)
    elif files.own_template is not None:
        template = files.own_template
    else:
        raise InputError(
            f"--tokenizer {files.directory}: expected a chat template, found none; give --chat-template FILE"
        )
    return template


def _stop_tokens(directory: Path, tokenizer: Any) -> tuple[str, ...]:
    """The texts of the tokens at which engines stop: those of generation_config.json and the tokenizer's own."""
    path = directory / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise InputError(f"{path}: expected eos_token_id to be token ids, found {found!r}")
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    known = [token for token in ids if token < len(tokenizer)]
    return tuple(dict.fromkeys(tokenizer.decode([token]) for token in known))


def _own_template(directory: Path, template: Any) -> ChatTemplate | None:
    if template is None:
        return None
    if isinstance(template, str):
        return ChatTemplate(plain=template, with_tools=template, source="tokenizer")
    if "default" not in template:
        raise InputError(
            f"--tokenizer {directory}: expected a chat template named `default`, found {sorted(template)}; "
            "give one with --chat-template FILE"
        )
    plain = template["default"]
    return ChatTemplate(plain=plain, with_tools=template.get("tool_use", plain), source="tokenizer")


def _file_hashes(directory: Path) -> dict[str, str]:
    hashes = {name: hash_file(directory / name) for name in _FILES if (directory / name).is_file()}
    if (directory / _CONFIG).is_file():
        config = read_json(directory / _CONFIG)
        config.pop("chat_template", None)
        hashes[_CONFIG] = hash_bytes(canonical_json(config).encode())
    return hashes


def _vocab_size(directory: Path, tokens: int) -> tuple[int, str]:
    path = directory / "config.json"
    if path.is_file():
        config = read_json(path)
        size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
        if isinstance(size, int) and size > 0:
            return size, "config.json"
    return tokens, "tokenizer"
