"""`draftcache convert`: copy a store or some of its taps, also into another layout, mode or shard size, and compare."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from draftcache.tools.arguments import numbers
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
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert the store and print a summary.

    Returns 0 if the target is finished and, without --no-check, was compared; 1 if another run still writes shards.
    Raises InputError for an unknown layout or mode, and for a tap that is not stored.
    """
    from draftcache.store.common.errors import InputError
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
