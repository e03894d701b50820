"""Synthetic stores whose teacher comes from states and a head, so that every form of it says the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file

from draftcache.store.format.array_spec import id_dtype
from draftcache.store.format.bf16 import bf16_to_float32, float32_to_bf16
from draftcache.store.format.frozen import FROZEN_NAME
from draftcache.store.format.manifest import top_level_names
from draftcache.store.format.schema import Conversation
from draftcache.store.format.teacher_stats import describe, tail_mass
from draftcache.store.format.vocab_map import VocabMap
from draftcache.store.writer import StoreWriter
from support.synthetic import DRAFT_VOCAB, HIDDEN, TOP_K, VOCAB, conversation, manifest, turns, vocab_map

SUBSET, OTHER = 10, 30
"""Sizes of two further vocabularies: within the main one, and not."""


def maps() -> list[VocabMap]:
    """Make the main vocabulary map, one of SUBSET ids within it, and one of OTHER ids of which some are outside it."""
    main = vocab_map()
    outside = np.setdiff1d(np.arange(VOCAB), main.target_ids)
    other = np.sort(np.concatenate((main.target_ids[:18], outside[: OTHER - 18])))
    return [main, replace(main, target_ids=main.target_ids[1::2][:SUBSET]), replace(main, target_ids=other)]


def head() -> NDArray[np.float32]:
    """Make the verifier's head, float32 [VOCAB, HIDDEN], in values that bf16 holds."""
    values = np.random.default_rng(11).normal(scale=0.7, size=(VOCAB, HIDDEN)).astype(np.float32)
    return bf16_to_float32(float32_to_bf16(values))


def with_teacher(item: Conversation, kind: str, top_k: int, *, bf16: bool) -> Conversation:
    """Give the conversation a teacher of this form in the place of its own; each form says the same."""
    arrays = {name: value for name, value in item.arrays.items() if not name.startswith(("teacher_ids", "teacher_g"))}
    positions = arrays["teacher_positions"]
    states = np.random.default_rng([5, item.split, item.dataset_index]).normal(size=(positions.size, HIDDEN))
    bits = float32_to_bf16(states.astype(np.float32))
    logits = bf16_to_float32(bits).astype(np.float64) @ head().T
    realised = arrays["token_ids"][positions + 1].astype(np.int64)
    inside = logits[:, vocab_map().target_ids]
    over = logits if kind == "full" else inside
    order = np.argsort(-over, axis=1, kind="stable")[:, :top_k]
    best = np.take_along_axis(over, order, axis=1)
    arrays |= {
        "teacher_max": over.max(axis=1).astype(np.float32),
        "log_z_full": np.log(np.exp(logits).sum(1)).astype(np.float32),
        "argmax": logits.argmax(1).astype(np.uint32),
        "next_token_logit": np.take_along_axis(logits, realised[:, None], 1)[:, 0].astype(np.float32),
    }
    for number, chosen in enumerate(maps()):
        suffix = f"_{len(chosen)}" if number else ""
        arrays[f"log_z_draft{suffix}"] = np.log(np.exp(logits[:, chosen.target_ids]).sum(1)).astype(np.float32)
    if kind == "hidden":
        return replace(item, arrays=arrays | {"teacher_hidden": bits if bf16 else bf16_to_float32(bits)})
    ids = order.astype(id_dtype(over.shape[1]))
    return replace(item, arrays=arrays | {"teacher_ids": ids, "teacher_gaps": (best[:, :1] - best).astype(np.float16)})


def write_teacher_store(
    root: Path,
    kind: str,
    *,
    top_k: int = TOP_K,
    per_shard: int = 4,
    bf16: bool = False,
    tokens: int = VOCAB,
    **changes: Any,
) -> None:
    """Write a finished store with all three vocabularies. `bf16`: states are stored as bit patterns.

    Its token ids are below `tokens`.
    """
    rng = np.random.default_rng(0)
    made = manifest(
        teacher=kind,
        top_k=0 if kind == "hidden" else top_k,
        more_draft_vocabs={str(len(item)): item.hash for item in maps()[1:]},
        compute_dtype="bfloat16" if bf16 else "float32",
        **changes,
    )
    in_draft = vocab_map().t2d if kind == "full" else None

    def write_files(directory: Path) -> list[Path]:
        import torch

        dtype = torch.bfloat16 if bf16 else torch.float32
        embeddings = np.random.default_rng(7).normal(size=(VOCAB, HIDDEN)).astype(np.float32)
        tensors = {"embed_tokens": torch.from_numpy(embeddings).to(dtype), "norm": torch.ones(HIDDEN, dtype=dtype)}
        for vocab, item in zip(made.teacher_form.vocabularies, maps(), strict=True):
            tensors[vocab.head] = torch.from_numpy(head()[item.target_ids]).to(dtype)
            item.save(directory / vocab.map_name)
        save_file(tensors, directory / FROZEN_NAME)
        return [directory / name for name in top_level_names(made)]

    with StoreWriter(root, made, write_files) as writer:
        for shard in range(made.shards):
            items = []
            for number in range(per_shard):
                mask = turns(40, (6, 16), (22, 37))
                where = {"window": made.window, "number": number, "split": shard}
                item = conversation(rng, mask, mode=made.mode, tokens=tokens, **where)
                items.append(with_teacher(item, kind, top_k, bf16=bf16))
            tails = describe(np.concatenate([tail_mass(item.arrays, in_draft) for item in items]))
            writer.write_shard(shard, items, {"quarantined": [], "gates": {}, "tail_mass": tails})
        writer.finish()


assert SUBSET < DRAFT_VOCAB < OTHER < VOCAB
