"""Fixtures shared by several test modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftcache.capture.verifier.ssm_precision import stand_in_for_extension

stand_in_for_extension()  # before any test module imports transformers' NemotronH

# Repetitive on purpose: a few hundred merges are learnt from it, among them ones that cross turn boundaries.
TOKENIZER_TEXT = [
    "The quick brown fox jumps over the lazy dog. Why does it? Because it can, and because it wants to.\n\n",
    "user: what is the capital of France?\nassistant: The capital of France is Paris.\n\n",
    "def add(a: int, b: int) -> int:\n    return a + b\n\n\nclass Thing:\n    pass\n\n",
    "Ünïcödé straße, naïve café, 東京 and 日本語; emoji 🎉🎉 and 👩‍👩‍👧 too.\n\n",
    "::tag:: ::tag:: [[x]] [[y]] !!! ??? ... -- ::\n\n\n",
] * 8

CHATML = """\
{%- for message in messages -%}
{%- if loop.first and message.role == 'assistant' -%}
{{- raise_exception('a conversation starts with a user or system turn') -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- (message.content | default('')) + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message.content + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
"""


def save_tokenizer(directory: Path, chat_template: str | None, vocab_size: int = 600) -> Path:
    """Train a byte-level BPE on TOKENIZER_TEXT and save it as transformers does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TOKENIZER_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(str(directory))
    return directory


@pytest.fixture
def seeded() -> None:
    """The same random numbers in every test."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose ChatML template has generation tags, the end-of-turn token inside, and refuses some rows."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizers") / "chatml", CHATML)


@pytest.fixture(scope="session")
def untagged_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer; its template renders the same text without generation tags."""
    template = CHATML.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    return save_tokenizer(tmp_path_factory.mktemp("tokenizers") / "untagged", template)
