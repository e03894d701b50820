"""Some of a store's taps: the manifest of a copy that keeps them, and what to do about a tap that isn't stored."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from draftcache.store.common.errors import InputError
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.channel_scales import ChannelScales
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.format.norm_band import bands_to_json
from draftcache.store.reader import StoreReader


def choose_taps(store: StoreReader, layers: Sequence[int]) -> StoreManifest:
    """Return the store's manifest with the taps at the blocks `layers` alone.

    Raises InputError unless these are ascending, distinct blocks of the verifier, and stored. Only the verifier can
    make the states of a block that was not captured, so the message holds the command that captures them.
    """
    manifest, chosen = store.manifest, tuple(layers)
    blocks = int(manifest.verifier["layers"])
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= blocks:
        raise InputError(
            f"--layers: expected ascending, distinct block numbers from 0 to {blocks - 1}, found {list(chosen)}"
        )
    if missing := sorted(set(chosen) - set(manifest.layers)):
        every = sorted({*chosen, *manifest.layers})
        raise InputError(
            f"--layers: expected some of the taps {list(manifest.layers)} of {store.location}, found {missing} beside "
            f"them, which were not captured; capture them with its verifier and its dataset: "
            f"{capture_command(manifest, every)}"
        )
    scales = None
    if manifest.channel_scales is not None:
        held = ChannelScales.from_json(manifest.channel_scales).scales
        scales = ChannelScales({layer: held[layer] for layer in chosen}).to_json()
    bands = {layer: band for layer, band in manifest.bands.items() if layer in chosen}
    return replace(
        manifest,
        taps=tuple(tap for tap in manifest.taps if tap.layer in chosen),
        channel_scales=scales,
        norm_bands=None if manifest.norm_bands is None else bands_to_json(bands),
    )


def capture_command(manifest: StoreManifest, layers: Sequence[int]) -> str:
    """Return the command that captures a store like this one with the taps `layers`.

    A manifest holds no paths: VERIFIER, DATASET, STORE and, where it declares several draft vocabularies, their maps
    stand for those.
    """
    words = ["draftcache", "capture", "--verifier", "VERIFIER", "--dataset", "DATASET", "--output", "STORE"]
    words += ["--layers", ",".join(map(str, layers)), "--splits", ",".join(manifest.splits)]
    words += ["--window", str(manifest.window or 0), "--teacher", manifest.teacher]
    words += ["--top-k", str(manifest.top_k)] if manifest.top_k else []
    words += ["--mode", manifest.mode, "--layout", manifest.layout, "--compute-dtype", manifest.compute_dtype]
    words += ["--shard-tokens", str(manifest.shard_tokens)]
    if manifest.more_draft_vocabs:
        words += ["--more-vocab-maps", ",".join(f"MAP_{size}" for size in manifest.more_draft_vocabs)]
    return shlex.join(words)


def names_with_taps(store: StoreReader, layers: Sequence[int]) -> list[str]:
    """Return the names of all arrays of a conversation of the store, of taps only those at the blocks `layers`."""
    parts = {part for layer in store.manifest.layers for part in store.codec.specs(layer)}
    return [*map(tap_name, layers), *(name for name in store.specs if name not in parts)]
