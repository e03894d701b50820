"""`draftcache size`: bytes and wall time of a store, or GPU memory of training, before anything runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.setting_tables import MEMORY_SETTINGS
from draftcache.tools.arguments import add_settings, count, finite_number, numbers
from draftcache.tools.results import add_json, show

if TYPE_CHECKING:
    from draftcache.capture.job.store_size import Counts
    from draftcache.store.format.array_spec import ArraySpec

_DRAFT_VOCAB = 32_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags: the conversations, the verifier, the store's settings, and the hardware."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dataset", type=Path, help="prepared dataset: counts are its own")
    what.add_argument("--tokens", type=count, help="tokens, for a guess without a dataset (450e6): needs the next")
    what.add_argument("--store", help="with --train: a store, whose largest conversation decides")
    what.add_argument("--length", type=count, help="with --train: tokens of a conversation, without a store")
    parser.add_argument(
        "--loss-fraction", type=finite_number, help="with --tokens, --length: share that the assistant wrote"
    )
    parser.add_argument("--mean-length", type=count, default=8192, help="with --tokens: per conversation")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--verifier", type=Path, help="its directory: config.json is read")
    shape.add_argument("--hidden-size", type=int, help="without a verifier at hand")
    parser.add_argument("--vocab-size", type=int, help="with --train and --hidden-size: the verifier's")
    parser.add_argument("--layers", type=numbers, default=(2, 26, 48), help="taps (default: 2,26,48)")
    parser.add_argument("--top-k", type=int, default=64, help="teacher logits per position (default: 64)")
    parser.add_argument("--teacher", default="draft", help="draft, full or hidden, as of capture (default: draft)")
    parser.add_argument("--draft-vocab-size", type=count, help="default: the dataset's map, else 32000")
    parser.add_argument(
        "--more-vocab-sizes", type=numbers, default=(), help="further draft vocabularies: 8000,16000 (default: none)"
    )
    parser.add_argument("--window", type=int, default=4096, help="rows beyond it are dropped; 0 keeps all")
    parser.add_argument(
        "--compute-dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the verifier, and so of the frozen weights (default: bfloat16; capture on a CPU takes float32)",
    )
    parser.add_argument("--mode", help="only this mode (default: all, side by side)")
    parser.add_argument("--layout", choices=("zarr", "webdataset"), default="zarr", help="form of the shards")
    parser.add_argument("--shard-tokens", type=count, default=65_536, help="tokens per shard (default: 65536)")
    parser.add_argument("--tokens-per-second", type=finite_number, help="the verifier's rate, where it was measured")
    parser.add_argument("--gpu", choices=("h100", "h200", "a100"), default="h100", help="else: estimate for one of it")
    parser.add_argument(
        "--disk-gb-s", type=finite_number, default=1.0, help="rate of writing, in 1e9 bytes (default: 1.0)"
    )
    parser.add_argument("--train", action="store_true", help="GPU memory of training instead: see the flags below")
    add_settings(parser.add_argument_group("with --train, as of `draftcache train`"), TrainConfig, MEMORY_SETTINGS)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the sizes of a store, or with --train the memory of training. Returns 0.

    Raises InputError for values that do not fit together.
    """
    if arguments.train:
        from draftcache.tools.reports.training_memory import format_training_memory, training_memory

        memory = training_memory(arguments, _config(arguments.verifier))
        show(arguments, memory, format_training_memory(memory))
        return 0
    result = size(arguments)
    from draftcache.tools.reports.sizes_text import format_sizes

    show(arguments, result, format_sizes(result))
    return 0


def size(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the counts, compute time, bytes and times per mode, and peers' bytes of a store, as JSON values.

    Keys: `counts` (`Counts.to_json`), `settings`, `compute` (seconds and tokens per second of the verifier's forwards;
    None if unknown), `frozen_bytes`, `modes` ({mode: bytes by array, total, seconds to write, wall seconds and what
    limits them}) and `peers` ({project: bytes in total and per token}). Raises InputError for missing or wrong flags.
    """
    from draftcache.capture.job.store_size import frozen_bytes
    from draftcache.store.common.errors import InputError
    from draftcache.store.format.tap_codecs import MODES
    from draftcache.tools.reports.sizing import peer_bytes

    if (arguments.dataset is None) == (arguments.tokens is None):
        raise InputError("expected --dataset or --tokens (or --train with --store or --length), found neither")
    config = _config(arguments.verifier)
    if not config and arguments.hidden_size is None:
        raise InputError("expected --verifier or --hidden-size, found neither")
    hidden = int(config["hidden_size"]) if config else arguments.hidden_size
    _require_settings(arguments, hidden, config)
    if arguments.mode is not None and arguments.mode not in MODES:
        raise InputError(f"--mode: expected one of {list(MODES)}, found {arguments.mode!r}")
    counts, draft_vocab, dataset_vocab = _counts(arguments)
    vocab_size = config.get("vocab_size") or dataset_vocab
    sizes = (draft_vocab, *arguments.more_vocab_sizes)
    _require_teacher(arguments, sizes, vocab_size)
    compute = _compute(arguments, config, counts)
    frozen = frozen_bytes(hidden, vocab_size, sizes, arguments.compute_dtype) if vocab_size else 0
    modes = [arguments.mode] if arguments.mode else list(MODES)
    tokens = round(counts.tokens.sum())
    return {
        "counts": counts.to_json(),
        "settings": _settings(arguments, hidden, draft_vocab),
        "compute": compute,
        "frozen_bytes": frozen,
        "modes": {
            mode: _mode(arguments, _specs(arguments, mode, hidden, sizes, vocab_size), counts, frozen, compute)
            for mode in modes
        },
        "peers": {
            name: {"bytes": total, "bytes_per_token": total / tokens}
            for name, total in peer_bytes(tokens, len(arguments.layers), hidden).items()
        },
    }


def _counts(arguments: argparse.Namespace) -> tuple[Counts, int, int | None]:
    """Return the counts, the draft vocabulary's size, and the dataset's vocabulary size, None without a dataset."""
    from draftcache.capture.job.store_size import count_dataset
    from draftcache.store.common.errors import InputError
    from draftcache.tools.reports.sizing import guess_counts

    if arguments.dataset is None:
        if arguments.loss_fraction is None:
            raise InputError("--tokens: expected --loss-fraction beside it, found none")
        counts = guess_counts(arguments.tokens, arguments.loss_fraction, arguments.mean_length, arguments.shard_tokens)
        return counts, arguments.draft_vocab_size or _DRAFT_VOCAB, None
    from draftcache.capture.prepare.token_dataset import TokenDataset

    dataset = TokenDataset.open(arguments.dataset)
    counts = count_dataset(dataset, arguments.window or None, arguments.shard_tokens)
    return counts, arguments.draft_vocab_size or _dataset_draft_vocab(dataset.path), dataset.vocab_size


def _settings(arguments: argparse.Namespace, hidden: int, draft_vocab: int) -> dict[str, Any]:
    """Return the settings that the sizes are for, as JSON values."""
    return {
        "hidden_size": hidden,
        "layers": list(arguments.layers),
        "teacher": arguments.teacher,
        "top_k": arguments.top_k if arguments.teacher != "hidden" else 0,
        "draft_vocab_size": draft_vocab,
        "more_vocab_sizes": list(arguments.more_vocab_sizes),
        "window": arguments.window or None,
        "layout": arguments.layout,
        "shard_tokens": arguments.shard_tokens,
        "disk_gb_s": arguments.disk_gb_s,
    }


def _config(verifier: Path | None) -> dict[str, Any]:
    """Return the verifier's config.json (its `text_config` if it has one), or an empty dict without a verifier.

    Raises InputError if the file holds no config with a hidden_size.
    """
    from draftcache.store.common.errors import InputError
    from draftcache.store.common.files import read_json

    if verifier is None:
        return {}
    found = read_json(verifier / "config.json")
    config = found.get("text_config", found) if isinstance(found, dict) else None
    if not isinstance(config, dict) or not isinstance(config.get("hidden_size"), int):
        raise InputError(f"{verifier / 'config.json'}: expected a model's config with hidden_size, found none")
    return config


def _require_settings(arguments: argparse.Namespace, hidden: int, config: Mapping[str, Any]) -> None:
    from draftcache.store.common.errors import InputError

    layers = arguments.layers
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
        raise InputError(f"--layers: expected ascending, distinct block numbers >= 0, found {list(layers)}")
    blocks = config.get("num_hidden_layers") or len(config.get("layers_block_type") or ())
    if blocks and layers[-1] >= blocks:
        raise InputError(f"--layers: expected blocks 0 to {blocks - 1} of {arguments.verifier}, found {list(layers)}")
    least = {"hidden_size": 1, "top_k": 1, "shard_tokens": 1, "draft_vocab_size": 1, "window": 0}
    for name, low in least.items():
        value = hidden if name == "hidden_size" else getattr(arguments, name)
        if value is not None and value < low:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {low}, found {value}")
    for name in ("tokens_per_second", "disk_gb_s"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name.replace('_', '-')}: expected a rate above 0, found {value}")


def _require_teacher(arguments: argparse.Namespace, sizes: tuple[int, ...], vocab_size: int | None) -> None:
    from draftcache.store.common.errors import InputError
    from draftcache.store.format.teacher import TEACHERS

    teacher, top_k = arguments.teacher, arguments.top_k
    if teacher not in TEACHERS:
        raise InputError(f"--teacher: expected one of {list(TEACHERS)}, found {teacher!r}")
    if min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise InputError(f"--more-vocab-sizes: expected sizes of at least 1 that differ, found {list(sizes)} in all")
    if teacher == "full" and vocab_size is None:
        raise InputError(
            "--teacher full: expected --verifier or --dataset beside it, found neither; ids take two bytes or four by "
            "the verifier's vocabulary"
        )
    most = vocab_size if teacher == "full" else sizes[0]
    if teacher != "hidden" and most is not None and top_k > most:
        raise InputError(
            f"--top-k: expected at most the {'verifier' if teacher == 'full' else 'draft vocabulary'}'s {most}, "
            f"found {top_k}"
        )


def _specs(
    arguments: argparse.Namespace, mode: str, hidden: int, sizes: tuple[int, ...], vocab_size: int | None
) -> dict[str, ArraySpec]:
    """Return the arrays of a shard in a mode. The states of teacher "hidden" are in the compute dtype."""
    from draftcache.capture.job.store_size import sized_teacher, specs_of

    teacher = sized_teacher(
        arguments.teacher,
        top_k=arguments.top_k,
        vocab_size=vocab_size or 0,
        hidden_size=hidden,
        compute_dtype="float32" if mode == "float32" else arguments.compute_dtype,
        draft_vocab_sizes=sizes,
    )
    return specs_of(mode, layers=arguments.layers, hidden_size=hidden, teacher=teacher)


def _dataset_draft_vocab(dataset: Path) -> int:
    from draftcache.store.format.vocab_map import VOCAB_MAP_NAME, VocabMap

    return len(VocabMap.load(dataset / VOCAB_MAP_NAME)) if (dataset / VOCAB_MAP_NAME).is_file() else _DRAFT_VOCAB


def _compute(arguments: argparse.Namespace, config: Mapping[str, Any], counts: Counts) -> dict[str, Any] | None:
    """Return the seconds of the verifier's forwards, from the given rate or from FLOPs; None if both are unknown."""
    from draftcache.capture.verifier.family_flops import has_own_forward, verifier_flops
    from draftcache.tools.reports.sizing import GPU_TFLOPS, OWN_FORWARD_SHARE, PLAIN_FORWARD_SHARE

    tokens = float(counts.tokens.sum())
    if arguments.tokens_per_second:
        rate = arguments.tokens_per_second
        return {"seconds": tokens / rate, "tokens_per_second": rate, "basis": "the rate given by --tokens-per-second"}
    flops = verifier_flops(config)
    if flops is None:
        return None
    total, ceiling = flops.total(counts.tokens, float(counts.teacher.sum())), GPU_TFLOPS[arguments.gpu] * 1e12
    own = has_own_forward(config)
    share, whose = (OWN_FORWARD_SHARE, "draftcache's") if own else (PLAIN_FORWARD_SHARE, "transformers'")
    seconds = total / (ceiling * share)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "flops_per_token": total / tokens,
        "floor_seconds": total / ceiling,
        "basis": f"ESTIMATE for one {arguments.gpu.upper()}: {total / tokens / 1e9:.2f} GFLOP per token by the "
        f"verifier's config, at {share:.0%} of {GPU_TFLOPS[arguments.gpu]:.0f} TFLOP/s of matmul (the share "
        f"that {whose} forward of a 30B-A3B NemotronH reached on an H100 at 32k "
        "tokens; short conversations that are read alone reach less). Measure your own and give --tokens-per-second",
    }


def _mode(
    arguments: argparse.Namespace,
    specs: Mapping[str, ArraySpec],
    counts: Counts,
    frozen: int,
    compute: Mapping[str, Any] | None,
) -> dict[str, Any]:
    from draftcache.capture.job.store_size import shard_bytes

    arrays = shard_bytes(counts, specs, arguments.layout)
    shards = sum(arrays.values())
    total = shards + frozen + arrays["index.npy"]  # the store's index repeats the entries of the shards' indices
    write = total / (arguments.disk_gb_s * 1e9)
    seconds = None if compute is None else max(write, compute["seconds"])
    return {
        "shard_bytes": round(shards),
        "bytes": round(total),
        "bytes_per_token": shards / float(counts.tokens.sum()),
        "arrays": {name: round(value) for name, value in arrays.items()},
        "write_seconds": write,
        "wall_seconds": seconds,
        "limit": None if seconds is None else "compute" if seconds > write else "writing",
    }
