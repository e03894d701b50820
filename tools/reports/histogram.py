"""Lengths as a small histogram of text."""

from __future__ import annotations

from typing import Any

_BAR = 40


def format_lengths(label: str, lengths: dict[str, Any]) -> list[str]:
    """Return the lines for lengths in tokens, as `draftcache.store.common.length_counts` describes them."""
    if not lengths["bins"]:
        return [f"{label:<11} none"]
    most = max(item["count"] for item in lengths["bins"])
    return [
        f"{label:<11} min {lengths['min']:,}, mean {lengths['mean']:,.0f}, p50 {lengths['p50']:,.0f}, "
        f"p90 {lengths['p90']:,.0f}, max {lengths['max']:,} tokens",
        *(
            f"  {item['from']:>9,} .. {item['to'] - 1:<9,} {item['count']:>9,} "
            f"{'#' * (-(-item['count'] * _BAR // most))}"
            for item in lengths["bins"]
        ),
    ]
