"""The tables that prepare prints: what became of every token, and what the draft vocabulary covers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_SPLIT_ROWS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("Rows / conversations", lambda r: f"{r['rows']:,}"),
    ("Rows quarantined", lambda r: f"{r['quarantined_rows']:,}"),
    ("Exact duplicates (kept)", lambda r: f"{r['duplicate_rows']:,}"),
    ("Exact duplicates (dropped)", lambda r: f"{sum(r.get('dropped_duplicates', {}).values()):,}"),
    ("Untruncated total tokens (1)", lambda r: f"{r['untruncated_tokens']:,}"),
    ("Truncated total tokens (2)", lambda r: f"{r['tokens']:,}"),
    ("Rows truncated", lambda r: f"{r['truncated_rows']:,}"),
    ("Truncation loss, (1) - (2)", lambda r: _share(r["truncation_loss_tokens"], r["untruncated_tokens"])),
    ("Loss-masked tokens (3)", lambda r: f"{r['loss_tokens']:,}"),
    ("Loss-mask fraction of (2)", lambda r: f"{r['loss_fraction']:.1%}"),
    ("Avg untruncated tok/row", lambda r: f"{r['average_untruncated_tokens']:,.0f}"),
    ("Avg truncated tok/row", lambda r: f"{r['average_tokens']:,.0f}"),
    ("Avg loss-masked tok/row", lambda r: f"{r['average_loss_tokens']:,.0f}"),
    ("Input size on disk", lambda r: f"{sum(s['bytes'] for s in r['sources']) / 2**20:,.1f} MiB"),
]


def accounting_table(manifest: Mapping[str, Any]) -> str:
    """Return a table with one column per split of a prepared dataset's manifest."""
    splits = manifest["splits"]
    header = [f"Metric (max_length {manifest['max_length']:,})"]
    header += [f"{name} (held out)" if record["held_out"] else name for name, record in splits.items()]
    return text_table(header, [[label, *(value(record) for record in splits.values())] for label, value in _SPLIT_ROWS])


def coverage_text(coverage: Sequence[Mapping[str, Any]], size: int) -> str:
    """Return a table of `Coverage.as_json` records: one row per input, then their union, then the held-out inputs.

    `size` is the number of ids in the draft vocabulary.
    """
    header = ["Input", "Loss-masked tokens", "Unique ids", f"Coverage by top {size:,}"]
    header += ["Tokens lost", "Unique in vocab"]
    rows = [
        [
            row["name"],
            f"{row['loss_tokens']:,}",
            f"{row['unique_ids']:,}",
            f"{row['fraction']:.4%}",
            _share(row["lost_tokens"], row["loss_tokens"]),
            f"{row['covered_ids']:,} / {row['unique_ids']:,} ({row['covered_ids'] / max(row['unique_ids'], 1):.2%})",
        ]
        for row in coverage
    ]
    return text_table(header, rows)


def curve_text(curve: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of `coverage_curve`: one row per input, one column per size; "" where there is no size."""
    if not curve or not curve[0]["points"]:
        return ""
    header = ["Loss-masked tokens covered by top", *(f"{point['size']:,}" for point in curve[0]["points"])]
    return text_table(
        header, [[row["name"], *(f"{point['fraction']:.4%}" for point in row["points"])] for row in curve]
    )


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, padded so that it reads well in a terminal: first column left, the others right."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole if whole else 0:.2%})"
