"""What a store holds, as JSON values: figures of the whole store, read from no array, or one decoded conversation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from draftcache.store.common.errors import InputError
from draftcache.store.common.length_counts import LengthCounts
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.bf16 import bf16_to_float32
from draftcache.store.format.schema import Conversation
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import Location
from draftcache.tools.reports.record_totals import RecordTotals, commit_records, ratio
from draftcache.tools.reports.shown_teacher import shown_teacher

DEFAULT_ROWS = 64

Summary = dict[str, Any]


def summarise(location: Location, *, allow_partial: bool = False) -> Summary:
    """Return the figures of a store as JSON values, from its manifest, its commit records and its index alone.

    From the manifest: `store`, `manifest_hash`, `verifier`, `taps`, `mode`, `layout` and the other settings, and
    `shards_planned`. From the index: `conversations`, `tokens`, `loss_tokens`, `loss_fraction`, `rows`, `reach_saved`
    (the share of the tokens without a row), `teacher_positions`, `splits` and `lengths`. From the commit records: the
    keys of `RecordTotals.figures`. Bytes are the sizes that the commit records name; `verify` compares them with the
    files. Raises StoreError if the store is unfinished (unless `allow_partial`) or a record is damaged.
    """
    reader = StoreReader(location, allow_partial=allow_partial)
    try:
        totals = RecordTotals()
        for name, record in commit_records(reader.storage, reader.manifest, finished=reader.finished):
            totals.add(name, record)
        return _manifest_figures(reader) | _index_figures(reader) | totals.figures(int(reader.index["tokens"].sum()))
    finally:
        reader.close()


def _manifest_figures(reader: StoreReader) -> Summary:
    manifest = reader.manifest
    return {
        "store": reader.location,
        "manifest_hash": manifest.hash,
        "verifier": manifest.verifier,
        "taps": [tap.to_json() for tap in manifest.taps],
        "mode": manifest.mode,
        "layout": manifest.layout,
        "compute_dtype": manifest.compute_dtype,
        "window": manifest.window,
        "teacher": manifest.teacher,
        "top_k": manifest.top_k,
        "draft_vocab_size": manifest.draft_vocab_size,
        "draft_vocab_hash": manifest.draft_vocab_hash,
        "more_draft_vocabs": manifest.more_draft_vocabs,
        "ssm": manifest.ssm,
        "provenance": manifest.provenance,
        "shards_planned": manifest.shards,
    }


def _index_figures(reader: StoreReader) -> Summary:
    index = reader.index
    tokens, rows = int(index["tokens"].sum()), int(index["rows"].sum())
    splits = {}
    for number, name in enumerate(reader.manifest.splits):
        part = index[index["split"] == number]
        splits[name] = {"conversations": len(part), "tokens": int(part["tokens"].sum())}
    return {
        "conversations": len(index),
        "tokens": tokens,
        "loss_tokens": int(index["loss_tokens"].sum()),
        "loss_fraction": ratio(int(index["loss_tokens"].sum()), tokens),
        "rows": rows,
        "reach_saved": 1 - rows / tokens if tokens else 0.0,
        "teacher_positions": int(index["teacher_rows"].sum()),
        "splits": splits,
        "lengths": LengthCounts(index["tokens"]).as_json(),
    }


def find_conversation(reader: StoreReader, split: str, dataset_index: int) -> int:
    """Return the index in the store of the conversation with number `dataset_index` in a split of the prepared dataset.

    Raises InputError, which names the numbers that are stored, if the store does not hold it.
    """
    members = reader.members(split)
    numbers = reader.index["dataset_index"][members]
    found = members[numbers == dataset_index]
    if not len(found):
        there = f"{numbers.min()} .. {numbers.max()}" if len(numbers) else "none"
        inside = len(numbers) > 0 and numbers.min() <= dataset_index <= numbers.max()
        raise InputError(
            f"{reader.location}: expected --index among the stored conversations of {split!r} ({there}), found "
            f"{dataset_index}" + ("; capture set this one aside, or has not stored it yet" if inside else "")
        )
    return int(found[0])


def decode_conversation(
    reader: StoreReader,
    number: int,
    *,
    rows: tuple[int, int] | None = None,
    text: Callable[[int], str] | None = None,
) -> Summary:
    """Return conversation `number` as JSON values, with all that is stored at each of the tokens `rows` (a, b).

    By default these are the first 64 tokens. Beside the conversation's identity and counts, `table` holds per token
    `position`, `token_id`, `text` (from the function `text`), `loss`, `taps` ({layer: rms}, or None if the token has no
    row because it was out of reach) and `teacher` (as `shown_teacher` describes the token that follows, or None if
    nothing is stored at the position). Raises InputError, which names the valid range, for numbers outside it.
    """
    if not 0 <= number < len(reader):
        raise InputError(f"{reader.location}: expected a conversation in 0 .. {len(reader) - 1}, found {number}")
    row = reader.index[number]
    length = int(row["tokens"])
    first, last = rows or (0, min(DEFAULT_ROWS, length))
    if not 0 <= first < last <= length:
        raise InputError(
            f"{reader.location}: expected --rows A,B with 0 <= A < B <= {length} for conversation {number}, "
            f"found {first},{last}"
        )
    item = reader.read(number, tokens=(first, last))
    norms, teacher = _tap_rms(reader, item), shown_teacher(reader, item, text)
    ids, mask = item.arrays["token_ids"].tolist(), item.loss_mask.tolist()
    return {
        "store": reader.location,
        "conversation": number,
        "split": reader.manifest.splits[item.split],
        "dataset_index": item.dataset_index,
        "content_hash": item.content_hash,
        "shard": int(row["shard"]),
        **{name: int(row[name]) for name in ("tokens", "loss_tokens", "rows", "teacher_rows")},
        "layers": list(reader.manifest.layers),
        "shown": [first, last],
        "table": [
            {
                "position": position,
                "token_id": token_id,
                "text": None if text is None else text(token_id),
                "loss": loss,
                "taps": norms.get(position),
                "teacher": teacher.get(position),
            }
            for position, token_id, loss in zip(range(first, last), ids, mask, strict=True)
        ],
    }


def _tap_rms(reader: StoreReader, item: Conversation) -> dict[int, dict[str, float]]:
    """Return {position: {layer: rms over the hidden size}} of the stored rows."""
    columns = {}
    for layer in reader.manifest.layers:
        states = item.arrays[tap_name(layer)]
        values = states if states.dtype == np.float32 else bf16_to_float32(states)
        columns[str(layer)] = np.sqrt(np.square(values, dtype=np.float64).mean(axis=1)).tolist()
    positions = item.arrays["positions"].tolist()
    return {position: {layer: columns[layer][at] for layer in columns} for at, position in enumerate(positions)}


def token_text(directory: Path) -> Callable[[int], str]:
    """Return a function from a token id to its text, by the tokenizer in a directory.

    Raises InputError if the directory holds no tokenizer that can be loaded.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: expected a directory with a tokenizer, found none")
    if (directory / "tokenizer.json").is_file():  # loading it without transformers is a second faster
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
        return lambda token_id: str(backend.decode([token_id], skip_special_tokens=False))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError) as exc:
        raise InputError(f"{directory}: expected a tokenizer, could not load one ({exc})") from exc
    return lambda token_id: str(tokenizer.decode([token_id], skip_special_tokens=False))
