"""`draftcache train`: train the draft from a store, with no verifier in memory."""

from __future__ import annotations

import argparse

from draft_train.config import TrainConfig
from tools.arguments import add_settings, read_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per field of TrainConfig."""
    add_settings(parser, TrainConfig)


def run(arguments: argparse.Namespace) -> int:
    """Train, or resume, to the end."""
    config = read_settings(TrainConfig, arguments)

    from draft_train.trainer import Trainer

    print(f"checkpoint: {Trainer(config).run()}")
    return 0
