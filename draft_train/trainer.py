"""The training loop: streams batches, steps the optimizer, logs and saves; resumes exactly from the last checkpoint."""

from __future__ import annotations

import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

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
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.data.loss_rows import left_out_pairs
from draftcache.draft_train.data.order import Schedule, StepPlan
from draftcache.draft_train.data.packed_batch import BatchLoader
from draftcache.draft_train.data.prefetch import Prefetcher, ring_bytes
from draftcache.draft_train.data.teacher import TeacherView
from draftcache.draft_train.drafts.protocol import CheckpointState, VerifierShape
from draftcache.draft_train.drafts.registry import find_architecture
from draftcache.draft_train.fit import require_equal, require_fit, require_window
from draftcache.draft_train.loss.objective import Objective, ObjectiveResult
from draftcache.draft_train.measure import measure_draft
from draftcache.draft_train.optimizer import learning_rate, make_optimizer
from draftcache.draft_train.output_lock import OutputLock, output_lock
from draftcache.draft_train.ranks import GradientSums, Ranks, joined_ranks
from draftcache.draft_train.run_checks import require_norm, require_work
from draftcache.draft_train.run_log import RunLog, step_record
from draftcache.draft_train.split_checks import held_out_members, members_of
from draftcache.draft_train.warm_start import require_shape, require_vocabulary, warm_start
from draftcache.store.common.device import choose_device
from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.common.stopping import Stopped, StopRequest
from draftcache.store.reader import StoreReader


class TrainingStopped(Stopped):
    """The run was asked to stop, and has saved a checkpoint."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(signal_number)
        self.step = step
        """Optimizer steps done."""


class Trainer:
    """One training run. `Trainer(config).run()` starts it, or continues it from its newest checkpoint."""

    def __init__(self, config: TrainConfig, ranks: Ranks | None = None, stop: StopRequest | None = None) -> None:
        """`ranks` is this process among those of the run. `stop` is checked after every step."""
        self.config = config
        self.ranks = ranks or Ranks(choose_device(config.device))
        self.stop = stop or StopRequest()
        self.device = self.ranks.device
        require_work(config, self.ranks)
        self.store = StoreReader(config.store)
        require_norm(config, self.store)
        self.members = members_of(self.store, config.splits, "--splits")
        self.held_out = held_out_members(self.store, config, say=self.ranks.leads)
        vocab = self.store.manifest.teacher_form.choose(config.draft_vocab_size)
        self.teacher = TeacherView.of(self.store, vocab)
        self.vocab_map = self.store.vocab_map(vocab.size)
        architecture = find_architecture(config.draft)
        self.shape = architecture.shape_for(config, VerifierShape.of(self.store, vocab.size))
        require_window(self.shape.sliding_window, self.store)
        self.frozen = FrozenWeights.load(self.store, self.device, vocab)
        self.draft = architecture.build(self.shape, self.device)
        self.draft.initialize(config.seed, self.frozen, config.head_init)
        self.model = self.draft.model
        self.needs = self.draft.needs(config)
        self.loader = BatchLoader(self.store, needs=self.needs, teacher=self.teacher, loss_rows=config.loss_rows)
        self.optimizer = make_optimizer(config, self.model)
        self.objective = Objective(
            config,
            torch.from_numpy(self.vocab_map.target_ids).to(self.device),
            torch.from_numpy(self.vocab_map.padded(self.shape.vocab_size).t2d).to(self.device),
            self.frozen.lm_head,
            self.frozen.head_form,
        )
        self.gradients = self.draft.gradient_pass(config, self.objective, self.frozen, say=self.ranks.leads)
        self.sums = GradientSums(self.model, self.ranks)
        self.schedule = Schedule(
            members=self.members,
            tokens=self.store.index["tokens"],
            order=config.order,
            seed=config.seed,
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

    def run(self) -> Path:
        """Train to the end; return the last checkpoint's directory. Raises TrainingStopped if asked to stop."""
        self.ranks.require_same(self.config.everywhere() | {"store": self.store.manifest.hash})
        with output_lock(self.config.output, self.ranks) as self.output_lock:
            self._restore()
            if self.step < self.total_steps:
                self._run_steps()
            self.ranks.meet()  # until rank 0 has saved
        return checkpoint_path(self.config.output, self.total_steps)

    def _run_steps(self) -> None:
        if self.config.loss_rows == "unshifted" and self.ranks.leads:
            left, wanted = left_out_pairs(self.store, self.members, self.needs.steps)
            line = f"--loss-rows unshifted: no teacher is stored for {left} of its {wanted} pairs: left out"
            print(line, file=sys.stderr)
        with self._log() as log, self._prefetcher() as data:
            for plan in self.schedule.steps(self.step):
                self._finish_step(log, self._train_step(plan, data))

    def _finish_step(self, log: RunLog | None, record: dict[str, Any]) -> None:
        """Evaluate, log and save after a step, each of them if it is due."""
        stopping = bool(record.pop("stopping"))
        if self._due(self.config.eval_every):
            record |= self._evaluate()
        if log is not None:
            self._write(log, record, saving=stopping or self._due(self.config.checkpoint_every))
        if stopping and self.step < self.total_steps:
            self.ranks.meet()
            raise TrainingStopped(self.step, self.stop.signal_number)

    def _write(self, log: RunLog, record: dict[str, Any], *, saving: bool) -> None:
        self.output_lock.require_held()
        try:
            log.write(record)  # before the checkpoint, so that no step of a checkpoint is missing
            if saving or is_best(self.config.output, record):
                self._save(record)
        except OSError:
            self.output_lock.require_held()  # the other run may have removed what was half written
            raise

    def _log(self) -> AbstractContextManager[RunLog | None]:
        if not self.ranks.leads:
            return nullcontext()
        return RunLog(
            self.config,
            self.store.manifest.hash,
            step=self.step,
            total_steps=self.total_steps,
            epoch_tokens=int(self.schedule.tokens[self.members].sum()),
        )

    def _prefetcher(self) -> Prefetcher:
        parts = ((part, 1 / len(plan.conversations)) for plan in self.schedule.steps(self.step) for part in plan.parts)
        room = ring_bytes(self.store, self.loader, self.schedule, int(self.config.prefetch_gb * 1e9))
        return Prefetcher(self.store, self.loader, parts, self.device, most_bytes=room)

    def _train_step(self, plan: StepPlan, data: Prefetcher) -> dict[str, Any]:
        started, waited = time.monotonic(), data.waited
        rate = learning_rate(self.config, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        result = ObjectiveResult.zeros(self.needs.steps, self.device)
        for left in reversed(range(len(plan.parts))):
            last = left == 0 and self.ranks.world > 1
            result = result + self.gradients(data.next_batch(), self.sums.ready if last else None)
        self.sums.finish()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        mine = torch.tensor([float(self.stop.asked), *[0.0] * self.ranks.world], dtype=torch.float64)
        mine[1 + self.ranks.rank] = data.waited - waited
        sums = self.ranks.add_up(torch.cat((mine.to(self.device), result.packed())))
        # The step's only wait for the device. Ranks agree on what is not finite, and no weight has changed yet.
        norm_value, stopping, *values = torch.cat((norm.double()[None], sums)).tolist()
        waits, figures = values[: self.ranks.world], values[self.ranks.world :]
        if not math.isfinite(figures[0]) or not math.isfinite(norm_value):
            raise InputError(
                f"step {self.step}: expected a finite loss and gradient, found loss {figures[0]}, norm {norm_value}; "
                "lower --learning-rate, or verify the store"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return step_record(
            self.step,
            figures,
            rate=rate,
            norm=norm_value,
            tokens=int(self.schedule.tokens[plan.conversations].sum()),
            seconds=time.monotonic() - started,
            waited=max(waits),
        ) | {"stopping": stopping}

    def _due(self, every: int) -> bool:
        """Return whether an action that is due every `every` steps (0: never) and after the last step is due now."""
        return every > 0 and (self.step == self.total_steps or self.step % every == 0)

    def _evaluate(self) -> dict[str, Any]:
        """Measure acceptance on --eval-split. Each rank measures its part of the conversations."""
        mine = self.held_out[self.ranks.rank :: self.ranks.world]
        tokens = self.schedule.tokens
        packed = self.config.pack_tokens if self.config.batch_conversations > 1 else int(tokens[self.members].max())
        counts = measure_draft(
            self.draft,
            self.frozen,
            self.store,
            mine,
            compute=self.config.compute,
            pack_tokens=packed,  # so that it takes no more memory than training does
            most_bytes=int(self.config.prefetch_gb * 1e9),
        )
        sums = torch.tensor([counts.tokens, counts.verify_steps], dtype=torch.float64, device=self.device)
        gained, steps = self.ranks.add_up(sums).tolist()
        return {"eval_acceptance_length": gained / max(1.0, steps)}

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
        )
        path = checkpoint_path(self.config.output, self.step)
        save_checkpoint(path, state, self.model, self.optimizer, self.vocab_map)
        note_best(self.config.output, self.step, metrics)
        prune_checkpoints(self.config.output, self.config.keep_checkpoints)


def train(config: TrainConfig, stop: StopRequest | None = None) -> Path:
    """Start or resume a training run, train to its end, and return the last checkpoint's directory.

    Under torchrun, every rank calls this with the same settings. `stop` is checked after every step. Raises
    TrainingStopped, after saving a checkpoint, if a stop was asked for, and InputError or another DraftcacheError for
    settings that do not fit the store.
    """
    with joined_ranks(config.device) as ranks:
        return Trainer(config, ranks, stop).run()
