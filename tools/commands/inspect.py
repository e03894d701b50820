"""`draftcache inspect`: what a store or a prepared dataset holds, in a second; or one of its conversations, decoded."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from draftcache.tools.reports.histogram import format_lengths
from draftcache.tools.reports.terminal_text import quoted
from draftcache.tools.results import add_json, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose a store or a dataset and, optionally, one of its conversations."""
    parser.add_argument("store", help="directory, file://, s3:// or gs:// URL of a store; or a prepared dataset")
    parser.add_argument(
        "--conversation",
        type=int,
        metavar="N",
        help="show the conversation N: of a store's index, or of a split of a prepared dataset",
    )
    parser.add_argument(
        "--split", help="a store: decode a conversation of this split, with --index; a dataset: default the first"
    )
    parser.add_argument("--index", type=int, metavar="N", help="a store, with --split: number in the prepared dataset")
    parser.add_argument(
        "--rows",
        metavar="A,B",
        help="tokens A .. B-1 of the conversation as a table (default: the first 64 of a store's; a dataset's as text)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="tokenizer, to show tokens as text (a dataset has its own)"
    )
    parser.add_argument("--allow-partial", action="store_true", help="accept a store whose capture has not finished")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print a summary of the store or dataset, or the chosen conversation. Returns 0.

    Raises InputError for flags that do not go together.
    """
    from draftcache.capture.prepare.token_dataset import is_prepared

    if is_prepared(Path(arguments.store)):
        from draftcache.tools.commands.inspect_dataset import run_dataset

        return run_dataset(arguments, None if arguments.rows is None else parse_rows(arguments.rows))
    return _run_store(arguments)


def _run_store(arguments: argparse.Namespace) -> int:
    from draftcache.store.common.errors import InputError
    from draftcache.tools.reports.inspection import summarise

    if (arguments.split is None) != (arguments.index is None):
        raise InputError(
            "expected --split and --index together, found one of them (--split goes with --conversation for prepared "
            f"datasets, and {arguments.store} is none)"
        )
    if arguments.conversation is not None and arguments.split is not None:
        raise InputError("expected --conversation, or --split and --index, found all of them")
    if arguments.conversation is None and arguments.split is None:
        for flag in ("rows", "tokenizer"):
            if getattr(arguments, flag) is not None:
                raise InputError(f"--{flag}: expected --conversation, or --split and --index, beside it, found neither")
        result = summarise(arguments.store, allow_partial=arguments.allow_partial)
        result["finished"] = _state(arguments.store, result["shards_planned"], result["shards_committed"])
        show(arguments, result, format_summary(result))
        return 0
    result = _conversation(arguments)
    show(arguments, result, format_conversation(result))
    return 0


def _state(location: str, planned: int, committed: int) -> bool:
    """Return whether the store is finished, and say so on stderr where it is not.

    Raises ShardDamagedError where it is finished, by the record of its index, and yet lacks commit records.
    """
    from draftcache.store.common.errors import ShardDamagedError
    from draftcache.store.format.index import find_index_record
    from draftcache.store.storage.base import open_storage

    if find_index_record(open_storage(location)) is None:
        print(
            f"warning: {location} is not finished: {committed} of {planned} shards are committed, and only their "
            "conversations are shown; run the capture command to finish it",
            file=sys.stderr,
        )
        return False
    if committed != planned:
        raise ShardDamagedError(
            f"{location}: expected the commit records of all {planned} shards of a finished store, found {committed}; "
            "run `draftcache verify` on it to see which, then `draftcache repair` and the capture command"
        )
    return True


def _conversation(arguments: argparse.Namespace) -> dict[str, Any]:
    from draftcache.store.reader import StoreReader
    from draftcache.tools.reports.inspection import decode_conversation, find_conversation, token_text

    rows = None if arguments.rows is None else parse_rows(arguments.rows)
    text = None if arguments.tokenizer is None else token_text(arguments.tokenizer)
    reader = StoreReader(arguments.store, allow_partial=arguments.allow_partial)
    try:
        number = arguments.conversation
        if number is None:
            number = find_conversation(reader, arguments.split, arguments.index)
        if not reader.finished:
            print(
                f"warning: {arguments.store} is not finished; only what is committed is there to be shown",
                file=sys.stderr,
            )
        return decode_conversation(reader, number, rows=rows, text=text)
    finally:
        reader.close()


def parse_rows(text: str) -> tuple[int, int]:
    """Parse `A,B` into two numbers of tokens. Raises InputError for any other text."""
    from draftcache.store.common.errors import InputError

    first, comma, last = text.partition(",")
    if not comma or not first.strip().isdigit() or not last.strip().isdigit():
        raise InputError(f"--rows: expected A,B, two numbers of tokens, found {text!r}")
    return int(first), int(last)


def format_summary(found: dict[str, Any]) -> str:
    """Format what `draftcache.tools.reports.inspection.summarise` returns."""
    verifier, sizes = found["verifier"], found["bytes"]
    lines = [
        f"store       {found['store']}",
        f"verifier    {verifier.get('name')} ({verifier.get('architecture')}, hidden {verifier.get('hidden_size')}, "
        f"vocabulary {verifier.get('vocab_size')}), ran in {found['compute_dtype']}",
        *(
            f"tap         output of block {tap['layer']} = HF hidden_states[{tap['hf_hidden_states_index']}] = "
            f"vLLM aux id {tap['vllm_aux_id']}"
            for tap in found["taps"]
        ),
        f"form        mode {found['mode']}, layout {found['layout']}, window {found['window'] or 'none'}, "
        f"teacher {found['teacher']}, top-k {found['top_k'] or 'none'}",
        f"draft vocab {found['draft_vocab_size']:,} of {verifier.get('vocab_size')}, {found['draft_vocab_hash']}",
        *(f"  and       {int(size):,}, {value}" for size, value in found["more_draft_vocabs"].items()),
        f"SSM state   {_pairs(found['ssm']) if found['ssm'] else 'none: the verifier has no Mamba block'}",
        f"shards      {found['shards_committed']:,} of {found['shards_planned']:,} committed",
        "",
        f"{'split':<20} {'conversations':>14} {'tokens':>16}",
        *(
            f"{name:<20} {row['conversations']:>14,} {row['tokens']:>16,}"
            for name, row in {
                **found["splits"],
                "all": {"conversations": found["conversations"], "tokens": found["tokens"]},
            }.items()
        ),
        "",
        f"loss        {found['loss_tokens']:,} tokens ({found['loss_fraction']:.1%}), "
        f"teacher at {found['teacher_positions']:,} positions",
        f"reach       {found['rows']:,} rows kept, {found['reach_saved']:.1%} saved",
        *format_lengths("lengths", found["lengths"]),
        "",
        *_format_bytes(sizes),
        "",
        _format_tail(found["tail_mass"], found["teacher"]),
        *(
            f"tap norm    block {layer}: rms {row['rms']:.4g}, log-sigma {row['log_sigma']:.3f} over "
            f"{row['conversations']:,} conversations"
            for layer, row in found["tap_norms"].items()
        ),
        f"quarantined {len(found['quarantined'])} conversations",
        *(f"  {item['split']}[{item['dataset_index']}] {item['reason']}" for item in found["quarantined"]),
    ]
    return "\n".join(lines)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _format_bytes(sizes: dict[str, Any]) -> list[str]:
    total = sizes["shards"] or 1
    return [
        f"{'array':<24} {'bytes':>18} {'per token':>12} {'share':>7}",
        *(
            f"{name:<24} {row['bytes']:>18,} {row['per_token']:>12,.2f} {row['bytes'] / total:>7.1%}"
            for name, row in sizes["arrays"].items()
        ),
        f"{'all shards':<24} {sizes['shards']:>18,} {sizes['per_token']:>12,.2f}",
        *(f"{name:<24} {size:>18,}" for name, size in sizes["files"].items()),
        f"{'total':<24} {sizes['total']:>18,}  ({sizes['total'] / 1e9:,.3f} GB)",
    ]


def _format_tail(tail: dict[str, Any] | None, teacher: str) -> str:
    if tail is None:
        return f"tail mass   {'none: states leave nothing out' if teacher == 'hidden' else 'not recorded'}"
    return (
        f"tail mass   mean {tail['mean']:.3g}, largest p99 of a shard {tail['max_p99']:.3g}: probability, within the "
        f"draft vocabulary, beyond the stored top-k ({tail['count']:,} positions)"
    )


def format_conversation(found: dict[str, Any]) -> str:
    """Format what `draftcache.tools.reports.inspection.decode_conversation` returns, one line per token.

    The teacher's columns of a line describe the token that follows.
    """
    first, last = found["shown"]
    layers = [str(layer) for layer in found["layers"]]
    with_text = any(row["text"] is not None for row in found["table"])
    head = f"{'pos':>7} {'id':>7} " + (f"{'text':<16} " if with_text else "") + "loss "
    head += "".join(f"{'rms ' + layer:>9} " for layer in layers) + f"{'p(next)':>8} {'tail':>8}  teacher"
    lines = [
        f"conversation {found['conversation']} = {found['split']}[{found['dataset_index']}] {found['content_hash']} in "
        f"shard {found['shard']}",
        f"{found['tokens']:,} tokens, {found['loss_tokens']:,} with loss, {found['rows']:,} rows, "
        f"{found['teacher_rows']:,} teacher positions; tokens {first} .. {last - 1}:",
        "",
        head,
    ]
    for row in found["table"]:
        cells = f"{row['position']:>7} {row['token_id']:>7} " + (f"{quoted(row['text']):<16} " if with_text else "")
        cells += f"{'x' if row['loss'] else '':>4} "
        cells += "".join(f"{'-' if row['taps'] is None else format(row['taps'][name], '.4g'):>9} " for name in layers)
        lines.append((cells + _format_teacher(row["teacher"])).rstrip())
    return "\n".join(lines)


def _format_teacher(teacher: dict[str, Any] | None) -> str:
    if teacher is None:
        return ""
    choices = "  ".join(
        f"{item['token_id'] if item['text'] is None else quoted(item['text'])} {item['probability']:.3f}"
        for item in teacher["choices"]
    )
    tail = "-" if teacher["tail_mass"] is None else f"{teacher['tail_mass']:.1e}"
    return f"{teacher['next_token_probability']:>8.4f} {tail:>8}  {choices}"
