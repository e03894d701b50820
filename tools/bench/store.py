"""The store beside other formats: the same content written and read through each, bit-compared.

`python -m draftcache.tools.bench.store [--output FILE]` measures sizes, CPU seconds and speeds on generated states with
real statistics; `--store PATH` takes an existing store's conversations and reports sizes only.

- GB is 1e9 logical bytes (bf16 taps and all other arrays), the same number for every case, however small its files.
- Cases run in turn, round by round. Results are medians, without the first round. Writes end with fsync, reads come
  from a warm page cache, and every byte that is read ends in the process's own memory. CPU seconds are user and system
  time of this process with its threads and children; torch has one thread. Encoding to a mode is part of its write.
- Reads go conversation by conversation. Windows are 4096 tokens from random positions, and only the arrays that
  training needs.
- Our taps are read in the form in which they are stored, ready to be decoded on the device; `decoded_cpu_s_per_gb`
  reads and decodes on the CPU. `decode_cpu_s_per_gb` is zstd alone, from memory.
- The cases hold the same arrays, so that formats are compared. The cases `specforge`, `speculators` and
  `speculators-fp8` are the files that these projects write (all rows, one more state instead of a teacher): only
  their sizes are reported.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import Zstd

from draftcache.store.common.errors import StoreError
from draftcache.store.format.array_spec import CHUNK_ROWS, TOKENS_AXIS
from draftcache.tools.bench.parts.store_cases import Ours, check, choose_windows, expected_window, make_cases
from draftcache.tools.bench.parts.store_content import exponent_entropy, from_store, generate, generate_tiny, peer_bytes
from draftcache.tools.bench.parts.store_formats import Case, Window
from draftcache.tools.bench.parts.store_picture import draw, table
from draftcache.tools.result_rows import cpu_name, report, result_row

WINDOW_TOKENS = 4096
_OPEN_SECONDS = 30.0  # a case is not opened again once its openings have taken longer than this in all

Samples = dict[tuple[str, str], list[float]]
"""One value per round, by case and metric."""

UNITS = {
    "bytes_per_token": "bytes/token",
    "write_cpu_s_per_gb": "CPU-s/GB",
    "read_cpu_s_per_gb": "CPU-s/GB",
    "decoded_cpu_s_per_gb": "CPU-s/GB",
    "decode_cpu_s_per_gb": "CPU-s/GB",
    "write_gb_s": "GB/s",
    "read_gb_s": "GB/s",
    "window_gb_s": "GB/s",
    "window_cpu_s_per_gb": "CPU-s/GB",
    "open_30k_ms": "ms",
    "bf16_size_ratio": "ours-bf16 / this",
    "exponent_bits": "bits",
    "logical_gb": "GB",
}


def main() -> None:
    """Measure, print the result rows and a table, and write `--output` as JSON with a picture beside it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON rows; the picture takes the suffix .png")
    parser.add_argument("--gb", type=float, default=0.65, help="logical gigabytes of content (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, after one that is not (%(default)s)")
    parser.add_argument("--open-conversations", type=int, default=30_000, metavar="N", help="(%(default)s)")
    parser.add_argument("--work", type=Path, metavar="DIRECTORY", help="where to write (a temporary directory)")
    parser.add_argument("--store", type=Path, metavar="PATH", help="content of this store, sizes only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.work) as directory:
        rows = measure(Path(directory), arguments)
    report(rows, arguments.output)
    print(table(rows))
    if arguments.output is not None:
        draw(rows, arguments.output.with_suffix(".png"))


def measure(directory: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the result rows of every case and metric."""
    content = generate(arguments.gb) if arguments.store is None else from_store(arguments.store)
    samples: Samples = defaultdict(list)
    samples["content", "exponent_bits"].append(exponent_entropy(content))
    samples["content", "logical_gb"].append(content.bytes / 1e9)
    cases = make_cases(directory / "content", content)
    windows = choose_windows(content, WINDOW_TOKENS)
    full = arguments.store is None
    measure_writes(cases, samples, arguments.rounds if full else 0)
    for case in cases:
        check(case, windows)
    measure_sizes(cases, samples)
    for name, size in peer_bytes(content, directory / "peers").items():
        samples[name, "bytes_per_token"].append(size / content.tokens)
    if full:
        measure_reads(cases, windows, samples, arguments.rounds)
        measure_decoding(cases, samples, arguments.rounds)
    for case in cases:
        case.close()
    shutil.rmtree(directory / "content")
    units = dict(UNITS)
    if full:
        measure_opening(directory / "tiny", arguments.open_conversations, arguments.rounds, samples)
        if arguments.open_conversations != 30_000:
            units["open_30k_ms"] += f" ({arguments.open_conversations} conversations)"
    device = cpu_name()
    return [
        result_row(case, metric, float(np.median(values)), units[metric], device)
        for (case, metric), values in samples.items()
    ]


class Clock:
    """Measures wall and CPU seconds since it was made. CPU time has a resolution of a microsecond.

    It includes the process's threads and its children that have ended.
    """

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _cpu_seconds()

    def read(self) -> tuple[float, float]:
        """Return wall and CPU seconds."""
        return time.perf_counter() - self._wall, _cpu_seconds() - self._cpu


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure_writes(cases: Sequence[Case], samples: Samples, rounds: int) -> None:
    """Write every case once uncounted and then `rounds` times; the files of the last round stay."""
    for number in range(rounds + 1):
        for case in cases:
            if case.root.exists():
                shutil.rmtree(case.root)
            clock = Clock()
            case.write()
            _add(samples, case, "write", clock, case.content.bytes, number)


def measure_reads(cases: Sequence[Case], windows: Sequence[Window], samples: Samples, rounds: int) -> None:
    """Read every open case, whole and in windows, once uncounted and then `rounds` times."""
    plain = next(case for case in cases if case.name == "raw-preadv")
    window_bytes = sum(sum(values.nbytes for values in expected_window(plain, window).values()) for window in windows)
    for number in range(rounds + 1):
        for case in cases:
            clock = Clock()
            _exhaust(case.read_all())
            _add(samples, case, "read", clock, case.content.bytes, number)
        for case in cases:
            clock = Clock()
            _exhaust(case.read_windows(windows))
            _add(samples, case, "window", clock, window_bytes, number)


def _add(samples: Samples, case: Case, doing: str, clock: Clock, size: int, number: int) -> None:
    wall, cpu = clock.read()
    if number:
        samples[case.name, f"{doing}_cpu_s_per_gb"].append(cpu / size * 1e9)
        samples[case.name, f"{doing}_gb_s"].append(size / wall / 1e9)


def _exhaust(items: Iterable[object]) -> None:
    for _ in items:
        pass


def measure_sizes(cases: Sequence[Case], samples: Samples) -> None:
    """Add the bytes per token of every case's files and, for our modes, how many times smaller than bf16 they are."""
    for case in cases:
        samples[case.name, "bytes_per_token"].append(case.bytes() / case.content.tokens)
    (plain,) = samples["ours-bf16", "bytes_per_token"]
    for case in cases:
        if isinstance(case, Ours):
            samples[case.name, "bf16_size_ratio"].append(plain / samples[case.name, "bytes_per_token"][0])


def measure_decoding(cases: Sequence[Case], samples: Samples, rounds: int) -> None:
    """Add the CPU time of reading with taps decoded on the CPU, and of zstd alone for mode lossless, from memory."""
    ours = [case for case in cases if isinstance(case, Ours)]
    lossless = next(case for case in ours if case.name == "ours-lossless")
    zstd = Zstd(level=1)
    planes = [
        zstd.encode(plane[first : first + CHUNK_ROWS])
        for number in range(len(lossless.content.conversations))
        for name, plane in lossless.expected(number).items()
        if name.endswith("_hi")
        for first in range(0, len(plane), CHUNK_ROWS)
    ]
    memory = np.ones(CHUNK_ROWS * lossless.content.hidden_size, np.uint8)
    for number in range(rounds + 1):
        for case in ours:
            clock = Clock()
            _exhaust(case.read_decoded())
            if number:
                samples[case.name, "decoded_cpu_s_per_gb"].append(clock.read()[1] / case.content.bytes * 1e9)
        clock = Clock()
        for plane in planes:
            zstd.decode(plane, memory)
        if number:
            samples[lossless.name, "decode_cpu_s_per_gb"].append(clock.read()[1] / lossless.content.bytes * 1e9)


def measure_opening(directory: Path, conversations: int, rounds: int, samples: Samples) -> None:
    """Add the time to open a set of tiny conversations until every length is known.

    Slow cases are opened in fewer rounds, and the slowest ones once. Raises StoreError for a wrong length.
    """
    content = generate_tiny(conversations)
    cases = make_cases(directory, content, durable=False)
    for case in cases:
        case.write()
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(rounds + 1):
        for case in cases:
            if sum(times[case.name]) > _OPEN_SECONDS:
                continue
            clock = Clock()
            lengths = case.open()
            times[case.name].append(clock.read()[0])
            if not np.array_equal(lengths, content.lengths(TOKENS_AXIS)):
                raise StoreError(f"{case.name}: expected the lengths that were written, found others")
            case.close()
    for name, seconds in times.items():
        samples[name, "open_30k_ms"] += [1000 * value for value in seconds[1:] or seconds]
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
