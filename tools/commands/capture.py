"""`draftcache capture`: run the frozen verifier over a prepared dataset and write a store."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from draftcache.capture.engine.config import DEFAULT_URL, EngineConfig
from draftcache.capture.job.config import CaptureConfig
from draftcache.store.common.errors import InputError
from draftcache.tools.arguments import add_settings, read_settings, refuse_renamed
from draftcache.tools.results import add_json, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag per field of CaptureConfig, and those of a running engine."""
    add_settings(parser, CaptureConfig)
    _add_engine(parser)
    add_json(parser)
    refuse_renamed(parser, {"--shard": "--tensor-parallel"})


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        default="",
        metavar="URL",
        help="have a running vLLM compute the states, which extracts them to files that this machine sees too; vllm "
        f"stands for {DEFAULT_URL}. A server that does not extract what --layers needs is refused with the command "
        "that starts one which does",
    )
    parser.add_argument(
        "--engine-requests",
        type=int,
        metavar="N",
        help=f"conversations that the engine is asked for at one time (default: {EngineConfig.requests})",
    )
    parser.add_argument(
        "--probe",
        action=argparse.BooleanOptionalAction,
        help="with --engine, load the verifier first and compare some rows with its own states (default: if its "
        "weights are at most 4 GB)",
    )


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError for settings that are out of range, before anything is read."""
    _config(arguments)


def _config(arguments: argparse.Namespace) -> CaptureConfig | EngineConfig:
    config = read_settings(CaptureConfig, arguments)
    given = {"requests": arguments.engine_requests, "probe": arguments.probe}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.engine:
        return EngineConfig(engine=arguments.engine, capture=config, **given)
    if given:
        flag = "--engine-requests" if "requests" in given else "--probe"
        raise InputError(f"{flag}: expected it with --engine, of whose states it speaks, found no --engine")
    return config


def run(arguments: argparse.Namespace) -> int:
    """Capture and print a summary.

    Returns 1 if the store has quarantined conversations, of any job, 143 after SIGTERM, 130 after SIGINT, else 0.
    """
    config = _config(arguments)

    from draftcache.capture.engine.job import capture_from_engine
    from draftcache.capture.job.launch import capture
    from draftcache.store.common.stopping import Stopped
    from draftcache.store.reader import StoreReader

    try:
        if isinstance(config, EngineConfig):
            summary = capture_from_engine(config, lambda line: print(line, file=sys.stderr))
        else:
            summary = capture(config)
    except Stopped as exc:
        print(
            "draftcache capture: stopped; what was committed stays, and nothing unfinished was left: "
            "run the same command again to go on",
            file=sys.stderr,
        )
        return exc.exit_code
    store = StoreReader(arguments.output)
    tokens = int(store.index["tokens"].sum())
    values = {
        "store": str(arguments.output),
        "conversations": len(store),
        "tokens": tokens,
        "bytes_per_token": store.bytes_on_disk() / max(tokens, 1),
        "shards": store.manifest.shards,
        "shards_written": summary.shards,
        "tokens_per_second": summary.tokens / summary.seconds if summary.shards else None,
        "waiting_share": summary.waiting_share if summary.shards else None,
        "quarantined": summary.quarantined,
    }
    show(arguments, values, format_summary(values))
    return 1 if summary.quarantined else 0


def format_summary(values: dict[str, Any]) -> str:
    """Format what a capture has written, then the quarantined conversations, one per line."""
    rate = ""
    if values["tokens_per_second"] is not None:
        waited = f"{100 * values['waiting_share']:.0f} % of the time waiting for compression and files"
        rate = f", {values['tokens_per_second']:,.0f} tokens/s, {waited}"
    lines = [
        f"{values['store']}: {values['conversations']:,} conversations, {values['tokens']:,} tokens, "
        f"{values['bytes_per_token']:,.0f} bytes/token; {values['shards_written']} of {values['shards']} shards "
        f"written now{rate}; {len(values['quarantined'])} quarantined"
    ]
    lines += [
        f"  quarantined {item['split']}[{item['dataset_index']}] {item['content_hash']}: {item['reason']}"
        for item in values["quarantined"]
    ]
    return "\n".join(lines)
