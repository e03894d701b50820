"""The ablations: each a function that trains its drafts and returns their figures by case, in the order of seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftcache.capture.prepare.token_dataset import TokenDataset
from draftcache.draft_train.data.loss_rows import left_out_pairs
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import atomic_path, read_json
from draftcache.store.reader import StoreReader
from draftcache.tools.bench.parts.ablation_bench import Bench

WINDOWS = (64, 128, 256, 512, 0)
MODES = ("lossless", "bf16", "int8", "fp8")
TOP_KS = (8, 16, 32, 64, 128, 256)
LOSSES = ("tail-kl", "renormalized-kl")
UNROLLS = (1, 2, 3, 4, 5, 6)
LOSS_ROWS = ("turns", "unshifted")
ORDERS = ("shuffle", "bucketed")
TURNS = ("all", "each", "last")

Trials = Mapping[str, Sequence[dict[str, Any]]]
"""By case, the trial of each seed: `acceptance_length` in tokens per verify step, and `steps`, its optimizer steps."""


@dataclass(frozen=True)
class Family:
    """One ablation."""

    measure: Callable[[Bench], Trials]
    reference: str
    """The case that the others are compared with in pairs."""
    trials: int
    """Drafts that are trained per seed."""


def window(bench: Bench) -> Trials:
    """Attention windows of the draft, each also the one that it is evaluated with."""
    found = bench.by_seed(lambda seed: bench.swept("window", seed, bench.store(), {"sliding_window": WINDOWS}))
    return _cases(found, lambda trial: f"window={trial['axes']['sliding_window'] or 'full'}")


def mode(bench: Bench) -> Trials:
    """Modes of the stored taps. Every draft is evaluated on the lossless states, as a served draft reads those.

    The acceptance lengths are the evaluation's, of all drafts on the same batches.
    """

    def trained(seed: int, name: str) -> dict[str, Any]:
        (trial,) = bench.swept(f"mode-{name}", seed, bench.store(name))
        return trial | {"mode": name}

    calls = [lambda seed=seed, name=name: trained(seed, name) for seed in range(bench.setup.seeds) for name in MODES]
    trials = bench.together(calls)
    lengths = bench.compared("mode", bench.store(), [trial["run"] for trial in trials])
    for trial, length in zip(trials, lengths, strict=True):
        trial["acceptance_length"] = length
    return _cases([trials], lambda trial: f"mode={trial['mode']}")


def top_k(bench: Bench) -> Trials:
    """Stored teacher entries, with a tail bucket and renormalised, and the exact distribution from stored states."""

    def trained(seed: int) -> list[dict[str, Any]]:
        axes = {"top_k": TOP_KS, "loss": LOSSES}
        calls = [
            lambda: bench.swept("top-k-exact", seed, bench.store(teacher="hidden"), top_k=0),
            lambda: bench.swept("top-k", seed, bench.store(), axes),
        ]
        return [trial for trials in bench.together(calls) for trial in trials]

    def case(trial: Mapping[str, Any]) -> str:
        axes = trial["axes"]
        return f"top-k={axes['top_k']},loss={axes['loss']}" if "top_k" in axes else "top-k=exact"

    return _cases(bench.by_seed(trained), case)


def unroll(bench: Bench) -> Trials:
    """Training-time-test steps. Every draft is evaluated with five draft tokens."""
    found = bench.by_seed(lambda seed: bench.swept("unroll", seed, bench.store(), {"ttt_steps": UNROLLS}))
    return _cases(found, lambda trial: f"unroll={trial['axes']['ttt_steps']}")


def loss_rows(bench: Bench) -> Trials:
    """Which rows carry loss. Of the rule `unshifted` a store lacks the pairs past each turn's end."""
    found = bench.by_seed(lambda seed: bench.swept("loss-rows", seed, bench.store(), {"loss_rows": LOSS_ROWS}))
    return _cases(found, lambda trial: f"loss-rows={trial['axes']['loss_rows']}")


def pairs_without_teacher(bench: Bench) -> float:
    """Return the share of the pairs of `unshifted` that the training split's store has no teacher for."""
    reader = StoreReader(bench.store())
    left_out, wanted = left_out_pairs(reader, reader.members(bench.setup.train_split), bench.setup.train["ttt_steps"])
    return left_out / wanted


def order(bench: Bench) -> Trials:
    """Order of conversations in a second stage, both from the checkpoint of the seed's own first stage.

    The second stage's learning rate is half of the first's.
    """
    setup = bench.setup

    def trained(seed: int) -> list[dict[str, Any]]:
        first: dict[str, Any] = {"splits": [setup.first_split], "data_share": setup.first_share}
        (start,) = bench.swept("order-first", seed, bench.store(), **first)
        second: dict[str, Any] = {
            "init_from": str(start["run"].absolute()),
            "learning_rate": setup.train["learning_rate"] / 2,
        }
        return bench.swept("order", seed, bench.store(), {"order": ORDERS}, **second)

    return _cases(bench.by_seed(trained), lambda trial: f"order={trial['axes']['order']}")


def turns(bench: Bench) -> Trials:
    """Which answers of a conversation carry loss, on one held-out split.

    `each` makes a row of every answer, so a step has as many times more rows as its dataset has: all three train for
    one number of epochs and, but for rounding, of steps. `last` has fewer tokens with loss.
    """
    inputs = bench.setup.turns_inputs
    if set(inputs) != {"train", "eval"}:
        raise InputError(
            f"--turns-input: expected train=FILE and eval=FILE for the family turns, found {sorted(inputs)}; leave the "
            "family out with --only, or name both"
        )
    rows = _held_out_rows(bench)

    def store(name: str) -> Path:
        dataset = bench.once(f"turns-{name}", lambda: _prepared(bench, name, f"train={inputs['train']}", rows))
        return bench.captured(f"turns-{name}", dataset, ("train", "eval"))

    def trained(seed: int, name: str) -> dict[str, Any]:
        counts = [StoreReader(store(of)).members("train").size for of in (name, "all")]
        batch = max(1, round(bench.setup.train["batch_conversations"] * counts[0] / counts[1]))
        settings = {"splits": ["train"], "eval_split": "eval", "batch_conversations": batch}
        (trial,) = bench.swept(f"turns-{name}", seed, store(name), **settings)
        return trial | {"turns": name}

    calls = [lambda seed=seed, name=name: trained(seed, name) for seed in range(bench.setup.seeds) for name in TURNS]
    return _cases([bench.together(calls)], lambda trial: f"turns={trial['turns']}")


def _held_out_rows(bench: Bench) -> Path:
    """Return a file of the held-out conversations as token ids and masks, for all three datasets to hold the same."""
    dataset = _prepared(bench, "auto", f"eval={bench.setup.turns_inputs['eval']}", None)
    split = TokenDataset.open(dataset).split("eval")
    output = bench.setup.work / "turns" / "eval.jsonl"
    with atomic_path(output) as partial, partial.open("w", encoding="utf-8") as file:
        for number in range(len(split)):
            ids, mask, _ = split[number]
            file.write(json.dumps({"token_ids": ids.tolist(), "loss_mask": mask.astype(int).tolist()}) + "\n")
    return output


def _prepared(bench: Bench, name: str, split: str, held_out: Path | None) -> Path:
    output = bench.setup.work / "turns" / name
    longest = read_json(bench.setup.dataset / "manifest.json")["max_length"]
    words = ["--tokenizer", bench.setup.verifier, "--max-length", longest, "--turns", name, "--workers", 1]
    words += [] if held_out is None else ["--held-out", f"eval={held_out}"]
    bench.jobs.run(f"prepare-{name}", bench.priority, "prepare", split, *words, "--output", output)
    return output


def _cases(found: Sequence[Sequence[dict[str, Any]]], case: Callable[[Mapping[str, Any]], str]) -> Trials:
    """Return all trials by case; those of one case stay in their order, which is that of the seeds."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for trials in found:
        for trial in trials:
            cases.setdefault(case(trial), []).append(trial)
    return cases


FAMILIES = {
    "window": Family(window, "window=full", len(WINDOWS)),
    "mode": Family(mode, "mode=lossless", len(MODES)),
    "loss-rows": Family(loss_rows, "loss-rows=turns", len(LOSS_ROWS)),
    "order": Family(order, "order=shuffle", 1 + len(ORDERS)),
    "turns": Family(turns, "turns=all", len(TURNS)),
    "unroll": Family(unroll, f"unroll={UNROLLS[-1]}", len(UNROLLS)),
    "top-k": Family(top_k, "top-k=exact", 1 + len(TOP_KS) * len(LOSSES)),
}
"""All families by name, in the order in which their commands take their turns."""
