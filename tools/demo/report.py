"""The demo's summary as JSON values, and its table."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from draftcache.store.reader import StoreReader
from draftcache.tools.truth import TruthResult


def peak_memory_gib() -> dict[str, float]:
    """Return the peak memory so far of this process and of the largest one that it started, in GiB."""
    whose = {"main process": resource.RUSAGE_SELF, "largest worker": resource.RUSAGE_CHILDREN}
    return {name: round(resource.getrusage(who).ru_maxrss / 2**20, 2) for name, who in whose.items()}  # in KiB on Linux


def store_totals(path: Path) -> dict[str, float]:
    """Return the `tokens`, `bytes` and teacher `positions` of one store, and the `tail` mass summed over positions."""
    store = StoreReader(path)
    tails = [record["tail_mass"] for record in store.records()]
    return {
        "tokens": float(store.index["tokens"].sum()),
        "bytes": float(store.bytes_on_disk()),
        "positions": float(sum(tail["count"] for tail in tails)),
        "tail": sum(tail["count"] * tail.get("mean", 0.0) for tail in tails),
    }


def summarize(stores: list[Path], evaluations: dict[str, dict[str, Any]], truth: TruthResult) -> dict[str, Any]:
    """Return the content of summary.json without timings, as JSON values.

    It has the stores' totals; `acceptance_length` by stage and split; by split, for stage 2, the baselines,
    `conditional_acceptance`, `greedy_agreement` and `kind`; and the result of the truth check. `evaluations` holds
    {stage: {split: figures of the draft, the untrained draft and the bigram baseline}}.
    """
    totals = [store_totals(path) for path in stores]
    total = {name: sum(part[name] for part in totals) for name in totals[0]}
    last = evaluations["stage2"]
    return {
        "tokens": int(total["tokens"]),
        "bytes_per_token": round(total["bytes"] / total["tokens"], 1),
        "tail_mass_mean": total["tail"] / total["positions"],
        "acceptance_length": {
            stage: {split: round(row["draft"]["acceptance_length"], 4) for split, row in splits.items()}
            for stage, splits in evaluations.items()
        },
        "conditional_acceptance": {split: row["draft"]["conditional_acceptance"] for split, row in last.items()},
        "baseline_untrained": {split: round(row["untrained"]["acceptance_length"], 4) for split, row in last.items()},
        "baseline_bigram": {split: round(row["bigram"]["acceptance_length"], 4) for split, row in last.items()},
        "greedy_agreement": {split: round(row["draft"]["greedy_agreement"], 5) for split, row in last.items()},
        "kind": {split: row["draft"]["kind"] for split, row in last.items()},
        "draft_tokens": next(iter(last.values()))["draft"]["draft_tokens"],
        "speculative_decode_lossless": truth.lossless,
        "offline_equals_online": truth.offline_equals_online,
        "truth": {
            "traces": truth.traces,
            "tokens": truth.tokens,
            "offline_verify_steps": truth.offline_steps,
            "online_verify_steps": truth.online_steps,
        },
    }


def format_summary(summary: dict[str, Any]) -> str:
    """Return the table that the demo prints last."""
    stages = summary["acceptance_length"]
    lines = [
        f"{summary['tokens']:,} tokens stored, {summary['bytes_per_token']:,.0f} bytes/token, "
        f"mean tail mass {summary['tail_mass_mean']:.4f}",
        "",
        f"acceptance length, {summary['draft_tokens']} draft tokens",
        f"{'split':<12} {'untrained':>10} {'bigram':>8} {'stage 1':>8} {'stage 2':>8}  kind",
    ]
    for split, kind in summary["kind"].items():
        lines.append(
            f"{split:<12} {summary['baseline_untrained'][split]:>10.3f} {summary['baseline_bigram'][split]:>8.3f} "
            f"{stages['stage1'][split]:>8.3f} {stages['stage2'][split]:>8.3f}  {kind}"
        )
    truth = summary["truth"]
    lines += [
        "",
        f"speculative decoding: text equal to plain greedy: {summary['speculative_decode_lossless']}; "
        f"verify steps offline {truth['offline_verify_steps']}, online {truth['online_verify_steps']} "
        f"for {truth['tokens']} tokens",
    ]
    return "\n".join(lines)
