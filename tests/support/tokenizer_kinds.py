"""Tokenizers of the kinds that models ship, trained on the spot, with their special tokens."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from support.chat_tokenizers import TOKENIZER_TEXT

SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<s>", "</s>", "[INST]", "[/INST]"]
_PIECES = [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*"]
_TIKTOKEN = "|".join([*_PIECES, r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_level_trimming() -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _tiktoken() -> Tokenizer:
    """As tiktoken's vocabularies are converted: a pattern splits, then bytes, and whole words need no merges."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_TIKTOKEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _metaspace() -> Tokenizer:
    """As sentencepiece's vocabularies are converted, with a byte for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]  # type: ignore[list-item]
    )
    return tokenizer


def _normalised_metaspace() -> Tokenizer:
    """The older form: a normaliser puts the blank's sign in, at the beginning of each piece of text too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]  # type: ignore[list-item]
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": _byte_level,
    "byte-level, trimmed offsets": _byte_level_trimming,
    "tiktoken": _tiktoken,
    "metaspace with byte fallback": _metaspace,
    "normalised metaspace with byte fallback": _normalised_metaspace,
}


def train(kind: str) -> Tokenizer:
    """A tokenizer of a kind with about 700 ids."""
    tokenizer = KINDS[kind]()
    bytes_ = kind.endswith("byte fallback")
    alphabet = [] if bytes_ else pre_tokenizers.ByteLevel.alphabet()
    unknown = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))] if bytes_ else []
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[*unknown, *SPECIAL],
        initial_alphabet=alphabet,
        limit_alphabet=60 if bytes_ else 1000,  # so that rare characters need bytes
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer
