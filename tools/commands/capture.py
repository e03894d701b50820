"""`draftcache capture`: run the frozen verifier over a prepared dataset and write a store."""

from __future__ import annotations

import argparse

from capture.config import CaptureConfig
from tools.arguments import add_settings, read_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per field of CaptureConfig."""
    add_settings(parser, CaptureConfig)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when conversations were quarantined, now or in an earlier run of the same job."""
    config = read_settings(CaptureConfig, arguments)

    from capture.batch_job import CaptureJob
    from store.commits import committed_shards, read_record
    from store.reader import StoreReader, shard_name

    summary = CaptureJob(config).run()
    store = StoreReader(config.output)
    tokens = int(store.index["tokens"].sum())
    records = [read_record(config.output, shard_name(shard)) for shard in committed_shards(config.output)]
    quarantined = [item for record in records if record for item in record["quarantined"]]
    rate = f", {summary.tokens / summary.seconds:,.0f} tokens/s" if summary.shards else ""
    print(
        f"{config.output}: {len(store):,} conversations, {tokens:,} tokens, "
        f"{store.bytes_on_disk() / max(tokens, 1):,.0f} bytes/token; "
        f"{summary.shards} of {store.manifest.shards} shards written now{rate}; {len(quarantined)} quarantined"
    )
    for item in quarantined:
        print(f"  quarantined {item['split']}[{item['dataset_index']}] {item['content_hash']}: {item['reason']}")
    return 1 if quarantined else 0
