"""The figures of an evaluation as text: acceptance lengths with intervals, by length, and between drafts."""

from __future__ import annotations

from typing import Any

WIDE = 16


def format_evaluation(result: dict[str, Any]) -> str:
    """Format the figures of `draftcache.draft_train.evaluate.evaluate`, split by split."""
    lines = [f"{'split':<20} {'draft':>8} {'95% interval':>{WIDE}} {'untrained':>10} {'bigram':>8}  kind, conditional "]
    lines[0] += "acceptance per draft token"
    for split, row in result["splits"].items():
        bigram = f"{row['bigram']['acceptance_length']:.3f}" if "bigram" in row else "-"
        steps = " ".join(f"{value:.2f}" for value in row["draft"]["conditional_acceptance"])
        lines.append(
            f"{split:<20} {row['draft']['acceptance_length']:>8.3f} {span(row['draft']['interval']):>{WIDE}} "
            f"{row['untrained']['acceptance_length']:>10.3f} {bigram:>8}  {row['draft']['kind']}: {steps}"
        )
    lines.append(
        f"intervals: over conversations, {result['resamples']:,} draws with replacement, seed {result['seed']}"
    )
    for split, row in result["splits"].items():
        lines += _by_length(split, row["draft"], result["longest_in_training_store"])
    for split, row in result["splits"].items():
        lines += _differences(split, row)
        lines += _sampled(split, row)
    if "online" in result:
        lines += ["", _online(result["online"])]
    if "engine" in result:
        lines += ["", _engine(result["engine"])]
    return "\n".join(lines)


def bucket_name(row: dict[str, Any]) -> str:
    """Return the name of a bucket, such as `16k-32k`, or `64k and more`."""
    if row["to"] is None:
        return "all" if row["from"] == 0 else f"{_tokens(row['from'])} and more"
    return f"{_tokens(row['from'])}-{_tokens(row['to'])}"


def _tokens(number: int) -> str:
    return f"{number // 1024}k" if number and number % 1024 == 0 else str(number)


def span(ends: list[float] | None, digits: int = 3) -> str:
    """Return an interval as text; `-` where there is none."""
    return "-" if ends is None else f"{ends[0]:.{digits}f} .. {ends[1]:.{digits}f}"


def _by_length(split: str, figures: dict[str, Any], trained: int) -> list[str]:
    """Return the tables by position and by length, where there is more than one bucket."""
    lines = []
    for axis, title in (("by_position", "position"), ("by_length", "conversation length")):
        rows = figures[axis]
        if len(rows) < 2:
            continue
        lines += [
            "",
            f"{split}, by {title}" + (f" (longest conversation of its training store: {trained:,})" if trained else ""),
        ]
        lines.append(
            f"{'tokens':<16} {'conversations':>14} {'verify steps':>13} {'acceptance':>11} {'95% interval':>{WIDE}} "
            f"{'gap to the shortest':>20} {'95% interval':>{WIDE + 4}}"
        )
        for row in rows:
            gap = "-" if row["gap"] is None else f"{row['gap']:+.1%}"
            ends = "-" if row["gap_interval"] is None else " .. ".join(f"{end:+.1%}" for end in row["gap_interval"])
            lines.append(
                f"{bucket_name(row):<16} {row['conversations']:>14,} {row['verify_steps']:>13,} "
                f"{row['acceptance_length']:>11.3f} {span(row['interval']):>{WIDE}} {gap:>20} {ends:>{WIDE + 4}}"
            )
    return lines


def _differences(split: str, row: dict[str, Any]) -> list[str]:
    lines = []
    for item in row.get("differences", []):
        other = row["compared"][item["minus"]]["acceptance_length"]
        lines += [
            "",
            f"{split}: this draft minus {item['minus']} ({other:.3f}): {item['difference']:+.3f} tokens per verify "
            f"step, 95% interval {_signed(item['interval'])}, in pairs of the same conversation",
        ]
        for axis, title in (("by_position", "position"), ("by_length", "length")):
            if len(item[axis]) > 1:
                lines += [
                    f"  {title} {bucket_name(part)}: {part['difference']:+.3f}, {_signed(part['interval'])}"
                    for part in item[axis]
                ]
    return lines


def _signed(ends: list[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:+.3f} .. {ends[1]:+.3f}"


def _sampled(split: str, row: dict[str, Any]) -> list[str]:
    drafts = {"this draft": row["draft"], **row.get("compared", {})}
    return [
        f"{split}: {name} under speculative sampling at T = {figures['sampled']['temperature']:g}: acceptance between "
        f"{span(figures['sampled']['acceptance_length']).replace(' .. ', ' and ')} (what the stored teacher leaves "
        f"open; with conversations drawn again {span(figures['sampled']['interval'])}); draft token by draft token "
        + " ".join(f"{low:.3f}..{high:.3f}" for low, high in figures["sampled"]["overlap"])
        for name, figures in drafts.items()
        if "sampled" in figures
    ]


def _online(found: dict[str, Any]) -> str:
    return (
        f"real speculative decoding: text equal to plain decoding: {'yes' if found['text_equal'] else 'NO'}; verify "
        f"steps offline {found['offline_verify_steps']:,}, online {found['online_verify_steps']:,} for "
        f"{found['tokens']:,} tokens of {found['traces']} prompts: {'equal' if found['steps_equal'] else 'NOT EQUAL'}"
    )


def _engine(found: dict[str, Any]) -> str:
    verdict = {True: "equal within 1 %", False: "NOT EQUAL", None: "nothing to compare"}[found["steps_equal"]]
    text = (
        f"{found['engine']} {found['version']}, {found['model']}: the store's text on "
        f"{found['conversations_of_equal_text']} of {found['conversations']} conversations; verify steps offline "
        f"{found['offline_verify_steps']:,}, engine {found['engine_verify_steps']:,} for {found['tokens']:,} tokens, "
        f"acceptance {found['offline_acceptance_length']:.3f} and {found['engine_acceptance_length']:.3f}: {verdict}"
    )
    if found["engine_accepted_by_position"]:
        accepted = found["engine_accepted_by_position"]
        text += f"; it accepted {sum(accepted):,} of {found['engine_drafted']:,} draft tokens, by position "
        text += " ".join(f"{count:,}" for count in accepted)
    return text
