from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import pickle
import sqlite3
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import torch
import zstandard
from safetensors.numpy import save_file

from draftcache.capture.prepare.chunks import CHUNK_BYTES, read_chunks
from draftcache.capture.prepare.rows.files import check_readable, read_conversations, read_rows, read_sized_rows
from draftcache.capture.prepare.rows.forms import ChatRow
from draftcache.capture.prepare.rows.rejections import Rejection
from draftcache.capture.prepare.rows.streams import DamagedFileError, split_array
from draftcache.capture.prepare.rows.token_rows import TokenRow
from draftcache.store.common.errors import InputError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello 🎉"}]
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
TABLES = ["parquet", "arrow", "stream"]


def encode(row: Any) -> bytes:
    return json.dumps(row).encode()


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"no, {text}"}]}


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def rows_of(path: Path) -> tuple[list[int], list[Rejection]]:
    items = list(read_conversations(path))
    return (
        [item[0] for item in items if not isinstance(item, Rejection)],
        [item for item in items if isinstance(item, Rejection)],
    )


def parsed_of(path: Path) -> list[ChatRow | TokenRow]:
    items = list(read_conversations(path))
    assert not [item for item in items if isinstance(item, Rejection)]
    return [item[1] for item in items if not isinstance(item, Rejection)]


def incompressible_chats(rows: int) -> list[dict[str, Any]]:
    return [chat(np.random.default_rng(row).bytes(1500).hex()) for row in range(rows)]


def save_table(path: Path, table: pa.Table, kind: str, batch: int = 10) -> Path:
    if kind == "parquet":
        pa.parquet.write_table(table, path, row_group_size=batch)
        return path
    writer = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
    with path.open("wb") as sink, writer(sink, table.schema) as file:
        file.write_table(table, max_chunksize=batch)
    return path


def test_blank_lines_count_but_yield_nothing(tmp_path: Path) -> None:
    line = encode({"messages": MESSAGES})
    path = written(tmp_path / "rows", b"\xef\xbb\xbf" + line + b"\r\n\n  \n" + line)
    assert rows_of(path) == ([1, 4], [])


@pytest.mark.parametrize(
    "data",
    [b"", b"\n \n", *(compress(b"") for compress in COMPRESSIONS.values())],
    ids=["nothing", "blanks", *COMPRESSIONS],
)
def test_an_empty_file_has_no_rows(tmp_path: Path, data: bytes) -> None:
    path = written(tmp_path / "rows", data)
    check_readable(path)
    assert rows_of(path) == ([], [])


def test_unicode_line_separators_do_not_split_a_row(tmp_path: Path) -> None:
    text = json.dumps({"messages": [{"role": "user", "content": "a\u2028b\x85c"}]}, ensure_ascii=False)
    assert rows_of(written(tmp_path / "rows", f"{text}\n".encode())) == ([1], [])


def test_rejections_name_file_and_line(tmp_path: Path) -> None:
    line = encode({"messages": MESSAGES}) + b"\n"
    path = written(tmp_path / "rows", line + b"not json\n" + line)
    numbers, (rejection,) = rows_of(path)
    assert numbers == [1, 3]
    assert str(rejection).startswith(f"{path}:2: malformed-json: expected one JSON object; found ")
    assert rejection.as_json()["line"] == 2


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        for read in (rows_of, check_readable):
            with pytest.raises(InputError, match=str(path)):
                read(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    """Every file is read several times: for its hash, for the check of templates and for its rows."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="found something that is no regular file"):
        check_readable(tmp_path / "pipe")


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_compressed_files_of_several_streams_under_any_name(tmp_path: Path, kind: str) -> None:
    compress, line = COMPRESSIONS[kind], encode({"messages": MESSAGES}) + b"\n"
    # The second stream starts in the middle of a line; zeros are padding.
    data = compress(line + line[:20]) + bytes(8) + compress(line[20:] + line) + bytes(4)
    path = written(tmp_path / "rows.txt", data)
    check_readable(path)
    assert rows_of(path) == ([1, 2, 3], [])


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_cut_compressed_file_gives_its_rows_then_a_rejection(tmp_path: Path, kind: str) -> None:
    # A bz2 stream is made of blocks of 900 kB: of the rows below the first two thirds are in whole blocks.
    data = COMPRESSIONS[kind](b"".join(encode(row) + b"\n" for row in incompressible_chats(600)))
    path = written(tmp_path / "rows", data[: len(data) * 2 // 3])
    check_readable(path)
    numbers, (rejection,) = rows_of(path)
    assert 100 < len(numbers) < 500
    assert numbers == list(range(1, len(numbers) + 1))
    assert (rejection.file, rejection.line, rejection.reason) == (str(path), len(numbers) + 1, "damaged-file")
    assert "complete" in rejection.expected
    assert "ends inside" in rejection.found


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_damaged_compressed_file_gives_its_rows_then_a_rejection(tmp_path: Path, kind: str) -> None:
    rows = b"".join(encode(row) + b"\n" for row in incompressible_chats(600))
    options: dict[str, Callable[[bytes], bytes]] = {
        "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
        "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC64),
    }
    data = bytearray(options.get(kind, COMPRESSIONS[kind])(rows))
    for at in range(len(data) * 2 // 3, len(data) * 2 // 3 + 2000):
        data[at] ^= 0xFF
    numbers, rejections = rows_of(written(tmp_path / "rows", data))
    assert len(numbers) > 100
    assert numbers == list(range(1, len(numbers) + 1))
    assert [rejection.reason for rejection in rejections][-1] == "damaged-file"


def test_a_damaged_checksum_of_gzip_is_a_rejection(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(encode({"messages": MESSAGES}) + b"\n"))
    data[-6] ^= 0xFF
    _, rejections = rows_of(written(tmp_path / "rows", data))
    assert [rejection.reason for rejection in rejections] == ["damaged-file"]


def test_zstd_with_a_long_window_and_a_frame_to_skip(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28)  # `zstd --long=28`; 27 is the usual limit
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    skipped = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    frame = compressor.compress(encode({"messages": MESSAGES}) + b"\n") + compressor.flush()
    assert rows_of(written(tmp_path / "rows", skipped + frame)) == ([1], [])


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("compress", [bytes, bz2.compress])
def test_a_json_array(tmp_path: Path, indent: int | None, compress: Callable[[bytes], bytes]) -> None:
    rows = [chat('a "quoted" [text], {with} \\ and \\" 🎉'), chat("b"), chat("]")]
    data = json.dumps(rows, indent=indent, ensure_ascii=False).encode()
    path = written(tmp_path / "rows.jsonl", compress(b"\xef\xbb\xbf\n" + data + b"\n"))
    check_readable(path)
    assert parsed_of(path) == [ChatRow(messages=row["messages"], tools=None) for row in rows]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_an_array_is_split_alike_wherever_its_blocks_end(size: int) -> None:
    values = [{"a": '\\"],\\\\'}, {"b": [1, [2, {"c": "}"}]]}, {}, {"d": "\u2028🎉"}]
    text = json.dumps(values, ensure_ascii=False).encode()
    blocks = (text[at : at + size] for at in range(0, len(text), size))
    assert [json.loads(element) for element in split_array(blocks)] == values


@pytest.mark.parametrize(
    ("text", "before"),
    [(b'[{"a": 1}] x', 1), (b'[{"a": 1}', 0), (b'[{"a": 1}, {"b": "', 1), (b'[{"a": 1}, {"b": "\\', 1), (b"[", 0)],
)
def test_an_array_that_does_not_end_or_is_not_all_is_damage(text: bytes, before: int) -> None:
    elements: list[bytes] = []
    with pytest.raises(DamagedFileError):
        elements.extend(split_array(iter([text])))  # what came before the error stays
    assert elements == [b'{"a": 1}'] * before


def test_bad_elements_of_an_array_are_rejected_one_by_one(tmp_path: Path) -> None:
    good = encode({"messages": MESSAGES})
    text = b"[" + b",\n".join([good, b"{bad}", good, b"[1]", b"", b"{]}", b'{"messages": "\xff"}', good]) + b",\n]\n"
    path = written(tmp_path / "rows", text)
    numbers, rejections = rows_of(path)
    assert numbers == [1, 3, 8]
    assert [(rejection.line, rejection.reason) for rejection in rejections] == [
        (2, "malformed-json"),
        (4, "unknown-form"),
        (5, "malformed-json"),
        (6, "malformed-json"),
        (7, "invalid-utf8"),
    ]


def test_a_cut_array_gives_its_elements_then_a_rejection(tmp_path: Path) -> None:
    data = encode([chat("a"), chat("b"), chat("c")])
    numbers, (rejection,) = rows_of(written(tmp_path / "rows", data[:-30]))
    assert numbers == [1, 2]
    assert (rejection.line, rejection.reason) == (3, "damaged-file")
    assert rejection.found == "the file ends inside the array"


@pytest.mark.parametrize("line", [b"[1, 2]", b'["a"]', b'[{"role": "user", "content": "hi"}]', b"[]"])
def test_a_line_that_is_a_list_is_a_bad_row_of_jsonl(tmp_path: Path, line: bytes) -> None:
    good = encode({"messages": MESSAGES})
    numbers, (rejection,) = rows_of(written(tmp_path / "rows", line + b"\n" + good + b"\n"))
    assert numbers == [2]
    assert (rejection.line, rejection.reason) == (1, "unknown-form")


def test_a_large_array_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    row = encode(chat("x\\n" * 10_000))
    with path.open("wb") as file:
        file.write(b"[")
        for _ in range(600):
            file.write(row + b",")
        file.write(row + b"]")
    assert path.stat().st_size > 40 << 20
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(path)) == 601
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", TABLES)
def test_tables_are_read_as_jsonl_is(tmp_path: Path, kind: str) -> None:
    """What JSONL leaves out is None in a table's structs and rows, and is left out again."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    rows: list[dict[str, Any]] = [chat(str(row)) for row in range(25)]
    rows[3]["messages"][1] |= {"content": None, "tool_calls": [call]}
    rows[4]["messages"][1]["weight"] = 0
    rows[5]["system"] = "be brief"
    rows[6] = {"input_ids": [0, 5, 9], "labels": [-100, 5, 9], "attention_mask": [0, 1, 1]}
    path = save_table(tmp_path / "rows.jsonl", pa.Table.from_pylist(rows, _schema()), kind)
    lines = written(tmp_path / "lines", b"".join(encode(row) + b"\n" for row in rows))
    check_readable(path)
    assert [item[0] for item in read_rows(path) if not isinstance(item, Rejection)] == list(range(1, 26))
    for mine, theirs in zip(parsed_of(path), parsed_of(lines), strict=True):
        if isinstance(theirs, ChatRow):
            assert mine == theirs
        else:
            assert isinstance(mine, TokenRow)
            assert mine.token_ids.tolist() == theirs.token_ids.tolist() == [5, 9]
            assert mine.loss_mask.tolist() == theirs.loss_mask.tolist()


def _schema() -> pa.Schema:
    function = pa.struct([("name", pa.string()), ("arguments", pa.string()), ("strict", pa.bool_())])
    call = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])
    message = pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call)), ("weight", pa.float64())]
    )
    ids = pa.list_(pa.int32())
    return pa.schema(
        [
            ("messages", pa.list_(message)),
            ("system", pa.string()),
            *[(name, ids) for name in ("input_ids", "labels", "attention_mask")],
            ("at", pa.timestamp("ns")),  # a column that is not read, of values that Python cannot hold
        ]
    )


def test_maps_of_a_table_are_objects(tmp_path: Path) -> None:
    message = pa.map_(pa.string(), pa.string())
    table = pa.table({"messages": pa.array([[list(turn.items()) for turn in MESSAGES]], pa.list_(message))})
    (row,) = parsed_of(save_table(tmp_path / "rows", table, "parquet"))
    assert row == ChatRow(messages=MESSAGES, tools=None)


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_of_other_columns_is_refused_by_its_columns(tmp_path: Path, kind: str) -> None:
    path = save_table(tmp_path / "rows", pa.table({"text": ["a"], "system": ["b"]}), kind)
    with pytest.raises(InputError, match=r"expected a .* with a column .*messages.*found \['text', 'system'\]: rename"):
        check_readable(path)


@pytest.mark.parametrize("kind", TABLES)
def test_a_cut_table_is_a_rejection(tmp_path: Path, kind: str) -> None:
    """A stream gives its whole batches first. Parquet and Arrow files have their directory at the end."""
    path = save_table(tmp_path / "rows", pa.Table.from_pylist(incompressible_chats(100)), kind)
    written(path, path.read_bytes()[: path.stat().st_size // 2])
    check_readable(path)
    numbers, (rejection,) = rows_of(path)
    assert numbers == list(range(1, (40 if kind == "stream" else 0) + 1))
    assert (rejection.line, rejection.reason) == (len(numbers) + 1, "damaged-file")


def test_damaged_offsets_of_arrow_are_a_rejection(tmp_path: Path) -> None:
    """Nothing checks them by itself: reading a text behind its buffer would end the process."""
    path = save_table(tmp_path / "rows", pa.table({"prompt": ["abc"] * 64, "completion": ["d"] * 64}), "stream", 64)
    data = path.read_bytes()
    offsets = np.arange(0, 195, 3, dtype=np.int32).tobytes()
    assert offsets in data
    written(path, data.replace(offsets, offsets[:40] + b"\xff\xff\xff\x7f" + offsets[44:]))
    numbers, (rejection,) = rows_of(path)
    assert (numbers, rejection.reason) == ([], "damaged-file")


@pytest.mark.parametrize("kind", TABLES)
def test_without_pyarrow_tables_are_refused_with_the_remedy(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_table(tmp_path / "rows", pa.Table.from_pylist([chat("a")]), kind)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for read in (check_readable, rows_of):
        with pytest.raises(InputError, match=r"pip install 'draftcache\[arrow\]'"):
            read(path)


@pytest.mark.parametrize("kind", ["jsonl", "array", *TABLES])
def test_chunks_of_any_kind_have_about_the_same_bytes(tmp_path: Path, kind: str) -> None:
    rows = incompressible_chats(1500)
    path = tmp_path / "rows"
    if kind in TABLES:
        save_table(path, pa.Table.from_pylist(rows), kind, batch=400)
    else:
        written(path, encode(rows) if kind == "array" else b"".join(encode(row) + b"\n" for row in rows))
    chunks = list(read_chunks("train", 0, path))
    sizes = {item[0]: item[2] for item in read_sized_rows(path) if not isinstance(item, Rejection)}
    assert [number for chunk in chunks for number, _ in chunk.lines] == list(range(1, 1501))
    for chunk in chunks[:-1]:
        assert CHUNK_BYTES <= sum(sizes[number] for number, _ in chunk.lines) < CHUNK_BYTES + 10_000
    assert len(chunks) in (9, 10)
    assert [chunk.lines for chunk in chunks] == [chunk.lines for chunk in read_chunks("train", 0, path)]


def test_a_large_row_group_takes_little_memory(tmp_path: Path) -> None:
    """The Arrow memory of one batch and what one slice of it becomes, though the file has a single row group."""
    path = save_table(tmp_path / "rows", pa.Table.from_pylist([chat("x" * 20_000)] * 1200), "parquet", batch=1200)
    before = pa.total_allocated_bytes()
    largest = 0
    tracemalloc.start()
    try:
        for item in itertools.islice(read_rows(path), 0, None, 50):
            assert not isinstance(item, Rejection)
            largest = max(largest, pa.total_allocated_bytes() - before)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert largest < 24 << 20


def zip_of(*names: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return data.getvalue()


def tar_bytes() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return data.getvalue()


def npy_bytes() -> bytes:
    data = io.BytesIO()
    np.save(data, np.arange(3))
    return data.getvalue()


FOREIGN: dict[str, tuple[bytes, str]] = {
    "zip": (zip_of("rows.jsonl"), "a ZIP archive: unpack it"),
    "zip-cut": (zip_of("rows.jsonl")[:40], "a ZIP archive: unpack it"),
    "xlsx": (zip_of("[Content_Types].xml", "xl/workbook.xml"), "an Excel workbook"),
    "npz": (zip_of("a.npy"), "numpy arrays"),
    "tar": (tar_bytes(), "a tar archive: unpack it"),
    "tar.gz": (gzip.compress(tar_bytes()), "a tar archive: unpack it"),
    "zip.xz": (lzma.compress(zip_of("a")), "a ZIP archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04", "7z"),
    "lz4": (b"\x04\x22\x4d\x18abc", "lz4"),
    "pickle": (pickle.dumps([chat("a")]), "a pickle .*opens no pickle"),
    "npy": (npy_bytes(), r"numpy array \(\.npy\): write rows of"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "pdf": (b"%PDF-1.7\n", "a PDF document"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document"),
    "avro": (b"Obj\x01\x04", "convert it to parquet"),
    "snappy": (b"\xff\x06\x00\x00sNaPpY", "decompress it, or compress it with gzip"),
    "orc": (b"ORC\x08", "convert it to parquet"),
    "encrypted": (b"PARE\x08", "encrypted"),
    "utf-16": (json.dumps(chat("a")).encode("utf-16"), "UTF-16 .*iconv"),
    "utf-16-le": (json.dumps(chat("a")).encode("utf-16-le"), "UTF-16 .*iconv"),
    "utf-16-be": (json.dumps(chat("a")).encode("utf-16-be"), "UTF-16 .*iconv"),
    "utf-32": (json.dumps(chat("a")).encode("utf-32"), "UTF-32"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "git lfs pull"),
    "html": (b"\n<!DOCTYPE html>\n<html>", "an HTML or XML page"),
    "csv": (b'prompt,completion\n"a","b"\n', r"commas \(CSV\): convert"),
    "tsv": (b"instruction\toutput\na\tb\n", r"tabs \(TSV\): convert"),
    "binary": (b"\x7fELF\x02\x01\x01\x00", "a binary file that begins with"),
    "latin-1": ("caf\u00e9 au lait".encode("latin-1"), "a binary file that begins with"),
    "spread": (json.dumps(chat("a"), indent=2).encode(), "one JSON object over several lines: .*jq -c"),
    "spread-long": (json.dumps(chat("a" * 100_000), indent=2).encode(), "one JSON object over several lines"),
    "spread-many": (b"\n".join([json.dumps(chat("a"), indent=2).encode()] * 2), "one JSON object over several lines"),
    "parquet.gz": (gzip.compress(b"PAR1 and so on"), "decompress it first"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_other_kinds_are_named_with_the_remedy(tmp_path: Path, kind: str) -> None:
    data, found = FOREIGN[kind]
    path = written(tmp_path / "rows.jsonl", data)
    for read in (check_readable, rows_of):
        with pytest.raises(InputError, match=found) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: expected ")


def test_files_of_torch_safetensors_and_sqlite_are_named(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "new")
    torch.save({"a": 1}, tmp_path / "old", _use_new_zipfile_serialization=False)
    save_file({"a": np.arange(3)}, tmp_path / "tensors")
    with sqlite3.connect(tmp_path / "database") as database:
        database.execute("create table rows (text)")
    database.close()
    for name, found in (
        ("new", r"a torch file \(\.pt\)"),
        ("old", "a pickle"),
        ("tensors", "a safetensors file"),
        ("database", "an SQLite database"),
    ):
        with pytest.raises(InputError, match=found):
            check_readable(tmp_path / name)


@pytest.mark.parametrize(
    "first", [b"not json", b"a, b", b'{"messages": [', b"{", b'{"messages": "\xff"}', b'{"a": NaN,', b'"text"']
)
def test_a_broken_first_row_is_no_other_kind_of_file(tmp_path: Path, first: bytes) -> None:
    good = encode({"messages": MESSAGES}) + b"\n"
    path = written(tmp_path / "rows", first + b"\n" + good + good)
    check_readable(path)
    numbers, (rejection, *_) = rows_of(path)
    assert rejection.line == 1
    assert numbers == [2, 3]
