"""Fills the page's templates. Jinja escapes every value that is no Markup, and only `charts` makes Markup."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import draftcache
from draftcache.tools.reports.acceptance_text import bucket_name, span
from draftcache.tools.reports.inspection import summarise
from draftcache.tools.reports.page import sections
from draftcache.tools.reports.page.charts import COLOURS
from draftcache.tools.reports.page.conversations import load_tokenizer, shown_conversations
from draftcache.tools.reports.page.evaluations import SplitFigures, paired, read_split_figures
from draftcache.tools.reports.page.inputs import Inputs, read_inputs
from draftcache.tools.reports.page.runs import Run

_TEMPLATES = Path(__file__).parent / "templates"
_PACKAGES = ("torch", "transformers", "numpy", "zarr", "tokenizers", "safetensors")


def report_page(places: Sequence[str], tokenizer: Path | None = None) -> str:
    """Return the page on runs, sweeps, stores and evaluations at these places, as HTML.

    Conversations are shown as text with the tokenizer in a directory, else as token ids. Raises what `read_inputs` and
    `read_split_figures` raise, and StoreError for a damaged store.
    """
    found = read_inputs(places)
    items = read_split_figures(found.evaluations, found.runs)
    drawn = sections.drawn_runs(found.runs, items)
    decoder = None if tokenizer is None else load_tokenizer(tokenizer)
    values = {
        "title": ", ".join([run.name for run in found.runs][:3]) or "draftcache",
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "places": [str(place) for place in places],
        "inputs": found,
        "cards": _cards(found, items),
        "sweep": sections.trial_section(found.runs, items) if found.sweeps else None,
        "names": _names(found.runs, items),
        "acceptance": sections.acceptance_charts(items),
        "acceptance_rows": sections.acceptance_rows(items),
        "pairs": paired(items),
        "tokens": sections.token_charts(items),
        "lengths": sections.length_tables(items),
        "drawn": [(run.name, number) for number, run in drawn],
        "training": sections.training_charts(drawn) if drawn else [],
        "stores": [summarise(place, allow_partial=True) for place in found.stores],
        "conversations": shown_conversations(items, decoder),
        "as_text": decoder is not None,
        "evaluations": items,
        "versions": _versions(),
        "style": (_TEMPLATES / "style.css").read_text(encoding="utf-8"),
    }
    return _environment().get_template("page.html").render(values)


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"span": span, "bucket": bucket_name, "bytes": _bytes, "signed": _signed, "kind": _kind}
    return made


def _cards(found: Inputs, items: Sequence[SplitFigures]) -> list[dict[str, str]]:
    """Return the figures at the top: the longest acceptance, and how many runs there are."""
    cards = []
    if items:
        best = max(items, key=lambda item: float(item.row["draft"]["acceptance_length"]))
        figures = best.row["draft"]
        note = f"{best.name} on {best.split}"
        if figures["interval"]:
            note += f", 95 % {span(figures['interval'])}"
        cards.append({"label": "Longest acceptance", "value": f"{figures['acceptance_length']:.3f}", "note": note})
    else:
        measured = [(run.best[1], run) for run in found.runs if run.best is not None]
        if measured:
            value, run = max(measured, key=lambda pair: pair[0])
            assert run.best is not None
            note = f"{run.name} at step {run.best[0]:,}, while training"
            cards.append({"label": "Longest acceptance", "value": f"{value:.3f}", "note": note})
    if found.runs:
        done = sum(run.finished for run in found.runs)
        cards.append({"label": "Runs", "value": str(len(found.runs)), "note": f"{done} finished"})
    return cards


def _names(runs: Sequence[Run], items: Sequence[SplitFigures]) -> list[tuple[str, int]]:
    """Return the names and colours of the legend."""
    names = {run.name: number for number, run in enumerate(runs)}
    return list((names | {item.name: item.colour for item in items}).items())


def _versions() -> dict[str, str]:
    found = {"draftcache": draftcache.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} TB"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _kind(colour: int | None) -> str:
    return "baseline" if colour is None else f"s{colour % COLOURS}"
