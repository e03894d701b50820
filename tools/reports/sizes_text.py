"""The text that `draftcache size` prints about a store."""

from __future__ import annotations

from typing import Any

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


def format_sizes(found: dict[str, Any]) -> str:
    """Format what `draftcache.tools.commands.size.size` returns."""
    counts, settings, compute = found["counts"], found["settings"], found["compute"]
    spec_forge = found["peers"]["SpecForge"]["bytes"]
    saved = 1 - counts["rows"] / counts["tokens"]
    lines = [
        f"{counts['conversations']:,} conversations, {counts['tokens']:,} tokens, "
        f"{counts['loss_tokens'] / counts['tokens']:.1%} with loss, {counts['rows']:,} rows ({saved:.1%} saved by "
        f"window {settings['window'] or 'none'}), {counts['teacher_positions']:,} teacher positions",
        f"counts: {counts['basis']}",
        f"{settings['layout']}, {counts['shards']:,} shards, taps {settings['layers']} of hidden size "
        f"{settings['hidden_size']}, teacher {_format_teacher(settings)}",
        _format_compute(compute),
        "",
        f"{'':<12} {'B/token':>10} {'total':>12} {'SpecForge /':>12} {'writing':>10} {'wall':>10}  limit",
    ]
    for mode, row in found["modes"].items():
        wall = "?" if row["wall_seconds"] is None else duration(row["wall_seconds"])
        lines.append(
            f"{mode:<12} {row['bytes_per_token']:>10,.0f} {byte_text(row['bytes']):>12} "
            f"{spec_forge / row['bytes']:>11.2f}x {duration(row['write_seconds']):>10} {wall:>10}  "
            f"{row['limit'] or '?'}"
        )
    for name, row in found["peers"].items():
        write = duration(row["bytes"] / settings["disk_gb_s"] / 1e9)
        lines.append(
            f"{name:<12} {row['bytes_per_token']:>10,.0f} {byte_text(row['bytes']):>12} "
            f"{spec_forge / row['bytes']:>11.2f}x {write:>10}"
        )
    frozen = found["frozen_bytes"]
    lines += [
        "",
        (
            f"Totals hold {byte_text(frozen)} of frozen weights."
            if frozen
            else "Totals are without frozen weights: no --verifier, so the vocabulary's size is not known."
        )
        + f" Writing at {settings['disk_gb_s']:g} GB/s beside compute: wall is the larger of the two. Peers (formulas "
        "of their formats): the last state instead of top-k, every row, no compression.",
    ]
    return "\n".join(lines)


def _format_teacher(settings: dict[str, Any]) -> str:
    vocabs = ", ".join(f"{size:,}" for size in (settings["draft_vocab_size"], *settings["more_vocab_sizes"]))
    kept = f"top-{settings['top_k']}" if settings["top_k"] else "final-norm states"
    return f"{settings['teacher']}: {kept}, draft vocabulary of {vocabs}"


def _format_compute(compute: dict[str, Any] | None) -> str:
    if compute is None:
        return "compute: not known without a --verifier of a kind whose FLOPs we count; give --tokens-per-second"
    floor = f", floor {duration(compute['floor_seconds'])}" if "floor_seconds" in compute else ""
    return (
        f"compute: {duration(compute['seconds'])} at {compute['tokens_per_second']:,.0f} tok/s{floor}; "
        f"{compute['basis']}"
    )


def duration(seconds: float) -> str:
    """Format seconds in the largest unit (d, h, min, s) that gives at least 1."""
    for size_s, unit in _UNITS:
        if seconds >= size_s:
            return f"{seconds / size_s:.1f} {unit}"
    return f"{seconds:.1f} s"


def byte_text(size_bytes: float) -> str:
    """Format bytes in decimal units: 1 kB is 1000 B."""
    for size_b, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= size_b:
            return f"{size_bytes / size_b:.2f} {unit}"
    return f"{size_bytes:.0f} B"
