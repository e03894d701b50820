"""The `draftcache` command: a table of subcommands, each of which is imported only when it is named.

`draftcache --help` imports nothing but argparse and the error classes, so it answers in well under half a second.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import draftcache

# Each subcommand's name, its module (which has add_arguments(parser) and run(arguments) -> exit code), its help line.
COMMANDS: dict[str, tuple[str, str]] = {
    "prepare": (
        "draftcache.tools.commands.prepare",
        "conversations -> token ids, loss masks, counts, draft vocabulary",
    ),
    "vocab": ("draftcache.tools.commands.vocab", "build one draft-vocabulary map over several prepared datasets"),
    "capture": ("draftcache.tools.commands.capture", "run the frozen verifier once and write its outputs to a store"),
    "train": ("draftcache.tools.commands.train", "train the draft from a store, with no verifier in memory"),
    "eval": ("draftcache.tools.commands.eval", "offline acceptance length of a draft, from a store"),
    "export": ("draftcache.tools.commands.export", "write a checkpoint in the form that an inference engine serves"),
    "size": ("draftcache.tools.commands.size", "bytes and time of a capture, or memory of training, beforehand"),
    "inspect": ("draftcache.tools.commands.inspect", "what is in a store, or in one of its conversations"),
    "probe": (
        "draftcache.tools.commands.probe",
        "dump the verifier's states on a fixed input, or compare them with an engine's",
    ),
    "verify": ("draftcache.tools.commands.verify", "check every byte and every row of a store; name what is damaged"),
    "convert": (
        "draftcache.tools.commands.convert",
        "copy a store into another layout, mode or shard size, bit-checked",
    ),
    "repair": (
        "draftcache.tools.commands.repair",
        "take damaged shards out of a store, so that capture makes them again",
    ),
    "demo": ("draftcache.tools.commands.demo", "the whole pipeline on a tiny verifier and real text"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand of `argv` (default: the process's own arguments) and return the exit code.

    0: done; 1: done, but rows were quarantined or a check failed; 2: refused, with an error on stderr; 130: interrupted
    by Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="draftcache", description="Train draft models for speculative decoding from stored verifier outputs."
    )
    parser.add_argument("--version", action="version", version=f"draftcache {draftcache.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named = arguments[0] if arguments else ""
    for name, (module_name, help_line) in COMMANDS.items():
        subparser = commands.add_parser(name, help=help_line, description=help_line)
        if name == named:
            importlib.import_module(module_name).add_arguments(subparser)

    from draftcache.store.common.errors import DraftcacheError

    try:
        parsed = parser.parse_args(arguments)
        module = importlib.import_module(COMMANDS[parsed.command][0])
        return int(module.run(parsed))
    except DraftcacheError as exc:
        print(f"draftcache {named}: error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"draftcache {named}: interrupted; run the same command again to resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
