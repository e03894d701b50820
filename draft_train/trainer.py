"""The training loop: stream batches, step, log, checkpoint; resume exactly where a killed run was saved."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from draft_train.acceptance import measure_acceptance
from draft_train.batches import Batch, epoch_batches
from draft_train.checkpoint import (
    CheckpointState,
    checkpoint_path,
    checkpoints,
    load_optimizer,
    load_state,
    load_weights,
    prune_checkpoints,
    resolve_checkpoint,
    save_checkpoint,
)
from draft_train.config import DraftShape, TrainConfig
from draft_train.draft_model import DraftModel
from draft_train.fit import require_equal, require_fit, require_window
from draft_train.frozen import FrozenWeights
from draft_train.gradient_pass import GradientPass, PlainPass
from draft_train.objective import Objective
from draft_train.teacher import TeacherView
from store.errors import InputError
from store.files import atomic_path
from store.reader import StoreReader


def choose_device(name: str) -> torch.device:
    """ "auto" takes the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def draft_shape(config: TrainConfig, store: StoreReader) -> DraftShape:
    """The draft that fits this store: hidden size, taps and vocabularies are the store's."""
    manifest = store.manifest
    return DraftShape(
        hidden_size=manifest.hidden_size,
        taps=len(manifest.taps),
        intermediate_size=config.intermediate_size or 3 * manifest.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=int(manifest.verifier["vocab_size"]),
        draft_vocab_size=manifest.teacher_form.choose(config.draft_vocab_size).size,
        sliding_window=config.sliding_window or None,
        rope_theta=config.rope_theta,
        rms_norm_eps=float(manifest.verifier["rms_norm_eps"]),
    )


def untrained_draft(shape: DraftShape, objective: dict[str, Any], frozen: FrozenWeights) -> DraftModel:
    """The draft at step 0 of a run with these settings, on the device of the frozen weights."""
    with torch.device(frozen.embed_tokens.device):
        model = DraftModel(shape)
    from_verifier = objective["head_init"] == "verifier"
    model.initialize(
        int(objective["seed"]),
        head=frozen.lm_head.cpu() if from_verifier else None,
        norm=frozen.norm.cpu() if from_verifier else None,
    )
    return model


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Linear warm-up, then a cosine to `final_lr_ratio` of the peak. `step` counts from 0."""
    warmup = max(1, math.ceil(config.warmup_ratio * total))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    floor = config.final_lr_ratio
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


class Trainer:
    """One run: `Trainer(config).run()` starts it, or continues it from its newest checkpoint."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = choose_device(config.device)
        self.store = StoreReader(config.store)
        vocab = self.store.manifest.teacher_form.choose(config.draft_vocab_size)
        self.teacher = TeacherView.of(self.store, vocab)
        self.vocab_map = self.store.vocab_map(vocab.size)
        self.shape = draft_shape(config, self.store)
        require_window(self.shape.sliding_window, self.store)
        self.members = np.concatenate([self.store.members(split) for split in config.splits])
        if self.members.size == 0:
            raise InputError(f"{config.store}: expected conversations in {list(config.splits)}, found none")
        self.frozen = FrozenWeights.load(self.store, self.device, vocab)
        self.model = untrained_draft(self.shape, config.objective(), self.frozen)
        self.optimizer = self._optimizer()
        self.objective = Objective(
            config,
            torch.from_numpy(self.vocab_map.target_ids).to(self.device),
            torch.from_numpy(self.vocab_map.padded(self.shape.vocab_size).t2d).to(self.device),
            self.frozen.lm_head,
        )
        self.gradients: GradientPass = PlainPass(self.model, self.objective, self.frozen.embed_tokens)
        self.steps_per_epoch = -(-self.members.size // config.batch_conversations)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.step = 0
        self.metrics_path = config.output / "metrics.jsonl"

    def _optimizer(self) -> torch.optim.AdamW:
        config = self.config
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim == 2]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim != 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)

    def _restore(self) -> None:
        """Continue from this run's newest checkpoint, or start from --init-from's weights."""
        found = checkpoints(self.config.output)
        if found:
            state = load_state(found[-1])
            self._require_same(found[-1], state, resuming=True)
            load_weights(self.model, found[-1])
            load_optimizer(found[-1], self.model, self.optimizer)
            self.step = state.step
        elif self.config.init_from is not None:
            path = resolve_checkpoint(self.config.init_from)
            self._require_same(path, load_state(path), resuming=False)
            load_weights(self.model, path)

    def _require_same(self, path: Path, state: CheckpointState, *, resuming: bool) -> None:
        require_fit(path, state, self.store)
        mine = asdict(self.shape)
        require_equal(
            path,
            {f"draft {name}": (value, mine[name]) for name, value in asdict(state.shape).items()},
            "use the same shape, --draft-vocab-size included",
        )
        if resuming:
            objective = self.config.objective()
            pairs = {name: (value, objective.get(name)) for name, value in state.objective.items()}
            pairs["store"] = (state.store_hash, self.store.manifest.hash)
            require_equal(path, pairs, "use the same settings to resume it, or another --output")

    def run(self) -> Path:
        """Train to the end; returns the last checkpoint's directory."""
        self.config.output.mkdir(parents=True, exist_ok=True)
        self._restore()
        _trim_metrics(self.metrics_path, self.step)
        last = checkpoint_path(self.config.output, self.total_steps)
        if self.step >= self.total_steps:
            return last
        tracker = _wandb_run(self.config, self.store.manifest.hash)
        with self.metrics_path.open("a", encoding="utf-8") as metrics, self._bar() as bar:
            for batch in _prefetch(self._batches()):
                record = self._train_step(batch.to(self.device))
                if self.config.eval_every and (
                    self.step % self.config.eval_every == 0 or self.step == self.total_steps
                ):
                    record |= self._evaluate()
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
                if tracker is not None:
                    tracker.log(record, step=self.step)
                bar.update(batch.tokens)
                bar.set_postfix_str(f"step {self.step}/{self.total_steps} loss {record['loss']:.3f}")
                if self.step % self.config.checkpoint_every == 0 or self.step == self.total_steps:
                    self._save(record)
        if tracker is not None:
            tracker.finish()
        return last

    def _bar(self) -> Any:
        tokens = int(self.store.index["tokens"][self.members].sum())
        total = tokens * self.config.epochs
        done = int(total * self.step / self.total_steps)
        return tqdm(total=total, initial=done, unit="tok", unit_scale=True, desc="train")

    def _batches(self) -> Iterator[Batch]:
        for epoch in range(self.step // self.steps_per_epoch, self.config.epochs):
            yield from epoch_batches(
                self.store,
                self.members,
                seed=self.config.seed,
                epoch=epoch,
                first_step=max(0, self.step - epoch * self.steps_per_epoch),
                batch_conversations=self.config.batch_conversations,
                max_steps=self.config.ttt_steps,
                window=self.shape.sliding_window,
                teacher=self.teacher,
                device=self.device,
            )

    def _train_step(self, batch: Batch) -> dict[str, Any]:
        started = time.monotonic()
        rate = learning_rate(self.config, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        result = self.gradients(batch)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        *figures, norm_value = torch.cat((result.packed(), norm.double()[None])).tolist()
        if not math.isfinite(figures[0]) or not math.isfinite(norm_value):
            raise InputError(
                f"step {self.step}: expected a finite loss and gradient, found loss {figures[0]}, norm {norm_value}; "
                "lower --learning-rate, or verify the store"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.monotonic() - started
        return _record(self.step, figures, rate, norm_value, batch.tokens, seconds)

    def _evaluate(self) -> dict[str, Any]:
        assert self.config.eval_split is not None
        members = self.store.members(self.config.eval_split)[: self.config.eval_conversations]
        counts = measure_acceptance(self.model, self.frozen.embed_tokens, self.store, members)
        return {"eval_acceptance_length": counts.acceptance_length}

    def _save(self, metrics: dict[str, Any]) -> None:
        state = CheckpointState(
            step=self.step,
            finished=self.step == self.total_steps,
            objective=self.config.objective(),
            shape=self.shape,
            store_hash=self.store.manifest.hash,
            draft_vocab_hash=self.vocab_map.hash,
            verifier=self.store.manifest.verifier,
            taps=[tap.to_json() for tap in self.store.manifest.taps],
            metrics=metrics,
        )
        path = checkpoint_path(self.config.output, self.step)
        save_checkpoint(path, state, self.model, self.optimizer, self.vocab_map)
        prune_checkpoints(self.config.output, self.config.keep_checkpoints)


def _record(step: int, figures: list[float], rate: float, norm: float, tokens: int, seconds: float) -> dict[str, Any]:
    """`figures`: an `ObjectiveResult`, packed."""
    loss, tail_mass, tail_positions, *by_step = figures
    rows, losses, hits = np.array(by_step).reshape(3, -1)
    taken = rows > 0
    return {
        "step": step,
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "tail_mass": tail_mass / max(1.0, tail_positions),
        "step_loss": (losses[taken] / rows[taken]).tolist(),
        "step_accuracy": (hits[taken] / rows[taken]).tolist(),
    }


def _trim_metrics(path: Path, step: int) -> None:
    """Drop what a killed run logged after the checkpoint that is resumed, so that every step stands there once."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):  # the line that the kill cut
            continue
    with atomic_path(path) as partial:
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _prefetch(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Read the next batch from the store while the current one trains."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(next, batches, None)
        while (batch := waiting.result()) is not None:
            waiting = pool.submit(next, batches, None)
            yield batch


def _wandb_run(config: TrainConfig, store_hash: str) -> Any:
    if config.wandb == "off":
        return None
    try:
        import wandb
    except ImportError as exc:
        raise InputError("--wandb: expected the wandb package, found none; install draftcache[track]") from exc
    settings = config.objective() | {"store": str(config.store), "store_hash": store_hash}
    return wandb.init(
        project=config.wandb_project,
        mode=config.wandb,  # type: ignore[arg-type]  # checked by TrainConfig
        config=settings,
        dir=str(config.output),
    )
