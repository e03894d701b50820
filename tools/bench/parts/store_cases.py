"""The cases of the store benchmark: our store in every mode and the other formats, compared bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import StoreError
from draftcache.store.format.array_spec import COUNT_FIELD, ROWS_AXIS, TOKENS_AXIS, ArraySpec, tap_name
from draftcache.store.format.channel_scales import Calibration
from draftcache.store.format.frozen import FROZEN_NAME
from draftcache.store.format.manifest import StoreManifest, Tap
from draftcache.store.format.vocab_map import VOCAB_MAP_NAME
from draftcache.store.reader import StoreReader
from draftcache.store.writer import StoreWriter
from draftcache.tools.bench.parts.store_content import Content
from draftcache.tools.bench.parts.store_formats import Arrays, Buffers, Case, RawPreadv, Window, ZarrPython
from draftcache.tools.bench.parts.store_sample_formats import Safetensors, TorchSave, Webdataset

MODES = ("bf16", "lossless", "int8", "fp8")


class Ours(Case):
    """Implements `Case` by a store of one shard. Every chunk's crc32c is checked.

    Taps are read as the codec's parts, which training decodes on its device. int8's calibration is part of the
    constructor, because it is a pass of the capture job, not of the writer.
    """

    def __init__(self, mode: str, root: Path, content: Content, buffers: Buffers, *, durable: bool = True) -> None:
        super().__init__(root, content, buffers, durable=durable)
        self.name = f"ours-{mode}"
        self.manifest = _manifest(mode, content)
        self.codec, self.specs = self.manifest.codec, self.manifest.array_specs()

    def write(self) -> None:
        with StoreWriter(self.root, self.manifest, _top_level_files) as writer:
            shard = writer.shard(0)
            assert shard is not None
            with shard:
                for item in self.content.conversations:
                    shard.append(item)
                shard.commit({"quarantined": [], "gates": {}})
            writer.finish()

    def open(self) -> NDArray[np.int64]:
        self.reader = StoreReader(self.root)
        lengths: NDArray[np.int64] = self.reader.index[COUNT_FIELD[TOKENS_AXIS]]
        return lengths

    def read(self, number: int) -> Arrays:
        return self.reader.read(number, decode=False, out=self._out()).arrays

    def read_window(self, number: int, first: int, count: int) -> Arrays:
        tokens = first, first + count
        return self.reader.read(number, self.window_names, tokens=tokens, decode=False, out=self._out()).arrays

    def read_decoded(self) -> Iterator[Arrays]:
        """Yield every conversation, with taps as bf16 states that are merged or dequantised on the CPU."""
        states = ArraySpec(axis=ROWS_AXIS, dtype="uint16", inner=(self.content.hidden_size,))
        out = self._out() | {name: self.buffers.take(name, states) for name in self.content.taps}
        for number in range(len(self.content.conversations)):
            yield self.reader.read(number, out=out).arrays

    def expected(self, number: int) -> Arrays:
        """Return the codec's parts, which are encoded from the content here."""
        arrays = dict(self.content.conversations[number].arrays)
        for layer in self.content.layers:
            arrays |= self.codec.encode(layer, arrays.pop(tap_name(layer)))
        return arrays

    def bytes(self) -> int:
        """Exclude the placeholders of weights and vocabulary map, which every format would need beside it."""
        return super().bytes() - sum((self.root / name).stat().st_size for name in (FROZEN_NAME, VOCAB_MAP_NAME))

    def close(self) -> None:
        self.reader.close()

    def _out(self) -> Arrays:
        return {name: self.buffers.take(name, spec) for name, spec in self.specs.items()}


def _manifest(mode: str, content: Content) -> StoreManifest:
    scales = None
    if mode == "int8":
        calibration = Calibration(content.layers, content.hidden_size)
        for item in content.conversations:
            for layer in content.layers:
                calibration.add(layer, item.arrays[tap_name(layer)])
        scales = calibration.finish().to_json()
    return StoreManifest(
        verifier={"name": "benchmark", "hidden_size": content.hidden_size, "vocab_size": content.vocab_size},
        tokenizer_hash="",
        chat_template_hash="",
        dataset_hash="",
        splits=("train",),
        taps=tuple(Tap(layer=layer) for layer in content.layers),
        mode=mode,
        channel_scales=scales,
        compute_dtype="bfloat16",
        window=content.window,
        top_k=content.top_k,
        draft_vocab_size=content.draft_vocab_size,
        draft_vocab_hash="",
        shard_tokens=content.tokens,
        shards=1,
        ssm=None,
    )


def _top_level_files(directory: Path) -> list[Path]:
    paths = [directory / FROZEN_NAME, directory / VOCAB_MAP_NAME]
    for path in paths:
        path.write_bytes(b"no case reads this")
    return paths


def make_cases(root: Path, content: Content, *, durable: bool = True) -> list[Case]:
    """Return every case, each in a directory of its name below `root`."""
    buffers = Buffers(content)
    ours = [Ours(mode, root / f"ours-{mode}", content, buffers, durable=durable) for mode in MODES]
    others = (ZarrPython, Webdataset, TorchSave, Safetensors, RawPreadv)
    return [*ours, *(case(root / case.name, content, buffers, durable=durable) for case in others)]


def choose_windows(content: Content, tokens: int, *, seed: int = 1) -> list[Window]:
    """Return random windows, together about as long as the content.

    Each has `tokens` tokens, or the length of the longest conversation if that is shorter.
    """
    lengths = content.lengths(TOKENS_AXIS)
    tokens = min(tokens, int(lengths.max()))
    rng = np.random.default_rng(seed)
    fitting = np.flatnonzero(lengths >= tokens)
    # Every start is as likely as any other, so a longer conversation gets more windows.
    starts = lengths[fitting] - tokens + 1
    chosen = rng.choice(fitting, max(4, round(content.tokens / tokens)), p=starts / starts.sum())
    return [(int(number), int(rng.integers(lengths[number] - tokens + 1)), tokens) for number in chosen]


def check(case: Case, windows: Sequence[Window]) -> None:
    """Raise StoreError unless whole conversations and windows are read bit by bit as expected."""
    case.open()
    count = 0
    for number, found in enumerate(case.read_all()):
        require_equal(case.name, f"conversation {number}", found, case.expected(number))
        count += 1
    if count != len(case.content.conversations):
        raise StoreError(f"{case.name}: expected {len(case.content.conversations)} conversations, found {count}")
    # The windows are in the order of the content, because a stream can give them in no other order.
    ordered = sorted(windows)
    for window, found in zip(ordered, case.read_windows(ordered), strict=True):
        require_equal(case.name, f"window {window}", found, expected_window(case, window))


def expected_window(case: Case, window: Window) -> Arrays:
    """Return the window's rows of `case.expected`, found by comparing positions one by one."""
    number, first, count = window
    arrays = case.expected(number)
    picked: Arrays = {}
    for name in case.window_names:
        axis = case.specs[name].axis
        positions: NDArray[Any] = np.arange(arrays["token_ids"].shape[0])
        if axis != TOKENS_AXIS:
            positions = arrays["positions" if axis == "rows" else "teacher_positions"]
        picked[name] = arrays[name][(positions >= first) & (positions < first + count)]
    return picked


def require_equal(case: str, what: str, found: Arrays, expected: Arrays) -> None:
    """Raise StoreError, which names the first array that differs in shape, dtype or any bit."""
    if found.keys() != expected.keys():
        raise StoreError(f"{case}, {what}: expected the arrays {sorted(expected)}, found {sorted(found)}")
    for name, values in expected.items():
        same = found[name].dtype == values.dtype and found[name].shape == values.shape
        if not same or not np.array_equal(_bits(found[name]), _bits(values)):
            raise StoreError(f"{case}, {what}: expected {name} as it was written, found other values")


def _bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
