"""Traces: the verifier's own greedy answers to prompts, kept as token ids so that they are never re-tokenised.

On such traces the realised tokens are the verifier's argmaxes, so offline acceptance is exact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from store.files import atomic_path

Message = dict[str, Any]


def prompt_of(messages: Sequence[Message]) -> list[Message]:
    """The messages before the first assistant turn."""
    turn = next((number for number, item in enumerate(messages) if item["role"] == "assistant"), len(messages))
    return list(messages[:turn])


def encode_prompts(tokenizer: Any, prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Token ids of each prompt with the header of the assistant's turn."""
    return [
        tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in prompts
    ]


@torch.inference_mode()
def greedy_batches(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos_token_id: int, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield (prompt number, generated ids with the end of turn), in batches of similar prompt length.

    Prompts are padded on the left under an attention mask, which zeroes padded Mamba inputs: an exact no-op on a
    state that starts at zero.
    """
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        width = max(len(prompts[number]) for number in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, number in enumerate(chosen):
            ids[row, width - len(prompts[number]) :] = torch.tensor(prompts[number])
            mask[row, width - len(prompts[number]) :] = 1
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=0,
        )
        for row, number in enumerate(chosen):
            written = output[row, width:].tolist()
            if eos_token_id in written:
                written = written[: written.index(eos_token_id) + 1]
            yield number, written


def write_traces(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    output: Path,
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
    batch_size: int = 64,
) -> int:
    """Write one JSONL row per prompt of at most `max_prompt_tokens`, atomically; returns the generated tokens.

    Rows hold `messages` for readers, and `token_ids` with `loss_mask`, which `draftcache prepare` takes as they are.
    An existing file is complete and is left as it is.
    """
    if output.exists():
        return 0
    encoded = encode_prompts(tokenizer, prompts)
    kept = [number for number, ids in enumerate(encoded) if len(ids) <= max_prompt_tokens]
    eos = tokenizer.eos_token_id
    batches = greedy_batches(
        model, [encoded[n] for n in kept], max_new_tokens=max_new_tokens, eos_token_id=eos, batch_size=batch_size
    )
    rows: dict[int, list[int]] = {}
    with tqdm(total=len(kept), desc=f"traces {output.stem}", unit="trace") as bar:
        for place, written in batches:
            rows[kept[place]] = written
            bar.update()
            bar.set_postfix_str(f"{sum(map(len, rows.values())):,} tokens")
    with atomic_path(output) as partial, partial.open("w", encoding="utf-8") as file:
        for number in kept:
            text = tokenizer.decode(rows[number], skip_special_tokens=True)
            row = {
                "messages": [*prompts[number], {"role": "assistant", "content": text}],
                "token_ids": encoded[number] + rows[number],
                "loss_mask": [0] * len(encoded[number]) + [1] * len(rows[number]),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return sum(map(len, rows.values()))
