"""Bytes of text files, plain or compressed, and the rows in them: lines, or the elements of one JSON array.

All of it works block by block, so that memory holds a block and a row, never a file.
"""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import zstandard

_BLOCK = 1 << 18
# A decoder that meets damage gives nothing of the piece it was given: with small pieces few good rows are lost.
_COMPRESSED_BLOCK = 1 << 13
_MAGIC_BYTES = 6

# Outside of strings only brackets matter, and between the array's elements commas; inside of them all up to the quote.
_BRACKET = re.compile(rb'["\[\]{}]')
_BRACKET_OR_COMMA = re.compile(rb'["\[\]{},]')
_STRING_REST = re.compile(rb"(?:[^\"\\]++|\\.)*+", re.DOTALL)


class DamagedFileError(Exception):
    """Raised by the readers of this package where a file is cut off or damaged; they have given what comes before."""


def open_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Yield the file's bytes in blocks, decompressed where its first bytes say gzip, zstd, bz2 or xz.

    Streams that follow one another are read as one. Raises DamagedFileError where a stream is cut off or damaged.
    """
    new_decoder = _decoder_for(file.read(_MAGIC_BYTES))
    file.seek(0)
    if new_decoder is None:
        return iter(lambda: file.read(_BLOCK), b"")
    return _decompressed(file, new_decoder)


def _decoder_for(magic: bytes) -> Callable[[], Any] | None:
    if magic.startswith(b"\x1f\x8b"):
        return lambda: zlib.decompressobj(wbits=31)
    if magic.startswith(b"\x28\xb5\x2f\xfd") or (magic[1:4] == b"\x2a\x4d\x18" and magic[0] & 0xF0 == 0x50):
        # Files written with `zstd --long=31` are legitimate, but the default limit of the window refuses them. The
        # second magic is that of a frame to be skipped, with which parallel writers begin.
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
    if magic.startswith(b"BZh"):
        return bz2.BZ2Decompressor
    if magic == b"\xfd7zXZ\x00":
        return lzma.LZMADecompressor
    return None


def _decompressed(file: BinaryIO, new_decoder: Callable[[], Any]) -> Iterator[bytes]:
    decoder = None
    while block := file.read(_COMPRESSED_BLOCK):
        while block:
            decoder = decoder or new_decoder()
            try:
                text = decoder.decompress(block)
            # bz2 reports damage as OSError or ValueError; nothing is read from the disk here.
            except (zlib.error, zstandard.ZstdError, lzma.LZMAError, EOFError, OSError, ValueError) as exc:
                raise DamagedFileError(str(exc)) from exc
            if text:
                yield text
            # Zeros between and after streams are padding.
            block = decoder.unused_data.lstrip(b"\0") if decoder.eof else b""
            decoder = None if decoder.eof else decoder
    if decoder is not None:
        raise DamagedFileError("the file ends inside a compressed stream")


def peek(blocks: Iterator[bytes], size: int) -> tuple[bytes, Iterator[bytes]]:
    """Return the first `size` bytes, fewer where there are no more, and the blocks from the first one on.

    Damage that is met meanwhile is raised by the blocks, behind what could be read.
    """
    read: list[bytes] = []
    damage: DamagedFileError | None = None
    try:
        while sum(map(len, read)) < size and (block := next(blocks, None)) is not None:
            read.append(block)
    except DamagedFileError as exc:
        damage = exc

    def from_start() -> Iterator[bytes]:
        yield from read
        if damage is not None:
            raise damage
        yield from blocks

    return b"".join(read)[:size], from_start()


def split_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the lines without their newlines."""
    pending: list[bytes] = []  # pieces of one line, joined once, so that a long line takes linear time
    for block in blocks:
        first, *others = block.split(b"\n")
        pending.append(first)
        for other in others:
            yield b"".join(pending)
            pending = [other]
    if any(pending):
        yield b"".join(pending)


def split_array(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the text of each element of one JSON array, cut at commas outside of strings and brackets.

    Whether an element is JSON is not looked at. Raises DamagedFileError where the array does not end, or is not all
    that the file holds.
    """
    scanner = _ArrayScanner()
    for block in blocks:
        yield from scanner.feed(block)
    if not scanner.ended:
        raise DamagedFileError("the file ends inside the array")


class _ArrayScanner:
    """Where a scan stands between two blocks."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = -1  # brackets that are open inside an element; -1 before the array
        self._in_string = False
        self._pieces: list[bytes] = []  # of the element that is being read
        self._carried = b""  # a backslash at the end of a block, which belongs to the byte that follows

    def feed(self, block: bytes) -> Iterator[bytes]:
        block = self._carried + block
        self._carried = b""
        at, start = 0, 0
        while at < len(block):
            if self.ended:
                if block[at:].strip():
                    raise DamagedFileError("more text behind the array")
                return
            if self._in_string:
                at = _STRING_REST.match(block, at).end()  # type: ignore[union-attr]  # it matches everywhere
                if at == len(block) - 1 and block[at:] == b"\\":
                    block, self._carried = block[:at], b"\\"
                elif at < len(block):
                    self._in_string = False
                    at += 1
                continue
            found = (_BRACKET if self._depth else _BRACKET_OR_COMMA).search(block, at)
            if found is None:
                break
            at, token = found.end(), found.group()
            if self._depth == 0 and token in (b",", b"]"):
                self._pieces.append(block[start : at - 1])
                element = b"".join(self._pieces).strip()
                self._pieces, start = [], at
                self.ended = token == b"]"
                if element or not self.ended:  # a blank before the end: an empty array, or a comma too many
                    yield element
            elif self._depth < 0:
                self._depth, start = 0, at
            elif token == b'"':
                self._in_string = True
            elif token in (b"{", b"["):
                self._depth += 1
            else:  # a bracket too many does not end the array: the element that holds it is no JSON
                self._depth = max(0, self._depth - 1)
        if self._depth >= 0 and not self.ended:
            self._pieces.append(block[start:])
