"""The rows of one file, whose kind its first bytes decide and never its name.

Read are JSONL and JSON arrays, plain or compressed with gzip, zstd, bz2 or xz, and parquet, Arrow files and Arrow
streams. Memory holds a few blocks and a row (of a table: some hundred rows), whatever the file's size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from draftcache.capture.prepare.rows.foreign_files import READABLE, refuse_foreign
from draftcache.capture.prepare.rows.forms import BUILT_IN_ROLES, ChatRow, parse_row
from draftcache.capture.prepare.rows.rejections import Rejection, RowRejectedError
from draftcache.capture.prepare.rows.roles import RoleMap
from draftcache.capture.prepare.rows.streams import DamagedFileError, open_blocks, peek, split_array, split_lines
from draftcache.capture.prepare.rows.tables import check_table, read_table, table_kind
from draftcache.capture.prepare.rows.token_rows import TokenRow
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import require_file

Row: TypeAlias = bytes | dict[str, Any]
"""One row as it was read: the text of a JSON object, or the values of a table's row by column."""

_HEAD_BYTES = 1 << 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON_START = re.compile(rb'\s*(?:\{\s*["}]|\[\s*[\[{\]])')


def read_conversations(
    path: Path, roles: RoleMap = BUILT_IN_ROLES
) -> Iterator[tuple[int, ChatRow | TokenRow] | Rejection]:
    """Yield (number from 1, parsed row), or the rejection of that row. Raises InputError as `read_rows` does."""
    for item in read_rows(path):
        if isinstance(item, Rejection):
            yield item
            continue
        number, row = item
        try:
            yield number, parse_row(row, roles)
        except RowRejectedError as exc:
            yield exc.at(str(path), number)


def read_rows(path: Path) -> Iterator[tuple[int, Row] | Rejection]:
    """Yield (number from 1, row): of a line that is not blank, an element of a JSON array, or a row of a table.

    Where the file is cut off or damaged, the rows before come first, then a `Rejection` for the row at which reading
    stopped. Raises InputError where there is no file, or where it is of a kind that cannot be read.
    """
    for item in read_sized_rows(path):
        yield item if isinstance(item, Rejection) else item[:2]


def read_sized_rows(path: Path) -> Iterator[tuple[int, Row, int] | Rejection]:
    """Yield what `read_rows` does, each row with its size in bytes, which depends on the file alone."""
    number = 0
    try:
        for number, row, size in _numbered(path):
            if size:
                yield number, row, size
    except DamagedFileError as exc:
        yield Rejection(
            file=str(path),
            line=number + 1,
            reason="damaged-file",
            expected="a complete file (every row from this one on is missing)",
            found=str(exc),
        )


def check_readable(path: Path) -> None:
    """Raise InputError where `path` is no regular file, or of a kind that cannot be read; rows are not looked at."""
    require_file(path, READABLE)
    with path.open("rb") as file:
        kind = table_kind(file.read(8))
        file.seek(0)
        if kind is None:
            _text_head(path, peek(open_blocks(file), _HEAD_BYTES)[0])
    if kind is not None:
        check_table(path, kind)


def holds_rows(path: Path) -> bool:
    """Whether the file is of a kind that can be read and, if it is text, begins as JSON or has half its lines do so.

    No README, template or TOML file does, and JSONL with a broken first row does.
    """
    with path.open("rb") as file:
        if table_kind(file.read(8)) is not None:
            return True
        file.seek(0)
        head = peek(open_blocks(file), _HEAD_BYTES)[0]
    try:
        _text_head(path, head)
    except InputError:
        return False
    text = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    lines = [line for line in text.split(b"\n") if line.strip()]
    objects = [line for line in lines if _JSON_START.match(line)]
    return _JSON_START.match(text) is not None or 0 < len(lines) <= 2 * len(objects)


def _numbered(path: Path) -> Iterator[tuple[int, Row, int]]:
    """Number, row and size of each row; blank lines are numbered too, and have size 0. Raises DamagedFileError."""
    require_file(path, READABLE)
    with path.open("rb") as file:
        kind = table_kind(file.read(8))
        if kind is not None:
            for number, (values, size) in enumerate(read_table(path, kind), start=1):
                yield number, values, size
            return
        file.seek(0)
        head, blocks = peek(open_blocks(file), _HEAD_BYTES)
        is_array = _is_array(_text_head(path, head))
        for number, row in enumerate(split_array(blocks) if is_array else split_lines(blocks), start=1):
            if is_array:
                yield number, row, len(row) + 1  # an empty element is a row too, and no good one
                continue
            line = row if number > 1 else row.removeprefix(_BYTE_ORDER_MARK)
            yield number, line, len(line) if line.strip() else 0


def _text_head(path: Path, head: bytes) -> bytes:
    """The head of a text file. Raises InputError where it is of another kind."""
    if (kind := table_kind(head)) is not None:
        raise InputError(f"{path}: expected a {kind} that is not compressed as a whole: decompress it first")
    refuse_foreign(path, head)
    return head


def _is_array(head: bytes) -> bool:
    """Whether the file is one JSON array of objects, and not JSONL whose first line is a list."""
    text = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if not text.startswith(b"[") or text[1:].lstrip()[:1] not in (b"{", b"]", b""):
        return False
    first, _, rest = text.partition(b"\n")
    if not rest.strip():
        return True
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return False
