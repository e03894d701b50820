"""`draftcache convert`: copy a store or some of its taps, also into another layout, mode or shard size, and compare.

With --to a store is written as the cache of another project instead; `draftcache import` reads those.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from draftcache.store.common.errors import InputError
from draftcache.tools.arguments import numbers, refuse_renamed
from draftcache.tools.results import add_json, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags, which are the settings of `draftcache.store.convert.Conversion`."""
    parser.add_argument("source", help="directory, file://, s3:// or gs:// URL of a finished store")
    parser.add_argument("target", help="the same, of the store to create or to go on with")
    parser.add_argument("--layout", help="zarr or webdataset (default: the source's)")
    parser.add_argument("--mode", help="bf16, lossless, int8 or fp8 (default: the source's)")
    parser.add_argument("--shard-tokens", type=int, help="tokens per shard (default: the source's shards)")
    parser.add_argument("--layers", type=numbers, help="blocks whose taps are kept, among the stored (default: all)")
    parser.add_argument("--no-check", action="store_true", help="do not read back and compare")
    parser.add_argument("--allow-lossy-source", action="store_true", help="convert from int8 or fp8 to another mode")
    parser.add_argument(
        "--to",
        dest="peer",
        metavar="PROJECT",
        help="write files that speculators or specforge trains from, in a folder; needs a store of all rows "
        "(--window 0) whose taps include the last block (default: a store)",
    )
    add_json(parser)
    refuse_renamed(parser, {"--from": "`draftcache import SOURCE --from PROJECT`, a command of its own"})


def run(arguments: argparse.Namespace) -> int:
    """Convert the store and print a summary.

    Returns 0 if the target is finished and, without --no-check, was compared; 1 if another run still writes shards.
    Raises InputError for an unknown layout or mode, and for a tap that is not stored.
    """
    if arguments.peer is not None:
        return _write_cache(arguments)

    from draftcache.store.common.progress import progress_bar
    from draftcache.store.convert import Conversion
    from draftcache.store.format.manifest import LAYOUTS
    from draftcache.store.format.tap_codecs import MODES

    for flag, value, choices in (("layout", arguments.layout, LAYOUTS), ("mode", arguments.mode, MODES)):
        if value is not None and value not in choices:
            raise InputError(f"--{flag}: expected one of {list(choices)}, found {value!r}")
    conversion = Conversion(
        arguments.source,
        arguments.target,
        layout=arguments.layout,
        mode=arguments.mode,
        shard_tokens=arguments.shard_tokens,
        layers=arguments.layers,
        check=not arguments.no_check,
        allow_lossy_source=arguments.allow_lossy_source,
    )
    with progress_bar(total=conversion.tokens, unit="tok", unit_scale=True, desc="convert") as bar:
        summary = conversion.run(progress=lambda tokens: bar.update(tokens))
    tokens = max(summary.tokens, 1)
    values = {
        "target": arguments.target,
        "planned_shards": len(conversion.plan),
        **asdict(summary),
        "bytes_per_token_before": summary.bytes_before / tokens,
        "bytes_per_token_after": summary.bytes_after / tokens,
    }
    show(arguments, values, format_summary(values))
    if not summary.finished:
        print(
            f"warning: {arguments.target} is not finished: expected {len(conversion.plan)} shards committed, the "
            f"shards {summary.missing} are still missing, as another run writes them; run the same command again when "
            "that has ended",
            file=sys.stderr,
        )
    return 0 if summary.finished else 1


def _write_cache(arguments: argparse.Namespace) -> int:
    """Write the store as another project's cache and print a summary. Returns 0. Raises InputError."""
    for flag in ("layout", "mode", "shard_tokens", "layers"):
        if getattr(arguments, flag) is not None:
            raise InputError(f"--{flag.replace('_', '-')}: expected it without --to, which writes no store")
    if "://" in arguments.target:
        raise InputError(f"{arguments.target}: expected a folder for --to, found a URL")

    from draftcache.capture.peers.writers import CacheWriter
    from draftcache.store.common.progress import progress_bar
    from draftcache.store.reader import StoreReader

    writer = CacheWriter(StoreReader(arguments.source), Path(arguments.target), arguments.peer)
    with progress_bar(total=writer.tokens, unit="tok", unit_scale=True, desc="convert") as bar:
        summary = writer.run(progress=lambda tokens: bar.update(tokens))
    values = {"target": arguments.target, "to": arguments.peer, **asdict(summary), "lossy_taps": writer.lossy}
    show(arguments, values, _format_cache(values))
    return 0


def _format_cache(values: dict[str, Any]) -> str:
    lossy = "; its taps were rounded when the store was made" if values["lossy_taps"] else ""
    return (
        f"{values['target']}: {values['conversations']:,} conversations, {values['tokens']:,} tokens for "
        f"{values['to']}, {values['files_written']:,} files written now; {values['tokens_left_out']:,} tokens at "
        f"conversations' ends, {values['learned_tokens_left_out']:,} of them with loss, have no stored states and are "
        f"left out{lossy}"
    )


def format_summary(values: dict[str, Any]) -> str:
    """Format what a conversion did, then the largest error of each tap, where the mode loses something."""
    lines = [
        f"{values['target']}: {values['shards']} of {values['planned_shards']} shards written now, "
        f"{values['bytes_per_token_before']:,.1f} -> {values['bytes_per_token_after']:,.1f} bytes/token, "
        f"{values['conversations']:,} conversations stored, {values['checked']:,} of them read back and compared now"
    ]
    lines += [
        f"  tap {layer}: largest error of a conversation {error:.4f} of its channels' rms"
        for layer, error in values["largest_error"].items()
    ]
    return "\n".join(lines)
