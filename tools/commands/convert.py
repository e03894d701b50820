"""`draftcache convert`: copy a store into another layout, mode or shard size, and compare the copy with the source."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags, which are the settings of `draftcache.store.convert.Conversion`."""
    parser.add_argument("source", help="directory, file://, s3:// or gs:// URL of a finished store")
    parser.add_argument("target", help="the same, of the store to create or to go on with")
    parser.add_argument("--layout", help="zarr or webdataset (default: the source's)")
    parser.add_argument("--mode", help="bf16, lossless, int8 or fp8 (default: the source's)")
    parser.add_argument("--shard-tokens", type=int, help="tokens per shard (default: the source's shards)")
    parser.add_argument("--no-check", action="store_true", help="do not read back and compare")
    parser.add_argument("--allow-lossy-source", action="store_true", help="convert from int8 or fp8 to another mode")


def run(arguments: argparse.Namespace) -> int:
    """Convert the store and print a summary.

    Returns 0 if the target is finished and, without --no-check, was compared; 1 if another run still writes shards.
    Raises InputError for an unknown layout or mode.
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
        check=not arguments.no_check,
        allow_lossy_source=arguments.allow_lossy_source,
    )
    with progress_bar(total=conversion.tokens, unit="tok", unit_scale=True, desc="convert") as bar:
        summary = conversion.run(progress=lambda tokens: bar.update(tokens))
    tokens = max(summary.tokens, 1)
    print(
        f"{arguments.target}: {summary.shards} of {len(conversion.plan)} shards written now, "
        f"{summary.bytes_before / tokens:,.1f} -> {summary.bytes_after / tokens:,.1f} bytes/token, "
        f"{summary.conversations:,} conversations stored, {summary.checked:,} of them read back and compared now"
    )
    for layer, error in summary.largest_error.items():
        print(f"  tap {layer}: largest error of a conversation {error:.4f} of its channels' rms")
    if not summary.finished:
        print(
            f"warning: {arguments.target} is not finished: expected {len(conversion.plan)} shards committed, the "
            f"shards {summary.missing} are still missing, as another run writes them; run the same command again when "
            "that has ended",
            file=sys.stderr,
        )
    return 0 if summary.finished else 1
