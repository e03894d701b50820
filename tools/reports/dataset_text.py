"""What a prepared dataset holds, from its manifest alone: the tables that prepare and inspect print.

A dataset of an earlier draftcache lacks some of the figures; their tables are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from draftcache.tools.reports.accounting import accounting_table, coverage_text, curve_text
from draftcache.tools.reports.histogram import format_lengths
from draftcache.tools.reports.terminal_text import on_one_line, quoted

_FOUND_WIDTH = 60
_NOTE_WIDTH = 160


def format_dataset(manifest: Mapping[str, Any]) -> str:
    """Return the tables of a manifest: tokens, quarantine, duplicates, lengths, and what draft vocabularies cover."""
    lines = [
        f"vocabulary: {manifest['vocab_size']:,} ids, from {manifest['vocab_size_from']}",
        f"chat template: {manifest['chat_template']['source']}, {manifest['chat_template']['matched']}",
        *_template(manifest["chat_template"]),
        "",
        accounting_table(manifest),
    ]
    for name, record in manifest["splits"].items():
        lines += _quarantine(name, record)
    lines += _duplicates(manifest)
    lines += _notes(manifest.get("notes", []))
    for name, record in manifest["splits"].items():
        for label, key in (("conversations", "lengths"), ("answers", "answer_lengths")):
            if key in record:
                lines += ["", *format_lengths(f"{name}, {label}:", record[key])]
    if curve := curve_text(manifest.get("coverage_curve", [])):
        lines += ["", curve]
    vocabulary = manifest["draft_vocabulary"]
    if vocabulary is not None:
        coverage = coverage_text(vocabulary["coverage"], vocabulary["size"])
        lines += ["", f"draft vocabulary {vocabulary['hash']}", "", coverage]
    return "\n".join(lines)


def leakage_warnings(manifest: Mapping[str, Any]) -> list[str]:
    """Return a line for each held-out split that has rows of a split that is not held out: they would be learnt."""
    held_out = {name: record["held_out"] for name, record in manifest["splits"].items()}
    pairs = [(*pair["splits"], pair["rows"]) for pair in manifest.get("shared_rows", [])]
    return [
        f"warning: {rows:,} rows of {second} (held out) are also in {first}, so figures of {second} would be too good; "
        "prepare with --drop-duplicates, or take them out of one of the files"
        for first, second, rows in pairs
        if held_out[second] and not held_out[first]
    ]


def _quarantine(name: str, record: Mapping[str, Any]) -> list[str]:
    if "quarantine" not in record:
        return [f"{name}: {rows:,} x {reason}" for reason, rows in record["quarantined_by_reason"].items()]
    lines = []
    for reason, found in record["quarantine"].items():
        example = found["example"]
        lines.append(
            f"{name}: {found['rows']:,} x {reason} ({found['fraction']:.2%} of {record['read_rows']:,} rows), first "
            f"{on_one_line(example['file'])}:{example['line']}: found {quoted(example['found'], _FOUND_WIDTH)}"
        )
    return lines


def _duplicates(manifest: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{pair['splits'][1]}: {pair['rows']:,} rows that {pair['splits'][0]} has too"
        for pair in manifest.get("shared_rows", [])
    ]
    for name, record in manifest["splits"].items():
        lines += [
            f"{name}: {rows:,} duplicates dropped of rows of {origin}"
            for origin, rows in record.get("dropped_duplicates", {}).items()
        ]
    return lines


def _notes(notes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was noticed about rows that were kept: the count, the kind, and one example."""
    lines = [""] if notes else []
    for note in notes:
        lines += [f"{note['count']:,} x {on_one_line(note['kind'])}", f"    {quoted(note['example'], _NOTE_WIDTH)}"]
    return lines


def _template(template: Mapping[str, Any]) -> list[str]:
    """What the chat template was found to want, and how answers were found."""
    traits, settings = template.get("traits"), template.get("settings")
    if traits is None or settings is None:
        return []
    calls = {"object": "with arguments as objects", "text": "with arguments as JSON texts", None: "not rendered"}
    by = "the generation prompt" if settings["loss_mask"] == "prompt" else "generation tags"
    stops = ", ".join(map(on_one_line, template["stop_tokens"])) or "none is known"
    return [
        f"  system messages {'rendered' if traits['system'] else 'NOT rendered'}; developer messages "
        f"{'rendered' if traits['developer'] else 'as system messages'}; tool calls {calls[traits['arguments']]}; "
        f"reasoning {'under ' + traits['reasoning'] if traits['reasoning'] else 'not rendered'}",
        f"  answers by {by}, up to one of: {stops}; turns: {settings['turns']}"
        + ("" if traits["generation_prompt"] else "; the template has no generation prompt")
        + ("; earlier answers are rewritten by the template" if traits["rewrites_history"] else "")
        + (f"; today's date is {settings['date']}" if traits["reads_date"] else ""),
    ]
