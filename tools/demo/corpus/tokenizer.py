"""The demo's tokenizer: a byte-level BPE of 4,096 entries with a ChatML template that marks the assistant's spans.

`python -m draftcache.tools.demo.corpus.tokenizer --corpus DIR` trains it on the train split, checks it, and writes
`DIR/tokenizer/` and `DIR/tokens.npz` (uint16 ids of every conversation, end to end, with their lengths).
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from draftcache.store.common.errors import InputError
from draftcache.store.common.files import read_json, write_json

__all__ = ["CHAT_TEMPLATE", "VOCAB_SIZE", "check_tokenizer", "encode_split", "main", "train_tokenizer"]

VOCAB_SIZE = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS_CHARACTERS = 8_000_000
"""Characters of WordNet in the training corpus, of 17.6 M; all of them would be 45 % of the text."""

# The assistant's span is its text and <|im_end|>, without the header before it and the newline after it.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{{- '\\n' -}}"
    "{%- else -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a gzipped JSON-lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with GPT-2's pre-tokenizer and all 256 bytes in its alphabet: any bytes round-trip."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Save the tokenizer under a class name that every transformers 5 release knows (5.23 would write its newest)."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    write_json(path, config)


def check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise InputError unless all bytes round-trip and the assistant mask covers exactly text + <|im_end|>."""
    every_byte = bytes(range(256)).decode("latin-1") + " \n\t  x\U0001f600 ﬀ e\u0301 日本"
    for text in (every_byte, "def f(x):\n\n    return  x\n", " lead", "trail "):
        back = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=False)
        if back != text:
            raise InputError(f"the tokenizer does not round-trip: expected {text!r}, got {back!r}")
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": "Two.\nThree."},
    ]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = np.array(encoded["input_ids"]), np.array(encoded["assistant_masks"], bool)
    covered = tokenizer.decode(ids[mask].tolist())
    if covered != "One.<|im_end|>Two.\nThree.<|im_end|>" or len(tokenizer) != VOCAB_SIZE:
        raise InputError(f"the assistant mask covers {covered!r}, the vocabulary has {len(tokenizer)} entries")


def encode_split(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], *, masks: bool
) -> dict[str, np.ndarray[Any, Any]]:
    """Return `tokens` (uint16, end to end) and `lengths` (int32) of the rendered conversations.

    With `masks` the result also has `assistant` (uint8, like the tokens) and `sources` (one name per conversation).
    Raises InputError if the template renders other tokens with masks than without.
    """
    rendered = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "tokens": np.concatenate([np.array(row, np.uint16) for row in ids]),
        "lengths": np.array([len(row) for row in ids], np.int32),
    }
    if masks:
        options: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": True}
        encoded = [tokenizer.apply_chat_template(row["messages"], **options) for row in rows]
        if any(list(e["input_ids"]) != row for e, row in zip(encoded, ids, strict=True)):
            raise InputError("the chat template renders other tokens with assistant masks than without")
        arrays["assistant"] = np.concatenate([np.array(e["assistant_masks"], np.uint8) for e in encoded])
        arrays["sources"] = np.array([row["source"] for row in rows])
    return arrays


def _training_rows(path: Path) -> list[dict[str, Any]]:
    rows, words_left = [], WORDS_CHARACTERS
    for row in read_rows(path):
        if row["source"] == "words":
            words_left -= sum(len(message["content"]) for message in row["messages"])
            if words_left < 0:
                continue
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Train, check and save the tokenizer, and encode both splits."""
    parser = argparse.ArgumentParser(description="Train the demo's tokenizer and encode its corpus.")
    parser.add_argument(
        "--corpus", type=Path, required=True, help="the directory that draftcache.tools.demo.corpus.build_corpus wrote"
    )
    arguments = parser.parse_args(argv)
    train = _training_rows(arguments.corpus / "train.jsonl.gz")
    val = list(read_rows(arguments.corpus / "val.jsonl.gz"))
    tokenizer = train_tokenizer(message["content"] for row in train for message in row["messages"])
    check_tokenizer(tokenizer)
    save_tokenizer(tokenizer, arguments.corpus / "tokenizer")
    arrays = {f"train_{key}": value for key, value in encode_split(tokenizer, train, masks=False).items()}
    arrays |= {f"val_{key}": value for key, value in encode_split(tokenizer, val, masks=True).items()}
    np.savez_compressed(arguments.corpus / "tokens.npz", **arrays)  # type: ignore[arg-type]
    for split in ("train", "val"):
        lengths = arrays[f"{split}_lengths"]
        print(f"{split}: {len(lengths):,} conversations, {lengths.sum():,} tokens, longest {lengths.max()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
