"""`draftcache eval`: the offline acceptance length of a draft, on a store, beside baselines and other drafts."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from draftcache.tools.arguments import finite_number
from draftcache.tools.results import add_json, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the evaluation's flags."""
    parser.add_argument("--store", required=True, help="store to evaluate on")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="checkpoint, or a training --output (its newest)"
    )
    parser.add_argument("--splits", required=True, help="splits to evaluate, comma-separated")
    parser.add_argument("--draft-tokens", type=int, default=5, help="tokens proposed per verify step (default: 5)")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="OTHER",
        help="also report the paired difference to other drafts: checkpoints, or --output files of the same evaluation",
    )
    parser.add_argument(
        "--length-buckets",
        default="16384,32768,65536",
        help="tokens that separate the buckets of positions and of conversation lengths (default: 16384,32768,65536)",
    )
    parser.add_argument(
        "--temperature",
        type=finite_number,
        help="also bound the acceptance under speculative sampling at this temperature (reads the stored teacher)",
    )
    parser.add_argument(
        "--resamples",
        type=int,
        default=2000,
        help="draws of conversations behind each 95%% interval (default: 2000)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of these draws (default: 0)")
    parser.add_argument(
        "--bigram-splits",
        help="also measure a table of each token's most frequent successor in these splits, comma-separated (default "
        "with --bigram-store: the splits that the checkpoint was trained on)",
    )
    parser.add_argument("--bigram-store", help="store of --bigram-splits (default: --store)")
    parser.add_argument(
        "--compute",
        default="auto",
        help="fused (the kernels of training, in bfloat16), plain (float32), or auto (fused on a GPU where it can run)",
    )
    parser.add_argument("--device", default="auto", help="cuda, cuda:N, cpu, or auto")
    parser.add_argument(
        "--output", type=Path, help="also write the figures, with those of every conversation, to this JSON file"
    )
    parser.add_argument(
        "--show-conversations",
        type=int,
        default=3,
        metavar="N",
        help="with --output: keep the N best and worst conversations token by token, for reports (default: 3)",
    )
    _add_online(parser)
    add_json(parser)


def _add_online(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("check against real speculative decoding")
    group.add_argument(
        "--online",
        action="store_true",
        help="also decode some prompts of the splits speculatively with --verifier in float32; ends with exit code 1 "
        "unless the text is plain decoding's and the verify steps are those counted offline",
    )
    group.add_argument("--verifier", type=Path, help="with --online: directory of the store's verifier")
    group.add_argument("--online-prompts", type=int, default=8, help="prompts, the shortest (default: 8)")
    group.add_argument("--online-tokens", type=int, default=64, help="tokens of each answer at most (default: 64)")
    group = parser.add_argument_group("check against a running engine")
    group.add_argument(
        "--engine",
        metavar="URL",
        help="also ask a running vLLM or SGLang with this draft for the turns of some conversations, greedily, and "
        "compare its count of verify steps where its text is the store's; ends with exit code 1 if they differ by more "
        "than 1 %%, or if no text is equal",
    )
    group.add_argument(
        "--engine-conversations", type=int, default=32, metavar="N", help="conversations, the shortest (default: 32)"
    )


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError for settings that are out of range, before anything is read."""
    from draftcache.draft_train.by_length import require_edges

    _require_online(arguments)
    _require_engine(arguments)
    require_edges(_edges(arguments.length_buckets))


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print the figures per split. Returns 0, or 1 where --online or --engine found a difference."""
    from draftcache.draft_train.evaluate import evaluate
    from draftcache.store.common.files import write_json

    check(arguments)
    if arguments.online:
        from draftcache.store.reader import StoreReader
        from draftcache.tools.truth import require_online

        require_online(StoreReader(arguments.store), arguments.verifier, arguments.checkpoint)
    asked = _ask_engine(arguments) if arguments.engine else None
    result = evaluate(
        store=arguments.store,
        checkpoint=arguments.checkpoint,
        splits=arguments.splits.split(","),
        draft_tokens=arguments.draft_tokens,
        bigram_store=arguments.bigram_store,
        bigram_splits=arguments.bigram_splits.split(",") if arguments.bigram_splits else None,
        compare=arguments.compare,
        length_buckets=_edges(arguments.length_buckets),
        temperature=arguments.temperature,
        resamples=arguments.resamples,
        seed=arguments.seed,
        show_conversations=arguments.show_conversations if arguments.output is not None else 0,
        device=arguments.device,
        compute=arguments.compute,
        progress=True,
    )
    if arguments.online:
        result["online"] = _online(arguments)
    if asked is not None:
        from draftcache.tools.engine_count import engine_result

        result["engine"] = engine_result(*asked, result, arguments.draft_tokens)
    if arguments.output is not None:
        write_json(arguments.output, result)
    shown = {name: value for name, value in result.items() if name not in ("kind", "conversations")}
    for row in shown["splits"].values():
        row.pop("examples", None)
    from draftcache.tools.reports.acceptance_text import format_evaluation

    show(arguments, shown, format_evaluation(result))
    online, engine = result.get("online"), result.get("engine")
    equal = online is None or (online["text_equal"] and online["steps_equal"])
    return 0 if equal and (engine is None or engine["steps_equal"]) else 1


def _require_online(arguments: argparse.Namespace) -> None:
    """Raise InputError where --online lacks what it needs, before anything is measured."""
    from draftcache.store.common.errors import InputError

    if arguments.online != (arguments.verifier is not None):
        raise InputError("expected --online and --verifier together, found one of them")
    for flag in ("online_prompts", "online_tokens"):
        if getattr(arguments, flag) < 2:
            raise InputError(f"--{flag.replace('_', '-')}: expected at least 2, found {getattr(arguments, flag)}")
    if arguments.show_conversations < 0:
        raise InputError(f"--show-conversations: expected 0 or more, found {arguments.show_conversations}")


def _require_engine(arguments: argparse.Namespace) -> None:
    from draftcache.store.common.errors import InputError

    if arguments.engine_conversations < 1:
        raise InputError(f"--engine-conversations: expected at least 1, found {arguments.engine_conversations}")


def _ask_engine(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the engine and its answers. What the store or the checkpoint lacks is told before it is asked."""
    from draftcache.draft_train.checkpoint import load_state, resolve_checkpoint
    from draftcache.draft_train.fit import require_fit
    from draftcache.store.reader import StoreReader
    from draftcache.tools.engine_count import engine_answers
    from draftcache.tools.running_engine import RunningEngine

    store = StoreReader(arguments.store)
    require_fit(arguments.checkpoint, load_state(resolve_checkpoint(arguments.checkpoint)), store)
    with RunningEngine(arguments.engine) as engine:
        return engine, engine_answers(
            engine,
            store,
            arguments.splits.split(","),
            most=arguments.engine_conversations,
            draft_tokens=arguments.draft_tokens,
        )


def _edges(text: str) -> list[int]:
    from draftcache.store.common.errors import InputError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError as exc:
        raise InputError(f"--length-buckets: expected numbers of tokens, comma-separated, found {text!r}") from exc


def _online(arguments: argparse.Namespace) -> dict[str, Any]:
    from draftcache.store.common.device import use_device
    from draftcache.tools.truth import online_check

    with tempfile.TemporaryDirectory(prefix="draftcache-online-") as directory:
        return online_check(
            store=arguments.store,
            verifier_path=arguments.verifier,
            checkpoint=arguments.checkpoint,
            splits=arguments.splits.split(","),
            prompts=arguments.online_prompts,
            max_new_tokens=arguments.online_tokens,
            draft_tokens=arguments.draft_tokens,
            directory=Path(directory),
            device=use_device(arguments.device),
        ).to_json()
