"""`draftcache size --train`: the GPU memory of training, computed without a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.drafts.protocol import Architecture
from draftcache.draft_train.drafts.registry import find_architecture
from draftcache.draft_train.drafts.sizes import BatchRows, Shape, VerifierShape
from draftcache.draft_train.run_memory import USABLE, SizedBatch, largest_batches
from draftcache.draft_train.setting_tables import BLOCKS, MEMORY_SETTINGS
from draftcache.store.common.errors import InputError

CARDS_GIB = (24, 40, 80)
SETTINGS_SHOWN: dict[str, dict[str, Any]] = {
    "default": {},
    "--attention flash": {"attention": "flash"},
    "--recompute-mlp": {"recompute_mlp": True},
}
"""Flags of `draftcache train` that decide its memory, with the settings that they stand for; one column each."""
_GIB = 2**30
_LONGEST = 1 << 24


def training_memory(arguments: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """Return the peaks of each of SETTINGS_SHOWN and the longest conversations that fit on cards, as JSON values.

    `draft` holds the draft's shape. `settings` holds per setting `bytes` (by kind, at the peak), `total`, `tokens` (of
    the largest micro-batch) and `longest` ({card in GiB: tokens}). `config` is the verifier's config, empty without
    one. Raises InputError if the flags do not determine a draft.
    """
    if arguments.dataset is not None or arguments.tokens is not None:
        raise InputError("--train: expected --store or --length, found --dataset or --tokens, which are for a capture")
    train = _train_config(arguments)
    architecture = find_architecture(train.draft)
    of = _of_store if arguments.store is not None else _of_lengths
    verifier, batches = of(arguments, train, config)
    shape = architecture.shape_for(train, verifier)
    found = {}
    for name, changes in SETTINGS_SHOWN.items():
        if "attention" in changes and train.draft in BLOCKS:
            continue  # FlashAttention has no mask for blocks
        settings = replace(train, **changes)
        peaks = [(architecture.peak_bytes(shape, settings, rows), tokens) for tokens, rows in batches]
        peak, tokens = max(peaks, key=lambda item: sum(item[0].values()))
        found[name] = {
            "bytes": peak,
            "total": sum(peak.values()),
            "tokens": tokens,
            "longest": {
                str(card): _longest(architecture, shape, settings, batches[0], card * _GIB * USABLE)
                for card in CARDS_GIB
            },
        }
    return {"draft": asdict(shape), "settings": found}


def _train_config(arguments: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        store=arguments.store or Path(),
        output=Path(),
        splits=("train",),
        sliding_window=arguments.window,
        draft_vocab_size=arguments.draft_vocab_size or 0,
        **{name: getattr(arguments, name) for name in MEMORY_SETTINGS},
    )


def _of_store(
    arguments: argparse.Namespace, train: TrainConfig, _config: dict[str, Any]
) -> tuple[VerifierShape, Sequence[SizedBatch]]:
    """Return the verifier's shape and the largest micro-batches."""
    from draftcache.store.reader import StoreReader

    store = StoreReader(arguments.store)
    return VerifierShape.of(store, train.draft_vocab_size), largest_batches(store, train)


def _of_lengths(
    arguments: argparse.Namespace, train: TrainConfig, config: dict[str, Any]
) -> tuple[VerifierShape, Sequence[SizedBatch]]:
    hidden = config.get("hidden_size") or arguments.hidden_size
    vocab = config.get("vocab_size") or arguments.vocab_size
    if hidden is None or vocab is None or arguments.length is None:
        raise InputError(
            "--train: expected --store; or --length beside --verifier, or beside --hidden-size and --vocab-size; found "
            "too few of them"
        )
    share = 1.0 if arguments.loss_fraction is None else arguments.loss_fraction
    if arguments.length < 1 or not 0 < share <= 1:
        raise InputError(
            f"expected --length of at least 1 and --loss-fraction above 0 and at most 1, found {arguments.length} and "
            f"{share}"
        )
    shape = VerifierShape(
        hidden_size=hidden,
        taps=len(arguments.layers),
        vocab_size=vocab,
        draft_vocab_size=arguments.draft_vocab_size or 32_000,
        rms_norm_eps=1e-5,
    )
    rows = BatchRows(
        rows=arguments.length,
        starts=max(1, round(arguments.length * share)),
        top_k=0 if arguments.teacher == "hidden" else arguments.top_k,
    )
    return shape, [(arguments.length, rows)]


def _longest(architecture: Architecture, shape: Shape, settings: TrainConfig, like: SizedBatch, limit: float) -> int:
    """Return the tokens of the longest conversation, with the row shares of `like`, that takes at most `limit` bytes.

    The result is 0 if no conversation fits.
    """
    tokens, rows = like

    def fits(length: int) -> bool:
        scaled = replace(rows, rows=length * rows.rows // tokens, starts=length * rows.starts // tokens)
        return sum(architecture.peak_bytes(shape, settings, scaled).values()) <= limit

    low, high = 0, _LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def format_training_memory(found: dict[str, Any]) -> str:
    """Format what `training_memory` returns."""
    settings = found["settings"]
    tokens = next(iter(settings.values()))["tokens"]
    lines = [
        f"GPU memory of `draftcache train` (fused pass), largest micro-batch of {tokens:,} tokens:",
        "",
        f"{'GiB':<24}" + "".join(f"{name:>18}" for name in settings),
    ]
    kinds = next(iter(settings.values()))["bytes"]
    lines += [f"{kind:<24}" + _columns(row["bytes"][kind] for row in settings.values()) for kind in kinds]
    lines.append(f"{'peak':<24}" + _columns(row["total"] for row in settings.values()))
    lines.append("")
    for card in CARDS_GIB:
        longest = "".join(f"{row['longest'][str(card)]:>18,}" for row in settings.values())
        lines.append(f"{f'longest on {card} GB':<24}{longest}  tokens")
    lines += [
        "",
        "What PyTorch hands out at the worst moment. CUDA's context and fragmentation come on top; the longest",
        f"conversations, of loss shares like this one's, leave {1 - USABLE:.0%} of a card for them.",
    ]
    return "\n".join(lines)


def _columns(sizes: Any) -> str:
    return "".join(f"{size / _GIB:>18.2f}" for size in sizes)
