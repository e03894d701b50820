"""`draftcache import`: make a store of the hidden states that another project cached."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.peers.config import NAMING_LAYERS, PEERS, ImportConfig
from draftcache.store.common.errors import InputError
from draftcache.tools.arguments import add_settings, numbers
from draftcache.tools.results import add_json, show

if TYPE_CHECKING:
    from draftcache.capture.peers.job import ImportSummary

_CAPTURE = (
    *("verifier", "output", "vocab_map", "more_vocab_maps", "window", "teacher", "top_k", "mode", "layout"),
    *("calibration_tokens", "device", "shard_tokens", "head_slice", "batch_tokens", "buffer_gb", "grace_seconds"),
    *("ignore_free_space", "full_hash", "trust_remote_code"),
)
"""The settings of a capture that an import has too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags: what the files don't say, and those of `draftcache capture` that don't run a verifier."""
    parser.add_argument("source", type=Path, help="folder of the other project's files")
    parser.add_argument(
        "--from",
        dest="peer",
        required=True,
        metavar="PROJECT",
        help=f"{', '.join(PEERS)}; speculators stands for what vLLM's hidden-states connector writes",
    )
    parser.add_argument(
        "--layers",
        type=numbers,
        default=(),
        help="blocks whose outputs the files hold, counted from 0, in the files' order (a layer id k of vLLM or SGLang "
        "is block k-1); the last block too, where the files' last state is from before the final norm and is to be "
        f"kept as a tap (default: as the cache says, which {' and '.join(NAMING_LAYERS)} do)",
    )
    add_settings(parser, CaptureConfig, only=_CAPTURE)
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="the tokenizer that made the ids (default: the verifier's)"
    )
    parser.add_argument(
        "--masks",
        default="",
        metavar="ROWS",
        help="rows with the loss masks, as prepare reads them, found by their token ids; or all, if every token "
        "carries loss (default: the masks in the files)",
    )
    parser.add_argument("--split", default="train", metavar="NAME", help="the split's name (%(default)s)")
    parser.add_argument(
        "--held-out",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="a further folder, as a split that is not counted into the draft vocabulary (repeatable)",
    )
    parser.add_argument("--draft-vocab-size", type=int, metavar="N", help="count a draft vocabulary of N ids")
    parser.add_argument(
        "--probe",
        action=argparse.BooleanOptionalAction,
        help="load the verifier and compare some rows with its own states (default: if its weights are at most 4 GB)",
    )
    parser.add_argument(
        "--last-state",
        default="",
        metavar="WHERE",
        help="before or after the final norm, where the evidence leaves open where the last state is from; the "
        "verifier is not loaded then",
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="folder for the rows, what was set aside and the prepared dataset (default: OUTPUT.import)",
    )
    add_json(parser)


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError for settings that are out of range, before anything is read."""
    _config(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Import and print what was found, what is not known, and what was set aside.

    Returns 1 if a file was set aside or a conversation quarantined, 143 after SIGTERM, 130 after SIGINT, else 0.
    """
    config, work = _config(arguments)

    from draftcache.capture.peers.job import run_import
    from draftcache.store.common.stopping import Stopped

    try:
        summary = run_import(config, work, say=lambda line: print(line, file=sys.stderr))
    except Stopped as exc:
        print("draftcache import: stopped; run the same command again to go on", file=sys.stderr)
        return exc.exit_code
    values = _values(config, work, summary)
    show(arguments, values, _format(values))
    return 1 if values["set_aside"] or values["quarantined"] or values["prepared_rows_quarantined"] else 0


def _config(arguments: argparse.Namespace) -> tuple[ImportConfig, Path]:
    work = arguments.work
    if work is None:
        if "://" in str(arguments.output):
            raise InputError(f"--output {arguments.output}: expected --work DIR beside a store that is no directory")
        work = Path(f"{arguments.output}.import")
    named = [pair.partition("=") for pair in arguments.held_out]
    if wrong := ["".join(parts) for parts in named if not parts[0] or not parts[2]]:
        raise InputError(f"--held-out: expected NAME=SOURCE, found {wrong[0]!r}")
    capture = CaptureConfig(
        dataset=work / "prepared",
        layers=arguments.layers,
        **{name: getattr(arguments, name) for name in _CAPTURE},
    )
    config = ImportConfig(
        peer=arguments.peer,
        source=arguments.source,
        capture=capture,
        tokenizer=arguments.tokenizer or arguments.verifier,
        split=arguments.split,
        held_out=tuple((name, Path(source)) for name, _, source in named),
        masks=arguments.masks,
        last_state=arguments.last_state,
        probe=arguments.probe,
        draft_vocab_size=arguments.draft_vocab_size,
    )
    return config, work


def _values(config: ImportConfig, work: Path, summary: ImportSummary) -> dict[str, Any]:
    from draftcache.store.reader import StoreReader

    store = StoreReader(config.capture.output)
    tokens = int(store.index["tokens"].sum())
    return {
        "store": str(config.capture.output),
        "dataset": str(config.capture.dataset),
        "conversations": len(store),
        "tokens": tokens,
        "bytes_per_token": store.bytes_on_disk() / max(tokens, 1),
        "files": summary.files,
        "set_aside": [asdict(item) for item in summary.set_aside],
        "set_aside_file": str(work / "rows" / "set_aside.jsonl"),
        "prepared_rows_quarantined": summary.prepared_rows_quarantined,
        "quarantined": summary.capture.quarantined,
        "findings": summary.findings,
    }


def _format(values: dict[str, Any]) -> str:
    found = values["findings"]
    lines = [
        f"{values['store']}: {values['conversations']:,} conversations, {values['tokens']:,} tokens, "
        f"{values['bytes_per_token']:,.0f} bytes/token, of {values['files']:,} files of {found['from']}; "
        f"{len(values['set_aside'])} set aside, {len(values['quarantined'])} conversations quarantined",
        f"  last state: {found['last_state']} the final norm ({found['last_state_by']})",
        f"  auxiliary states: {found['auxiliary_states']}",
        f"  loss masks: {found['loss_masks']}; tokenizer: {found['tokenizer']}; weights: {found['weights']}",
    ]
    if left_out := found.get("states_left_out"):
        lines.append(f"  left out, as they are no block's output: {', '.join(left_out)}")
    lines += [f"  set aside {item['file']}: {item['reason']}" for item in values["set_aside"][:20]]
    if len(values["set_aside"]) > 20:
        lines.append(f"  and {len(values['set_aside']) - 20} more: {values['set_aside_file']}")
    lines += [
        f"  quarantined {item['split']}[{item['dataset_index']}] {item['content_hash']}: {item['reason']}"
        for item in values["quarantined"]
    ]
    return "\n".join(lines)
