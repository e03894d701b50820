"""Stores in a bucket for tests: made on a disk and put there past the protocol, as 60 shards by requests take long."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from draftcache.store.format.manifest import StoreManifest
from draftcache.store.storage.object_store import ObjectStorage
from draftcache.store.writer import StoreWriter
from draftcache.tools.campaign.object_server import BUCKET, CREDENTIALS, FlakyProxy, S3Server
from support.synthetic import items_of, manifest, write_files

EXTRA: dict[str, Any] = {"quarantined": [], "gates": {}, "tail_mass": {"count": 0}}


def connect(proxy: FlakyProxy, patch: Any, *, backoff: float = 0.01) -> None:
    """Have this process, and those that it starts, reach object stores through the proxy, with short pauses here.

    `patch` is pytest's monkeypatch.
    """
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": proxy.url, "AWS_ALLOW_HTTP": "true"}.items():
        patch.setenv(name, value)
    quick = {"retries": 1, "backoff": backoff, "request_timeout": 10.0, "deadline": 20.0}
    patch.setattr(ObjectStorage.__init__, "__kwdefaults__", ObjectStorage.__init__.__kwdefaults__ | quick)


def write_shards(root: Path, made: StoreManifest, per_shard: int = 1) -> None:
    """Write a finished store of synthetic conversations on a disk."""
    with StoreWriter(root, made, write_files) as writer:
        for shard in range(made.shards):
            writer.write_shard(shard, items_of(shard, per_shard), EXTRA)
        assert writer.finish()


def store_in_bucket(server: S3Server, scratch: Path, *, per_shard: int = 1, **changes: Any) -> str:
    """Make a finished store below `scratch` and in the bucket, and return its URL. `changes` go to the manifest."""
    name = uuid.uuid4().hex
    write_shards(scratch / name, manifest(**changes), per_shard)
    server.load(scratch / name, name)
    return f"s3://{BUCKET}/{name}"
