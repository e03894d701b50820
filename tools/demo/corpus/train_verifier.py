"""Train the demo's verifier on one GPU.

    python -m draftcache.tools.demo.corpus.train_verifier --corpus DIR --output DIR --epochs N

The task is causal language modelling on whole conversations in the chat template. The loss is on all tokens, not on
the assistant's alone: the user's turns are as much real text as the answers, and a model this small learns the
language from both. Windows of 1,024 tokens start at a conversation boundary. Conversations are shuffled and packed
anew every epoch, separated by <|endoftext|>, and a conversation that did not fit opens the next window.

The optimizer is AdamW on fp32 master weights under bf16 autocast; the learning rate warms up and then follows a cosine
over the epochs. Expert load is balanced without an auxiliary loss: after each step every expert's selection bias moves
by 1e-3 towards the mean load (DeepSeek-V3, section 2.1.2). The weights with the lowest held-out loss are kept.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import NemotronHForCausalLM
from transformers.models.nemotron_h import modeling_nemotron_h

from draftcache.store.common.errors import InputError
from draftcache.store.common.files import write_json
from draftcache.tools.demo.corpus import training_kernels
from draftcache.tools.demo.corpus.evaluate_verifier import HeldOut, held_out_losses, perplexities
from draftcache.tools.demo.corpus.verifier_model import build_model, load_model, save_model

__all__ = ["TrainingPlan", "main", "packed_windows", "train"]

_FUNCTIONS = ("mamba2_chunk_scan", "causal_conv1d_fn", "mamba2_split_conv1d_scan_combined")


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The settings of a run."""

    epochs: float
    """Passes over the corpus. Held-out loss is lowest at about 15; more passes overfit."""
    batch: int = 64
    """Windows per step."""
    window: int = 1024
    """Tokens per window; a multiple of the scan's chunk."""
    learning_rate: float = 2.5e-3
    final_share: float = 0.02
    """The learning rate at the end, as a share of the peak."""
    warmup_steps: int = 150
    weight_decay: float = 0.1
    dropout: float = 0.1
    """Dropout rate on every block's output while training."""
    balance_rate: float = 1e-3
    evaluations: int = 10
    seed: int = 20250
    compile: bool = True


@dataclass
class _Record:
    """The held-out losses so far, for training_log.json."""

    curve: list[dict[str, float]] = field(default_factory=list)
    best: float = math.inf
    best_step: int = 0


def packed_windows(
    tokens: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], window: int, rng: np.random.Generator
) -> Iterator[np.ndarray[Any, Any]]:
    """Yield one epoch's windows of `window + 1` ids (inputs and shifted targets), conversations in random order."""
    ends = np.cumsum(lengths)
    filled: list[np.ndarray[Any, Any]] = []
    size, end_of_text = 0, np.zeros(1, tokens.dtype)
    for index in rng.permutation(len(lengths)):
        piece = np.concatenate([tokens[ends[index] - lengths[index] : ends[index]], end_of_text])
        filled.append(piece)
        size += len(piece)
        if size > window:
            yield np.concatenate(filled)[: window + 1]
            carried = size > window + 1 and len(filled) > 1
            filled, size = ([piece], len(piece)) if carried and len(piece) <= window else ([], 0)


def batches(corpus: Path, plan: TrainingPlan, device: torch.device) -> Iterator[tuple[float, Tensor]]:
    """Yield (epochs so far, ids [batch, window + 1] int64 on `device`) without end."""
    with np.load(corpus / "tokens.npz", allow_pickle=False) as arrays:
        tokens, lengths = arrays["train_tokens"], arrays["train_lengths"]
    rng = np.random.default_rng(plan.seed)
    rows: list[np.ndarray[Any, Any]] = []
    drawn, epoch = 0, 0
    while True:
        for row in packed_windows(tokens, lengths, plan.window, rng):
            rows.append(row)
            if len(rows) == plan.batch:
                drawn += plan.batch * plan.window
                ids = torch.from_numpy(np.stack(rows).astype(np.int64))
                yield drawn / len(tokens), ids.to(device, non_blocking=True)
                rows = []
        epoch += 1


def _drop_outputs(model: nn.Module, share: float) -> None:
    """Add dropout to each block's contribution to the residual stream. It is inactive in eval mode."""

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], share, module.training), *output[1:])
        return F.dropout(output, share, module.training)

    for layer in model.get_submodule("model.layers").children():
        layer.get_submodule("mixer").register_forward_hook(hook)


def _optimizer(model: nn.Module, plan: TrainingPlan, device: torch.device) -> torch.optim.Optimizer:
    """Return an AdamW that does not decay vectors (norms, A_log, D, biases) and the convolution."""
    decayed = [p for name, p in model.named_parameters() if p.dim() >= 2 and "conv1d" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or "conv1d" in name]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=device.type == "cuda")


def _learning_rate(plan: TrainingPlan, step: int, progress: float) -> float:
    warm = min(1.0, (step + 1) / plan.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return plan.learning_rate * warm * (plan.final_share + (1 - plan.final_share) * cosine)


def _head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _balance(model: nn.Module, rate: float, totals: Tensor) -> None:
    """Balance the experts' load: raise the selection bias of experts below the mean load, and lower the others.

    `totals` [MoE blocks, 4] gathers the loads with a decay of 0.99 per step.
    """
    moes = [m for m in model.modules() if hasattr(m, "shared_experts")]
    for row, moe in enumerate(moes):
        counts = moe.get_buffer("experts.expert_counts")
        moe.get_buffer("gate.e_score_correction_bias").add_(torch.sign(counts.mean() - counts), alpha=rate)
        totals[row].mul_(0.99).add_(counts)
        counts.zero_()


def _forget_counts(model: nn.Module) -> None:
    """Zero the expert counts, because an evaluation's padded tokens must not influence the balance."""
    for name, buffer in model.named_buffers():
        if name.endswith("expert_counts"):
            buffer.zero_()


def train(corpus: Path, output: Path, plan: TrainingPlan) -> dict[str, Any]:
    """Train, keep the best weights in `output`, and return the log as JSON values (loss in nats per token)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    held_out = HeldOut.read(corpus, device)
    model = build_model(plan.seed).to(device)
    training_kernels.install(model, modeling_nemotron_h)
    _drop_outputs(model, plan.dropout)
    optimizer = _optimizer(model, plan, device)
    head_loss = _head_loss
    if plan.compile:
        torch._dynamo.config.cache_size_limit = 64
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        head_loss = torch.compile(_head_loss, dynamic=False)
    record = _Record()
    totals = torch.zeros(sum(hasattr(m, "shared_experts") for m in model.modules()), 4, device=device)
    started, running, next_check = time.monotonic(), torch.zeros((), device=device), 1.0 / plan.evaluations
    for step, (epochs, ids) in enumerate(batches(corpus, plan, device)):
        progress = epochs / plan.epochs
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(plan, step, progress)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            masks = {"full_attention": None, "linear_attention": None}
            hidden = model.model(input_ids=ids[:, :-1], attention_mask=masks, use_cache=False).last_hidden_state
            loss = head_loss(hidden, model.lm_head.weight, ids[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _balance(model, plan.balance_rate, totals)
        running = loss.detach() if step == 0 else running.lerp(loss.detach(), 0.02)
        if step == 0 or progress >= next_check or progress >= 1:
            next_check = max(next_check, progress) + 1.0 / plan.evaluations
            _checkpoint(model, held_out, output, record, step, epochs, progress, float(running))
            _forget_counts(model)
        if progress >= 1:
            break
    shares = (totals / totals.sum(1, keepdim=True)).tolist()
    return _log(plan, record, shares, (time.monotonic() - started) / 60, device)


def _checkpoint(
    model: nn.Module,
    held_out: HeldOut,
    output: Path,
    record: _Record,
    step: int,
    epochs: float,
    progress: float,
    running: float,
) -> None:
    """Measure the held-out loss on a part of the split and save the weights where it is the lowest so far."""
    value = float(np.mean(list(held_out_losses(model, held_out, limit=448).values())))
    record.curve.append(
        {
            "step": step,
            "epochs": round(epochs, 3),
            "progress": round(progress, 4),
            "train_loss": round(running, 4),
            "held_out_loss": round(value, 4),
        }
    )
    print(record.curve[-1], flush=True)
    if not math.isfinite(value):
        raise InputError(f"the held-out loss is {value} at step {step}: lower the learning rate")
    if value < record.best and step > 0:
        record.best, record.best_step = value, step
        save_model(model, output)


def _log(
    plan: TrainingPlan, record: _Record, shares: list[list[float]], minutes: float, device: torch.device
) -> dict[str, Any]:
    return {
        "plan": vars(plan),
        "minutes": round(minutes, 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "best_step": record.best_step,
        "curve": record.curve,
        "expert_shares": [[round(share, 4) for share in row] for row in shares],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Train, then load the saved weights with the unmodified model code and measure their held-out perplexity."""
    parser = argparse.ArgumentParser(description="Train the demo's verifier.")
    parser.add_argument("--corpus", type=Path, required=True, help="holds tokens.npz and tokenizer/")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=14.0)
    parser.add_argument("--batch", type=int, default=TrainingPlan.batch)
    parser.add_argument("--window", type=int, default=TrainingPlan.window)
    parser.add_argument("--learning-rate", type=float, default=TrainingPlan.learning_rate)
    parser.add_argument("--evaluations", type=int, default=TrainingPlan.evaluations)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args(argv)
    plan = TrainingPlan(
        epochs=arguments.epochs,
        batch=arguments.batch,
        window=arguments.window,
        learning_rate=arguments.learning_rate,
        evaluations=arguments.evaluations,
        compile=not arguments.no_compile,
    )
    originals = {name: getattr(modeling_nemotron_h, name) for name in _FUNCTIONS}
    log = train(arguments.corpus, arguments.output, plan)
    for name, function in originals.items():
        setattr(modeling_nemotron_h, name, function)
    shutil.copytree(arguments.corpus / "tokenizer", arguments.output, dirs_exist_ok=True)
    write_json(arguments.output / "training_log.json", log)
    model: NemotronHForCausalLM = load_model(arguments.output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    log["held_out"] = perplexities(model.to(device), HeldOut.read(arguments.corpus, device))
    write_json(arguments.output / "training_log.json", log)
    print(log["held_out"], log["expert_shares"], flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
