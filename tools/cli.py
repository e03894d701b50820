"""The `draftcache` command: a table of subcommands, each of which is imported only when it is named.

`draftcache --help` imports nothing but argparse and the error classes, so it answers in well under half a second.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import draftcache

# Each subcommand's name, its module (which has add_arguments(parser) and run(arguments) -> exit code), its help line.
COMMANDS: dict[str, tuple[str, str]] = {
    "prepare": (
        "draftcache.tools.commands.prepare",
        "conversations -> token ids, loss masks, counts, draft vocabulary",
    ),
    "generate": ("draftcache.tools.commands.generate", "prompts -> the verifier's own answers, as rows for prepare"),
    "vocab": ("draftcache.tools.commands.vocab", "build one draft-vocabulary map over several prepared datasets"),
    "capture": ("draftcache.tools.commands.capture", "run the frozen verifier once and write its outputs to a store"),
    "import": (
        "draftcache.tools.commands.import_states",
        "make a store of the states that another project cached, with no verifier running",
    ),
    "train": ("draftcache.tools.commands.train", "train the draft from a store, with no verifier in memory"),
    "sweep": ("draftcache.tools.commands.sweep", "train many drafts, several of them on one reading of the store"),
    "eval": ("draftcache.tools.commands.eval", "offline acceptance length of a draft, from a store"),
    "report": ("draftcache.tools.commands.report", "one HTML page on training runs, sweeps, evaluations and stores"),
    "export": ("draftcache.tools.commands.export", "write a checkpoint in the form that an inference engine serves"),
    "size": ("draftcache.tools.commands.size", "bytes and time of a capture, or memory of training, beforehand"),
    "inspect": (
        "draftcache.tools.commands.inspect",
        "what is in a store or prepared dataset, or in one conversation",
    ),
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
    "run": ("draftcache.tools.commands.run", "run a recipe: the steps of a whole job, as sections of one TOML file"),
    "demo": ("draftcache.tools.commands.demo", "the whole pipeline on a tiny verifier and real text"),
}

RESUMED = ("generate", "capture", "import", "train", "sweep", "convert", "run", "demo")
"""Subcommands that keep what is finished when they are interrupted, and go on from it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand of `argv` (default: the process's own arguments) and return the exit code.

    `draftcache.store.common.failures` lists the codes. An error is printed in one line on stderr; --debug shows its
    trace. Where stderr is no terminal, each of its lines begins with the time.
    """
    from draftcache.store.common.log_times import times_on_stderr

    with times_on_stderr():
        return _run(list(sys.argv[1:] if argv is None else argv))


def _run(arguments: list[str]) -> int:
    named = arguments[0] if arguments else ""
    resumes = named in RESUMED

    from draftcache.store.common.failures import DEBUG_VARIABLE, describe_failure, exit_code_of
    from draftcache.tools.results import stdout_for_result

    try:
        if named in COMMANDS and any(word.startswith("--c") for word in arguments):  # --config, or short for it
            from draftcache.tools.config_file import command_parser, with_config

            add_arguments = importlib.import_module(COMMANDS[named][0]).add_arguments
            arguments = [named, *with_config(arguments[1:], lambda: command_parser(add_arguments, named))]
        parsed = _parser(named).parse_args(arguments)
        if parsed.debug:
            os.environ[DEBUG_VARIABLE] = "1"
        resumes = resumes or getattr(parsed, "journal", None) is not None
        module = importlib.import_module(COMMANDS[parsed.command][0])
        with stdout_for_result(as_json=parsed.json):
            code = int(module.run(parsed))
        sys.stdout.flush()
        return code
    except BrokenPipeError as exc:
        # The interpreter flushes stdout once more as it ends, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_code_of(exc)
    except KeyboardInterrupt as exc:
        next_time = "goes on from what was saved" if resumes else "starts from the beginning"
        print(f"draftcache {named}: interrupted; the same command {next_time}", file=sys.stderr)
        return exit_code_of(exc)
    except Exception as exc:
        print(f"draftcache {named}: error: {describe_failure(exc)}", file=sys.stderr)
        return exit_code_of(exc)


def _parser(named: str) -> argparse.ArgumentParser:
    """Return the parser, with the flags of the subcommand `named` only: the modules of the others stay unimported."""
    parser = argparse.ArgumentParser(
        prog="draftcache", description="Train draft models for speculative decoding from stored verifier outputs."
    )
    parser.add_argument("--version", action="version", version=f"draftcache {draftcache.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, help_line) in COMMANDS.items():
        subparser = commands.add_parser(name, help=help_line, description=help_line)
        if name == named:
            from draftcache.tools.config_file import add_common

            importlib.import_module(module_name).add_arguments(subparser)
            add_common(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
