"""Trains one draft: `train(config)` starts a run, or continues it from its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

from draftcache.draft_train.checkpoint import checkpoint_path
from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.ranks import joined_ranks
from draftcache.draft_train.side_by_side import train_side_by_side
from draftcache.draft_train.training_run import TrainingRun, TrainingStopped
from draftcache.store.common.stopping import StopRequest

__all__ = ["Trainer", "TrainingStopped", "train"]


class Trainer(TrainingRun):
    """One training run by itself."""

    def run(self) -> Path:
        """Train to the end; return the last checkpoint's directory. Raises TrainingStopped if asked to stop."""
        with self.started():
            train_side_by_side([self])
        return checkpoint_path(self.config.output, self.total_steps)


def train(config: TrainConfig, stop: StopRequest | None = None) -> Path:
    """Start or resume a training run, train to its end, and return the last checkpoint's directory.

    Under torchrun, every rank calls this with the same settings. `stop` is checked after every step. Raises
    TrainingStopped, after saving a checkpoint, if a stop was asked for, and InputError or another DraftcacheError for
    settings that do not fit the store.
    """
    with joined_ranks(config.device) as ranks:
        return Trainer(config, ranks, stop).run()
