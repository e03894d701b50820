"""`draftcache train`: train the draft from a store, with no verifier in memory."""

from __future__ import annotations

import argparse
import os
import sys

from draftcache.draft_train.config import TrainConfig
from draftcache.store.common.failures import describe_failure, exit_code_of
from draftcache.tools.arguments import add_settings, read_settings, refuse_renamed
from draftcache.tools.results import add_json, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag per field of TrainConfig."""
    add_settings(parser, TrainConfig)
    refuse_renamed(parser, {"--wandb": "--track", "--wandb-project": "--track-project"})
    add_json(parser)


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError for settings that are out of range, before anything is read."""
    read_settings(TrainConfig, arguments)


def run(arguments: argparse.Namespace) -> int:
    """Train, or resume training, to the last step. Returns the exit code: 0, or the code of the signal that stopped it.

    With several ranks (WORLD_SIZE above 1) the process ends here, and errors are printed instead of raised.
    """
    config = read_settings(TrainConfig, arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _train(config, arguments)
    try:
        code = _train(config, arguments)
    except Exception as exc:
        print(f"draftcache train: error: {describe_failure(exc)}", file=sys.stderr)
        code = exit_code_of(exc)
    except KeyboardInterrupt:  # the second Ctrl-C
        print("draftcache train: interrupted; the same command goes on from what was saved", file=sys.stderr)
        code = 130
    # The interpreter's shutdown is skipped: threads of torch's process group may abort in it, or wait for lost ranks.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _train(config: TrainConfig, arguments: argparse.Namespace) -> int:
    from draftcache.draft_train.ranks import joined_ranks
    from draftcache.draft_train.trainer import Trainer, TrainingStopped
    from draftcache.store.common.stopping import StopRequest, asked_by_signals

    try:
        with asked_by_signals(StopRequest()) as stop, joined_ranks(config.device) as ranks:
            trainer = Trainer(config, ranks, stop)
            last = trainer.run()
    except TrainingStopped as exc:
        print(
            f"draftcache train: stopped after step {exc.step}, which is saved: run the same command again to go on",
            file=sys.stderr,
        )
        return exc.exit_code
    if ranks.leads:
        values = {"output": str(config.output), "checkpoint": str(last), "steps": trainer.total_steps}
        show(arguments, values, f"checkpoint: {last}")
    return 0
