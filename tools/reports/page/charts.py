"""Charts as inline SVG. Colours are classes, so that the page's style decides them in light and in dark mode.

A chart is drawn for a width of about 360 pixels, that of a phone's page; on a wide page several stand side by side.
Series differ in colour and in dashes, so that no chart needs colours to be told apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from draftcache.tools.reports.page.scales import Scale, round_ticks, tick_labels

WIDTH, HEIGHT = 360, 210
COLOURS = 6
"""Colours of the page's style: s0 .. s5. Further series begin again, with other dashes."""
_POINTS = 90
"""Points of a line: more of them are averaged."""


@dataclass(frozen=True)
class Series:
    """One line: its name, colour number, and values y [N] at x [N], ascending. Without a colour it is a baseline's."""

    name: str
    colour: int | None
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False
    """Draw each point, for few of them."""


@dataclass(frozen=True)
class Estimate:
    """One row of an interval chart."""

    name: str
    colour: int | None
    """None draws in grey: a baseline."""
    value: float
    interval: Sequence[float] | None


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    from_zero: bool = False,
    band: bool = False,
    key: bool = False,
    points: int = _POINTS,
) -> Markup:
    """Return a chart of lines over shared axes, each of at most `points` points.

    With `band`, the 10th to 90th percentile of averaged points is shaded. With `key`, the names stand in the chart, in
    their colours. Values that are not finite are left out; a chart without any says so.
    """
    lines = [_averaged(item, points) for item in series]
    values = [value for line in lines for value in (*line.means, *(line.ends if band else ()))]
    if not values:
        return _frame(title, HEIGHT, [_text(WIDTH / 2, HEIGHT / 2, "no records yet", "axis", anchor="middle")])
    ticks = round_ticks(min([0.0, *values] if from_zero else values), max(values))
    xs = [place for line in lines for place in line.places]
    left = 14 + 6.2 * max(len(label) for label in tick_labels(ticks))
    x = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, left, WIDTH - 10)
    y = Scale(ticks[0], ticks[-1], HEIGHT - 34, 26)
    parts = [_text(4, 14, y_label, "axis"), *_grid(ticks, y, left), *_x_axis(x, min(xs), max(xs), x_label)]
    if band:
        parts += [_band(line, x, y) for line in lines if line.places]
    parts += [_line(line, x, y) for line in lines]
    parts += list(_key(series)) if key else []
    return _frame(title, HEIGHT, parts)


def interval_chart(
    title: str, rows: Sequence[Estimate], *, low: float, high: float, reference: float | None = None, digits: int = 3
) -> Markup:
    """Return a chart with a dot and its interval per row, its name at the left and its value at the right.

    All charts of one kind get the same `low` and `high`, so that they can be compared. `reference` is a dashed line.
    """
    ticks = round_ticks(low, high, 4)
    height = 30 + 22 * len(rows) + 18
    name_width = min(150.0, 12 + 6.4 * max((len(row.name) for row in rows), default=0))
    x = Scale(ticks[0], ticks[-1], name_width, WIDTH - 52)
    bottom = height - 22
    parts = [f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="8" y2="{bottom}"/>' for tick in ticks]
    parts += [
        _text(x(tick), height - 6, label, "axis", anchor="middle")
        for tick, label in zip(ticks, tick_labels(ticks), strict=True)
    ]
    if reference is not None:
        place = f"{x(reference):.1f}"
        parts.append(f'<line class="reference" x1="{place}" x2="{place}" y1="8" y2="{bottom}"/>')
    for number, row in enumerate(rows):
        parts += _estimate(row, 24 + 22 * number, x, digits)
    return _frame(title, height, parts)


def _estimate(row: Estimate, y: float, x: Scale, digits: int) -> list[str]:
    kind = _kind(row.colour)
    limit = 22
    name = row.name if len(row.name) <= limit else "…" + row.name[-limit + 1 :]
    parts = [_text(4, y + 4, name, "name")]
    if row.interval is not None:
        low, high = (x(min(max(end, x.low), x.high)) for end in row.interval)
        parts.append(f'<line class="whisker {kind}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>')
    parts.append(f'<circle class="dot {kind}" cx="{x(row.value):.1f}" cy="{y}" r="4"/>')
    parts.append(_text(WIDTH - 4, y + 4, f"{row.value:.{digits}f}", "value", anchor="end"))
    return parts


def _kind(colour: int | None) -> str:
    """Return the style class of a colour."""
    return "baseline" if colour is None else f"s{colour % COLOURS}"


@dataclass(frozen=True)
class _Averaged:
    """A series in groups of neighbouring points."""

    series: Series
    places: list[float]
    means: list[float]
    low: list[float]
    """10th percentiles; `high` are the 90th."""
    high: list[float]

    @property
    def ends(self) -> list[float]:
        return [*self.low, *self.high]


def _averaged(item: Series, points: int) -> _Averaged:
    x, y = np.array(item.x, np.float64), np.array(item.y, np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    groups = np.array_split(np.arange(x.size), min(points, x.size)) if x.size else []
    quantiles = [np.quantile(y[group], [0.1, 0.9]) for group in groups]
    return _Averaged(
        series=item,
        places=[float(x[group].mean()) for group in groups],
        means=[float(y[group].mean()) for group in groups],
        low=[float(low) for low, _ in quantiles],
        high=[float(high) for _, high in quantiles],
    )


def _line(line: _Averaged, x: Scale, y: Scale) -> str:
    item, dashed = line.series, ""
    kind, name = _kind(item.colour), escape(item.name)
    points = [(f"{x(place):.1f}", f"{y(mean):.1f}", mean) for place, mean in zip(line.places, line.means, strict=True)]
    parts = []
    if len(points) > 1:
        path = " ".join(f"{across},{down}" for across, down, _ in points)
        if item.colour is None or item.colour >= COLOURS:
            dashed = f" dash{0 if item.colour is None else min(2, item.colour // COLOURS)}"
        parts.append(f'<polyline class="line {kind}{dashed}" points="{path}"><title>{name}</title></polyline>')
    if item.marks or len(points) == 1:
        parts += [
            f'<circle class="dot {kind}" cx="{across}" cy="{down}" r="3"><title>{name}: {mean:.4g}</title></circle>'
            for across, down, mean in points
        ]
    return "".join(parts)


def _band(line: _Averaged, x: Scale, y: Scale) -> str:
    there = [f"{x(place):.1f},{y(value):.1f}" for place, value in zip(line.places, line.high, strict=True)]
    back = [f"{x(place):.1f},{y(value):.1f}" for place, value in zip(line.places, line.low, strict=True)][::-1]
    return f'<polygon class="band {_kind(line.series.colour)}" points="{" ".join(there + back)}"/>'


def _key(series: Sequence[Series]) -> Iterable[str]:
    """Yield the names at the upper right, in the lines' colours."""
    place = WIDTH - 10.0
    for item in reversed(series):
        yield _text(place, 14, item.name, f"key {_kind(item.colour)}", anchor="end")
        place -= 12 + 6.2 * len(item.name)


def _x_axis(x: Scale, low: float, high: float, label: str) -> Iterable[str]:
    ticks = [tick for tick in round_ticks(low, high, 4) if low <= tick <= high] or [low]
    for tick, text in zip(ticks, tick_labels(ticks), strict=True):
        half = 3.1 * len(text)
        yield _text(min(x(tick), WIDTH - 2 - half), HEIGHT - 20, text, "axis", anchor="middle")
    yield _text(WIDTH - 10, HEIGHT - 5, label, "axis", anchor="end")


def _grid(ticks: Sequence[float], y: Scale, left: float) -> Iterable[str]:
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        yield f'<line class="grid" x1="{left:.1f}" x2="{WIDTH - 10}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        yield _text(left - 6, y(tick) + 4, label, "axis", anchor="end")


def _text(x: float, y: float, text: str, kind: str, *, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _frame(title: str, height: float, parts: Iterable[str]) -> Markup:
    body = "".join(parts)
    return Markup(
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(title)}">{body}</svg></figure>'
    )
