"""One training run: where it begins or goes on, its optimizer steps, its log and its checkpoints."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftcache.draft_train.checkpoint import (
    blank_optimizer,
    checkpoint_path,
    checkpoints,
    is_best,
    load_optimizer,
    load_state,
    load_weights,
    note_best,
    prune_checkpoints,
    remove_leftovers,
    resolve_checkpoint,
    save_checkpoint,
)
from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.frozen import TrainingSource
from draftcache.draft_train.data.loss_rows import left_out_pairs
from draftcache.draft_train.data.order import Schedule, StepPlan
from draftcache.draft_train.data.packed_batch import BatchLoader
from draftcache.draft_train.data.teacher import TeacherView
from draftcache.draft_train.drafts.protocol import CheckpointState
from draftcache.draft_train.drafts.registry import find_architecture
from draftcache.draft_train.drafts.sizes import VerifierShape
from draftcache.draft_train.fit import require_equal, require_fit, require_window
from draftcache.draft_train.learner import Learner
from draftcache.draft_train.mask_token import with_mask_token
from draftcache.draft_train.optimizer import learning_rate
from draftcache.draft_train.output_lock import OutputLock, output_lock
from draftcache.draft_train.ranks import Ranks
from draftcache.draft_train.run_checks import require_norm, require_work
from draftcache.draft_train.run_log import RunLog, step_record
from draftcache.draft_train.split_checks import held_out_members, trained_members
from draftcache.draft_train.warm_start import require_shape, require_vocabulary, warm_start
from draftcache.store.common.checkout import code_commit, code_version
from draftcache.store.common.device import use_device
from draftcache.store.common.errors import DraftcacheError
from draftcache.store.common.stopping import Stopped, StopRequest


class TrainingStopped(Stopped):
    """The run was asked to stop, and has saved a checkpoint."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(signal_number)
        self.step = step
        """Optimizer steps done."""


class TrainingRun:
    """A run that resumes exactly from its newest checkpoint. `side_by_side` makes the steps of one or several runs."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks | None = None,
        stop: StopRequest | None = None,
        source: TrainingSource | None = None,
    ) -> None:
        """`ranks` is this process among those of the run. `stop` is checked after every step.

        `source` is the opened store of `config.store`, where several runs share it.
        """
        self.ranks = ranks or Ranks(use_device(config.device))
        self.stop = stop or StopRequest()
        self.device = self.ranks.device
        require_work(config, self.ranks)
        source = source or TrainingSource(config.store)
        self.store = source.store
        self.ranks.require_same(config.everywhere() | {"store": self.store.manifest.hash})
        self.config = config = with_mask_token(config, self.store, self.ranks)
        require_norm(config, self.store)
        self.members = trained_members(self.store, config)
        self.held_out = held_out_members(self.store, config, say=self.ranks.leads)
        vocab = self.store.manifest.teacher_form.choose(config.draft_vocab_size)
        self.teacher = TeacherView.of(self.store, vocab, config.top_k)
        self.vocab_map = self.store.vocab_map(vocab.size)
        architecture = find_architecture(config.draft)
        self.shape = architecture.shape_for(config, VerifierShape.of(self.store, vocab.size))
        require_window(self.shape.sliding_window, self.store)
        self.frozen = source.frozen(self.device, vocab)
        self.draft = architecture.build(self.shape, self.device)
        self.draft.initialize(config.seed, self.frozen, config.head_init)
        self.learner = Learner(config, self.draft, self.frozen, self.vocab_map, self.ranks)
        self.model, self.optimizer = self.learner.model, self.learner.optimizer
        self.loader = BatchLoader(
            self.store, needs=self.learner.needs, teacher=self.teacher, loss_rows=config.loss_rows
        )
        reading = config.reading()
        self.schedule = Schedule(
            members=self.members,
            tokens=self.store.index["tokens"],
            order=config.order,
            seed=reading["order_seed"],
            epochs=config.epochs,
            batch_conversations=config.batch_conversations,
            pack_tokens=config.pack_tokens,
            rank=self.ranks.rank,
            world=self.ranks.world,
        )
        self.total_steps = self.schedule.total_steps
        self.step = 0
        self.output_lock = OutputLock()

    def _restore(self) -> None:
        """Start every rank as rank 0 starts: from this run's newest checkpoint, or from --init-from's weights."""
        problem: DraftcacheError | None = None
        if self.ranks.leads:
            try:
                self._load()
            except DraftcacheError as exc:
                problem = exc
        self.ranks.agree(problem)
        step = torch.tensor([self.step], device=self.device)
        self.ranks.copy_from_leader([step, *self.model.parameters()])
        self.step = int(step)
        if self.step and self.ranks.world > 1:
            self.ranks.copy_from_leader(blank_optimizer(self.model, self.optimizer))

    def _load(self) -> None:
        remove_leftovers(self.config.output)
        found = checkpoints(self.config.output)
        if found:
            state = load_state(found[-1])
            self._require_same(found[-1], state)
            load_weights(self.model, found[-1])
            load_optimizer(found[-1], self.model, self.optimizer)
            self.step = state.step
            # A kill may have come between the checkpoint and the record that it is the best.
            note_best(self.config.output, state.step, state.metrics)
        elif self.config.init_from is not None:
            warm_start(
                resolve_checkpoint(self.config.init_from),
                self.draft,
                self.config.draft,
                self.store,
                self.vocab_map,
                remap=self.config.remap_vocab,
                say=self.ranks.leads,
            )

    def _require_same(self, path: Path, state: CheckpointState) -> None:
        require_fit(path, state, self.store)
        require_shape(path, state, self.draft, self.config.draft)
        require_vocabulary(path, state, self.vocab_map, "use another --output")
        saved = self.config.objective_defaults() | state.objective
        pairs = {name: (saved[name], value) for name, value in self.config.objective().items()}
        pairs["store"] = (state.store_hash, self.store.manifest.hash)
        require_equal(path, pairs, "use the same settings to resume it, or another --output")

    @contextmanager
    def started(self) -> Iterator[None]:
        """Hold the run's directory, and bring the run to where it goes on, with all ranks."""
        with output_lock(self.config.output, self.ranks) as self.output_lock:
            self._restore()
            yield
            self.ranks.meet()  # until rank 0 has saved

    def log(self, *, bar: bool) -> AbstractContextManager[RunLog | None]:
        """Return the log of the steps from here on, None on ranks that do not lead. `bar` shows a progress bar."""
        if not self.ranks.leads:
            return nullcontext()
        if self.config.loss_rows == "unshifted":
            left, wanted = left_out_pairs(self.store, self.members, self.learner.needs.steps)
            line = f"--loss-rows unshifted: no teacher is stored for {left} of its {wanted} pairs: left out"
            print(line, file=sys.stderr)
        return RunLog(
            self.config,
            {
                "store": {"location": self.store.location, "hash": self.store.manifest.hash},
                "draft_vocab_hash": self.vocab_map.hash,
                "verifier": self.store.manifest.verifier,
                "device": str(self.device),
                "ranks": self.ranks.world,
                "total_steps": self.total_steps,
            },
            step=self.step,
            total_steps=self.total_steps,
            epoch_tokens=int(self.schedule.tokens[self.members].sum()),
            bar=bar,
        )

    def close_step(self, waited: float) -> None:
        """Close a step whose micro-batches were added to the learner; this rank waited `waited` seconds for them."""
        waits = [0.0] * self.ranks.world
        waits[self.ranks.rank] = waited
        self.learner.close([float(self.stop.asked), *waits])

    def end_step(self, plan: StepPlan, started: float) -> dict[str, Any]:
        """Make the optimizer step of a closed step, and return its record. `started` is by `time.monotonic`."""
        rate = learning_rate(self.config, self.step, self.total_steps)
        norm, (stopping, *waits), figures = self.learner.update(rate, self.step, 1 + self.ranks.world)
        self.step += 1
        self._stopping = bool(stopping)
        return step_record(
            self.step,
            figures,
            rate=rate,
            norm=norm,
            tokens=int(self.schedule.tokens[plan.conversations].sum()),
            seconds=time.monotonic() - started,
            waited=max(waits),
        )

    def finish_step(self, log: RunLog | None, record: dict[str, Any], *, last: bool) -> TrainingStopped | None:
        """Log a step and save it if that is due, if it is the `last`, or if a stop was asked for.

        Returns the error that ends a run that was asked to stop; None where it goes on or is at its end.
        """
        if log is not None:
            self._write(log, record, saving=last or self._stopping or self._due(self.config.checkpoint_every))
        if self._stopping and self.step < self.total_steps:
            self.ranks.meet()
            return TrainingStopped(self.step, self.stop.signal_number)
        return None

    def _write(self, log: RunLog, record: dict[str, Any], *, saving: bool) -> None:
        self.output_lock.require_held()
        try:
            log.write(record)  # before the checkpoint, so that no step of a checkpoint is missing
            if saving or is_best(self.config.output, record):
                self._save(record)
        except OSError:
            self.output_lock.require_held()  # the other run may have removed what was half written
            raise

    def _due(self, every: int) -> bool:
        """Return whether an action that is due every `every` steps (0: never) and after the last step is due now."""
        return every > 0 and (self.step == self.total_steps or self.step % every == 0)

    def evaluation_due(self) -> bool:
        """Return whether the held-out split is to be measured now: every --eval-every steps, and after the last one."""
        return self.held_out.size > 0 and (self.step == self.total_steps or self._due(self.config.eval_every))

    def evaluates_like(self, other: TrainingRun) -> bool:
        """Return whether one reading of the held-out conversations serves both runs' evaluations."""
        return (
            self.device == other.device
            and self.shape.sliding_window == other.shape.sliding_window
            and np.array_equal(self.held_out, other.held_out)
        )

    def _save(self, metrics: dict[str, Any]) -> None:
        state = CheckpointState(
            architecture=self.config.draft,
            step=self.step,
            finished=self.step == self.total_steps,
            objective=self.config.objective(),
            shape=self.shape,
            store_hash=self.store.manifest.hash,
            draft_vocab_hash=self.vocab_map.hash,
            verifier=self.store.manifest.verifier,
            taps=[tap.to_json() for tap in self.store.manifest.taps],
            metrics=metrics,
            longest=int(self.store.index["tokens"].max()),
            code={"version": code_version(), "commit": code_commit()},
        )
        path = checkpoint_path(self.config.output, self.step)
        save_checkpoint(path, state, self.model, self.optimizer, self.vocab_map)
        note_best(self.config.output, self.step, metrics)
        prune_checkpoints(self.config.output, self.config.keep_checkpoints)
