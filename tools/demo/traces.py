"""Traces: the verifier's own greedy answers to prompts, kept as token ids so that they are never tokenised again.

In such traces the realised tokens are the verifier's argmaxes, so offline acceptance is exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from draftcache.store.common.files import atomic_path
from draftcache.store.common.progress import progress_bar

Message = dict[str, Any]


def prompt_of(messages: Sequence[Message]) -> list[Message]:
    """Return the messages before the first assistant turn."""
    turn = next((number for number, item in enumerate(messages) if item["role"] == "assistant"), len(messages))
    return list(messages[:turn])


def encode_prompts(tokenizer: Any, prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Return the token ids of each prompt, which end with the header of the assistant's turn."""
    return [
        tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in prompts
    ]


@torch.inference_mode()
def generate_batch(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos_token_id: int
) -> list[list[int]]:
    """Return the greedy answers to a batch of prompts, as token ids with the end of turn.

    Prompts are padded on the left under an attention mask. The mask zeroes the padded inputs of Mamba blocks, which
    changes nothing, because their state starts at zero.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=0,
    )
    written = [row[width:].tolist() for row in output]
    return [ids[: ids.index(eos_token_id) + 1] if eos_token_id in ids else ids for ids in written]


def write_traces(
    generate: Callable[[list[list[list[int]]]], Iterable[list[list[int]]]],
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    output: Path,
    *,
    max_prompt_tokens: int,
    batch_size: int = 64,
) -> None:
    """Write one JSONL row per prompt of at most `max_prompt_tokens`, atomically. An existing file is left unchanged.

    `generate` maps batches of prompts (ids) to their answers, in order: it runs `generate_batch`, in this process or in
    worker processes. A row holds `messages` for human readers, and `token_ids` with `loss_mask`, which
    `draftcache prepare` takes unchanged.
    """
    if output.exists():
        return
    encoded = encode_prompts(tokenizer, prompts)
    kept = [number for number, ids in enumerate(encoded) if len(ids) <= max_prompt_tokens]
    order = sorted(kept, key=lambda number: len(encoded[number]))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    rows: dict[int, list[int]] = {}
    with progress_bar(total=len(kept), desc=f"traces {output.stem}", unit="trace") as bar:
        answers = generate([[encoded[number] for number in batch] for batch in batches])
        for batch, written in zip(batches, answers, strict=True):
            rows.update(zip(batch, written, strict=True))
            bar.set_postfix_str(f"{sum(map(len, rows.values())):,} tokens", refresh=False)
            bar.update(len(batch))
    with atomic_path(output) as partial, partial.open("w", encoding="utf-8") as file:
        for number in kept:
            text = tokenizer.decode(rows[number], skip_special_tokens=True)
            row = {
                "messages": [*prompts[number], {"role": "assistant", "content": text}],
                "token_ids": encoded[number] + rows[number],
                "loss_mask": [0] * len(encoded[number]) + [1] * len(rows[number]),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
