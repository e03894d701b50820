"""Files of kinds that hold no readable rows, known by their first bytes and named with what to do about them."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from draftcache.store.common.errors import InputError

READABLE = "JSONL or a JSON array (plain, gzip, zstd, bz2 or xz), parquet or Arrow"

_UNPACK = "unpack it, and give the files in it"
_DECOMPRESS = "decompress it, or compress it with gzip, zstd, bz2 or xz"
_EXPORT = "write its conversations as JSONL or parquet with the program that made it"
_TENSORS = 'write rows of {"token_ids": [...], "loss_mask": [...]} as JSONL or parquet'
_PICKLE = "draftcache opens no pickle, which can run any code: write its rows as JSONL or parquet yourself"
_RECODE = "convert it with `iconv -f UTF-16 -t UTF-8` (UTF-32 likewise)"

_KINDS = (
    (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "a 7z or RAR archive", _UNPACK),
    (rb"\x04\x22\x4d\x18|\x1f\x9d|\xff\x06\x00\x00sNaPpY", "a file compressed with lz4, snappy or LZW", _DECOMPRESS),
    (rb"\x80[\x02-\x05]", "a pickle (.pkl, or an old torch file)", _PICKLE),
    (rb"[\s\S]{6}\x00\x00\{", "a safetensors file", _TENSORS),
    (rb"\x93NUMPY", "a numpy array (.npy)", _TENSORS),
    (rb"\x89HDF\r\n", "an HDF5 file", _TENSORS),
    (rb"%PDF-", "a PDF document", "give the conversations themselves, as JSONL"),
    (rb"SQLite format 3\x00", "an SQLite database", "export its table as JSONL: `sqlite3 -json FILE 'select ...'`"),
    (rb"ORC|Obj\x01|FEA1", "an ORC, Avro or old Feather table", "convert it to parquet"),
    (rb"PARE", "an encrypted parquet file", "decrypt it"),
    (rb"\xd0\xcf\x11\xe0", "an Office document", _EXPORT),
    (rb"\xff\xfe|\xfe\xff|\{\x00|\[\x00|\x00\{|\x00\[|\x00\x00\x00[\[{]", "text in UTF-16 or UTF-32", _RECODE),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch the file with `git lfs pull`"),
    (rb"\s*<(?i:!doctype|html|\?xml)", "an HTML or XML page", "download the file itself; a page may need a log-in"),
)
_ZIPS = (
    (r".*data\.pkl", "a torch file (.pt)", _PICKLE),
    (r"xl/.*", "an Excel workbook (.xlsx)", _EXPORT),
    (r".*\.npy", "numpy arrays (.npz)", _TENSORS),
)
_TAR_MAGIC_AT = 257
_CELL = re.compile(r'"[^"]*"|[\w .-]{1,40}')


def refuse_foreign(path: Path, head: bytes) -> None:
    """Raise InputError where a file that begins with these bytes, decompressed, is known to hold no rows.

    Such a file would give nothing but rejections, one for each of its lines.
    """
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        raise _refusal(path, *_zip_kind(path))
    if head[_TAR_MAGIC_AT:].startswith(b"ustar"):
        raise _refusal(path, "a tar archive", _UNPACK)
    for pattern, found, remedy in _KINDS:
        if re.match(pattern, head):
            raise _refusal(path, found, remedy)
    if head.lstrip()[:1] not in (b"{", b"["):
        if delimiter := _delimiter(head):
            raise _refusal(
                path, f"a table of text with {delimiter}", "convert it to JSONL with the keys that prepare reads"
            )
        if _is_binary(head[:64]):
            raise _refusal(path, f"a binary file that begins with {head[:8]!r}", _EXPORT)
    if _is_spread_object(head):
        raise _refusal(path, "one JSON object over several lines", "write one row per line: `jq -c . FILE`")


def _refusal(path: Path, found: str, remedy: str) -> InputError:
    return InputError(f"{path}: expected {READABLE}; found {found}: {remedy}")


def _zip_kind(path: Path) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):  # cut off, or inside another compression
        names = []
    for pattern, found, remedy in _ZIPS:
        if any(re.fullmatch(pattern, name) for name in names):
            return found, remedy
    return "a ZIP archive", _UNPACK


def _delimiter(head: bytes) -> str | None:
    """The name of the delimiter of CSV or TSV whose first line names columns; None where the text is no such table."""
    header, newline, rest = head.decode("utf-8", "replace").lstrip("\ufeff").partition("\n")
    if not newline or rest.lstrip()[:1] in ("{", "["):  # a broken first row of JSONL
        return None
    for delimiter, name in (("\t", "tabs (TSV)"), (",", "commas (CSV)"), (";", "semicolons (CSV)")):
        cells = header.rstrip("\r").split(delimiter)
        if len(cells) > 1 and all(_CELL.fullmatch(cell) for cell in cells):
            return name
    return None


def _is_binary(start: bytes) -> bool:
    if b"\x00" in start:
        return True
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as exc:
        return exc.end < len(start)  # else a character that is cut by the end
    return False


def _is_spread_object(head: bytes) -> bool:
    text = head.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n")
    first, _, rest = text.partition("\n")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        pass
    else:
        return False
    try:
        return json.JSONDecoder().raw_decode(text)[1] > len(first)
    except (ValueError, RecursionError):
        # It does not end in what was read, or it is a broken row.
        return first.strip() == "{" and rest.lstrip().startswith('"')
