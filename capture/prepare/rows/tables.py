"""Rows of parquet and Arrow files, read batch by batch through pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from draftcache.capture.prepare.rows.forms import FORM_KEYS, ROW_KEYS
from draftcache.capture.prepare.rows.streams import DamagedFileError
from draftcache.store.common.errors import InputError

_MAGICS = {b"PAR1": "parquet", b"ARROW1": "Arrow file", b"\xff\xff\xff\xff": "Arrow stream"}
"""The last one opens every message of an Arrow stream, which has no magic of its own; no UTF-8 text has this byte."""

_BATCH_ROWS = 128  # of parquet: 13 MB where a row is 100 KB
_SLICE_BYTES = 1 << 20  # turned into Python objects at once
_BUFFER_BYTES = 1 << 20  # read of a parquet column at once; without a buffer it is the whole row group's column


def table_kind(head: bytes) -> str | None:
    """Return `parquet`, `Arrow file` or `Arrow stream` by the first bytes of a file; None where it is none of them."""
    return next((kind for magic, kind in _MAGICS.items() if head.startswith(magic)), None)


def check_table(path: Path, kind: str) -> None:
    """Raise InputError where pyarrow is missing, or where no column tells the form of the rows.

    A damaged file passes: reading it gives the rejection.
    """
    _import_pyarrow(path, kind)
    try:
        with _opened(path, kind) as (names, _):
            found = names
    except DamagedFileError:
        return
    if not set(FORM_KEYS) & set(found):
        raise InputError(
            f"{path}: expected a {kind} with a column {', '.join(FORM_KEYS[:-1])}, found {found}: rename the column "
            "that holds the conversations"
        )


def read_table(path: Path, kind: str) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each row as {column: value} of the columns that are read, and its bytes in Arrow's memory.

    The bytes are those of its neighbourhood of about a mebibyte, divided by the rows. Raises DamagedFileError where
    the file cannot be read on, and InputError where pyarrow is missing.
    """
    _import_pyarrow(path, kind)
    with _opened(path, kind) as (_, batches):
        for batch in batches:
            # Maps become dicts; pyarrow's way to do so takes eight times as long for all other types too.
            maps = "lossy" if "map<" in str(batch.schema) else None
            rows = batch.num_rows
            step = max(1, min(rows, rows * _SLICE_BYTES // max(1, batch.nbytes)))
            for start in range(0, rows, step):
                part = batch.slice(start, step)
                for row in part.to_pylist(maps_as_pydicts=maps):
                    yield row, max(1, part.nbytes // part.num_rows)


def _import_pyarrow(path: Path, kind: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as exc:
        raise InputError(
            f"{path}: expected pyarrow to read a {kind}, found {exc}: pip install 'draftcache[arrow]'"
        ) from exc
    return pyarrow


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[tuple[list[str], Iterator[Any]]]:
    """The names of all columns, and the batches of those that are read. Raises DamagedFileError, also in the body."""
    arrow = _import_pyarrow(path, kind)
    try:
        if kind == "parquet":
            with arrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
                names = file.schema_arrow.names
                yield names, file.iter_batches(_BATCH_ROWS, columns=_read(names), use_threads=False)
            return
        with arrow.memory_map(str(path)) as mapped:
            if kind == "Arrow file":
                reader = arrow.ipc.open_file(mapped)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                reader = arrow.ipc.open_stream(mapped)
                batches = iter(reader)
            yield reader.schema.names, (_checked(batch) for batch in batches)
    # pyarrow's own errors, and those by which it reports text that is not UTF-8 and values that Python cannot hold.
    except (arrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as exc:
        raise DamagedFileError(str(exc)) from exc


def _checked(batch: Any) -> Any:
    """The batch's columns that are read, with offsets inside their buffers: a damaged one would end the process."""
    part = batch.select(_read(batch.schema.names))
    part.validate(full=True)
    return part


def _read(names: list[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name in ROW_KEYS]
