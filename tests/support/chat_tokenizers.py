"""Small tokenizers with a chat template, trained on the spot."""

from __future__ import annotations

from pathlib import Path

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
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def save_tokenizer(directory: Path, chat_template: str | None, vocab_size: int = 600) -> Path:
    """Train a byte-level BPE on TOKENIZER_TEXT, save it as transformers does, and give the directory back."""
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
