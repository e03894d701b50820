"""Stores with made-up but consistent content, for tests that need no verifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from draftcache.store.common.files import hash_bytes
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.bf16 import float32_to_bf16
from draftcache.store.format.channel_scales import ChannelScales
from draftcache.store.format.frozen import FROZEN_NAME
from draftcache.store.format.manifest import StoreManifest, Tap
from draftcache.store.format.rows import rows_in_reach, teacher_positions
from draftcache.store.format.schema import Conversation
from draftcache.store.format.vocab_map import VOCAB_MAP_NAME, VocabMap
from draftcache.store.writer import StoreWriter

VOCAB, DRAFT_VOCAB, HIDDEN, TOP_K = 40, 24, 8, 6
LAYERS = (1, 3, 4)


def vocab_map(seed: int = 0) -> VocabMap:
    """Draw a map of DRAFT_VOCAB ids from the VOCAB ids of the synthetic verifier."""
    chosen = np.random.default_rng(seed).choice(VOCAB, DRAFT_VOCAB, replace=False)
    return VocabMap(target_ids=np.sort(chosen).astype(np.int64), vocab_size=VOCAB)


def turns(length: int, *spans: tuple[int, int]) -> NDArray[np.bool_]:
    """Make a loss mask, bool [length], that is True inside the half-open spans."""
    mask = np.zeros(length, np.bool_)
    for first, last in spans:
        mask[first:last] = True
    return mask


def conversation(
    rng: np.random.Generator,
    mask: NDArray[np.bool_],
    *,
    window: int | None = None,
    top_k: int = TOP_K,
    number: int = 0,
    split: int = 0,
    mode: str = "float32",
    tokens: int = VOCAB,
) -> Conversation:
    """Make a conversation with this loss mask [L], random token ids and taps, and the teacher of random logits.

    Its token ids are below `tokens`.

    Taps [R, HIDDEN] of the R rows in reach are float32, or bf16 bits in any mode but float32.
    """
    length = mask.shape[0]
    token_ids = rng.integers(0, tokens, length).astype(np.uint32)
    rows = rows_in_reach(mask, window)
    taps = {tap_name(layer): rng.normal(size=(length, HIDDEN)).astype(np.float32)[rows] for layer in LAYERS}
    if mode != "float32":
        taps = {name: float32_to_bf16(values) for name, values in taps.items()}
    positions = teacher_positions(mask)
    logits = rng.normal(scale=2.0, size=(positions.size, VOCAB))
    return Conversation(
        content_hash=hash_bytes(token_ids.tobytes(), mask.tobytes()),
        split=split,
        dataset_index=number,
        arrays={
            "token_ids": token_ids,
            "loss_mask": mask.astype(np.uint8),
            "positions": rows.astype(np.int32),
            "teacher_positions": positions.astype(np.int32),
            **taps,
            **teacher(logits, token_ids[positions + 1], top_k),
        },
    )


def teacher(logits: NDArray[Any], realised: NDArray[Any], top_k: int) -> dict[str, NDArray[Any]]:
    """Make the teacher arrays of float64 logits [P, VOCAB] and the tokens [P] that followed, without capture's code."""
    inside = logits[:, vocab_map().target_ids]
    order = np.argsort(-inside, axis=1, kind="stable")[:, :top_k]
    best = np.take_along_axis(inside, order, axis=1)
    return {
        "teacher_ids": order.astype(np.uint16),
        "teacher_gaps": (best[:, :1] - best).astype(np.float16),
        "teacher_max": best[:, 0].astype(np.float32),
        "log_z_full": np.log(np.exp(logits).sum(1)).astype(np.float32),
        "log_z_draft": np.log(np.exp(inside).sum(1)).astype(np.float32),
        "argmax": logits.argmax(1).astype(np.uint32),
        "next_token_logit": np.take_along_axis(logits, realised[:, None].astype(np.int64), 1)[:, 0].astype(np.float32),
    }


def manifest(**changes: Any) -> StoreManifest:
    """Make a manifest that fits the synthetic conversations, with these fields changed."""
    values: dict[str, Any] = {
        "verifier": {
            "name": "synthetic",
            "architecture": "None",
            "weights_hash": "0" * 32,
            "hidden_size": HIDDEN,
            "vocab_size": VOCAB,
            "rms_norm_eps": 1e-5,
            "layers": 6,
            "max_position_embeddings": 1024,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        "tokenizer_hash": "t",
        "chat_template_hash": "c",
        "dataset_hash": "d",
        "splits": ("train", "val"),
        "taps": tuple(Tap(layer=layer) for layer in LAYERS),
        "mode": "float32",
        "compute_dtype": "float32",
        "window": None,
        "top_k": TOP_K,
        "draft_vocab_size": DRAFT_VOCAB,
        "draft_vocab_hash": vocab_map().hash,
        "shard_tokens": 100,
        "shards": 2,
        "ssm": None,
    }
    if changes.get("mode") == "int8":
        scales = {layer: np.linspace(0.5, 2, HIDDEN, dtype=np.float32) for layer in LAYERS}
        values["channel_scales"] = ChannelScales(scales).to_json()
    return StoreManifest(**values | changes)


def write_files(root: Path) -> list[Path]:
    """Write the frozen weights and the vocabulary map of a synthetic store, and give their paths back."""
    rng = np.random.default_rng(7)
    tensors = {
        "embed_tokens": rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32),
        "norm": np.ones(HIDDEN, np.float32),
        "lm_head": rng.normal(size=(DRAFT_VOCAB, HIDDEN)).astype(np.float32),
    }
    save_file(tensors, root / FROZEN_NAME)
    vocab_map().save(root / VOCAB_MAP_NAME)
    return [root / FROZEN_NAME, root / VOCAB_MAP_NAME]


def items_of(shard: int, count: int = 3) -> list[Conversation]:
    """Make the conversations of one shard: the same ones whenever they are asked for, others in every shard."""
    rng = np.random.default_rng(shard)
    return [conversation(rng, turns(60, (6, 16), (22, 50)), number=count * shard + number) for number in range(count)]


def write_store(root: Path, *, per_shard: int = 4, seed: int = 0, tokens: int = VOCAB, **changes: Any) -> StoreManifest:
    """Write a finished store, one shard of `train` and one of `val`, and give its manifest back.

    No token id of `tokens` or above occurs in it.
    """
    rng = np.random.default_rng(seed)
    made = manifest(**changes)
    with StoreWriter(root, made, write_files) as writer:
        for shard in range(made.shards):
            items = [
                conversation(
                    rng,
                    turns(40, (6, 16), (22, 37)),
                    window=made.window,
                    number=number,
                    split=shard,
                    mode=made.mode,
                    tokens=tokens,
                )
                for number in range(per_shard)
            ]
            writer.write_shard(shard, items, {"quarantined": [], "gates": {}})
        writer.finish()
    return made
