"""`draftcache capture`: run the frozen verifier over a prepared dataset and write a store."""

from __future__ import annotations

import argparse
import sys

from draftcache.capture.job.config import CaptureConfig
from draftcache.tools.arguments import add_settings, read_settings, refuse_renamed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag per field of CaptureConfig."""
    add_settings(parser, CaptureConfig)
    refuse_renamed(parser, {"--shard": "--tensor-parallel", "--engine": "--launcher"})


def run(arguments: argparse.Namespace) -> int:
    """Capture and print a summary.

    Returns 1 if the store has quarantined conversations, of any job, 143 after SIGTERM, 130 after SIGINT, else 0.
    """
    config = read_settings(CaptureConfig, arguments)

    from draftcache.capture.job.launch import capture
    from draftcache.store.common.stopping import Stopped
    from draftcache.store.reader import StoreReader

    try:
        summary = capture(config)
    except Stopped as exc:
        print(
            "draftcache capture: stopped; what was committed stays, and nothing unfinished was left: "
            "run the same command again to go on",
            file=sys.stderr,
        )
        return exc.exit_code
    store = StoreReader(config.output)
    tokens = int(store.index["tokens"].sum())
    rate = f", {summary.tokens / summary.seconds:,.0f} tokens/s" if summary.shards else ""
    print(
        f"{config.output}: {len(store):,} conversations, {tokens:,} tokens, "
        f"{store.bytes_on_disk() / max(tokens, 1):,.0f} bytes/token; "
        f"{summary.shards} of {store.manifest.shards} shards written now{rate}; {len(summary.quarantined)} quarantined"
    )
    for item in summary.quarantined:
        print(f"  quarantined {item['split']}[{item['dataset_index']}] {item['content_hash']}: {item['reason']}")
    return 1 if summary.quarantined else 0
