"""The cases of `draftcache.tools.bench.train`: a 30B verifier's draft, trained on random states and teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from draftcache.draft_train.data.batches import Batch, HostRows
from draftcache.draft_train.drafts.eagle3.shape import Eagle3Shape
from draftcache.draft_train.drafts.sizes import Shape

SHAPE = Eagle3Shape(
    hidden_size=2688, taps=3, intermediate_size=8064, num_attention_heads=32, num_key_value_heads=2, head_dim=128,
    vocab_size=131_072, draft_vocab_size=32_000, sliding_window=4096, rope_theta=10_000.0, rms_norm_eps=1e-5,
)  # fmt: skip
STEPS, TOP_K, TURNS = 6, 64, 8


class TapsShape(Shape, Protocol):
    """The shape of a draft that reads taps."""

    @property
    def taps(self) -> int:
        """Number of taps side by side."""


@dataclass(frozen=True)
class Case:
    """The lengths of one batch's conversations, the share of rows that carry loss, and whether to recompute the MLP."""

    lengths: tuple[int, ...]
    share: float = 1.0
    lean: bool = False
    anchors: int = 0
    """Start rows of a conversation that are trained on, drawn at random; 0 for all."""


CASES = {
    "train-32k": Case((32_768,)),
    "train-32k-lean": Case((32_768,), lean=True),
    "train-32k-90": Case((32_768,), 0.9),
    "train-32k-48": Case((32_768,), 0.48),
    "train-8k": Case((8192,)),
    "train-8k-packed": Case((8192,) * 4),
    "train-64k": Case((65_536,)),
    "train-64k-lean": Case((65_536,), lean=True),
    "train-256k": Case((262_144,), lean=True),
}


def synthetic_batch(
    case: Case, device: torch.device, shape: TapsShape = SHAPE, steps: int = STEPS, *, text: bool = False
) -> Batch:
    """Return a batch of random states and teacher: conversations of 8 turns, with the loss rows at each turn's end.

    `steps` are the most tokens that are predicted from a start row. `text` asks for `next_tokens`.
    """
    parts = [_conversation(length, case, steps) for length in case.lengths]
    sizes = [rows.numel() for rows, _ in parts]
    first_row = [sum(case.lengths[:number]) for number in range(len(parts))]
    starts = torch.cat([rows + first for (rows, _), first in zip(parts, first_row, strict=True)])
    left = torch.cat([left for _, left in parts])
    positions = [torch.arange(length) + 2 * number * 300_000 for number, length in enumerate(case.lengths)]
    total, step_rows = sum(case.lengths), starts[:, None] + torch.arange(steps)
    live = torch.arange(steps)[None] < left[:, None]
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.device(device):
        aux = torch.randn(total, shape.taps * shape.hidden_size, generator=generator, dtype=torch.bfloat16)
        tokens = torch.randint(shape.vocab_size, (total,), generator=generator)
        ids = torch.randint(shape.draft_vocab_size // TOP_K, (total, TOP_K), generator=generator)
        ids = ids + torch.arange(TOP_K) * (shape.draft_vocab_size // TOP_K)
        logits = 2 * torch.randn(total, TOP_K, generator=generator)
        log_z = torch.logsumexp(logits, -1) + 0.05
    step_rows, live = step_rows.to(device).clamp(max=total - 1), live.to(device)
    rows = {"key_positions": torch.cat(positions), "start_index": starts, "steps": left}
    return Batch(
        taps=aux,
        key_tokens=tokens,
        **{name: value.to(device) for name, value in rows.items()},  # type: ignore[arg-type]  # tensors only
        host=HostRows.of(rows),
        step_tokens=torch.where(live, tokens[step_rows], 0),
        teacher_index=torch.where(live, step_rows, 0),
        conversation=torch.repeat_interleave(torch.tensor(sizes)).to(device),
        teacher_ids=ids,
        teacher_logits=logits,
        log_z_full=log_z + 0.01,
        log_z_draft=log_z,
        argmax=ids[:, 0].clone(),
        conversations=len(parts),
        loss_share=1 / len(parts),
        tokens=total,
        window=shape.sliding_window or total,
        next_tokens=tokens.roll(-1) if text else None,
    )


def _conversation(length: int, case: Case, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the start rows [S], and how many steps of each carry loss [S]. Share 1 means one turn of all rows."""
    rows = torch.arange(length)
    if case.share == 1.0:
        chosen, left = rows, (length - rows).clamp(max=steps)
    else:
        turn = length // TURNS
        offset = rows % turn
        chosen = rows[(offset >= round(turn * (1 - case.share))) & (rows < turn * TURNS)]
        left = (turn - chosen % turn).clamp(max=steps)
    if case.anchors:
        drawn = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[: case.anchors].sort().values
        chosen, left = chosen[drawn], left[drawn]
    return chosen, left


def needed_flops(batch: Batch) -> float:
    """Return the operations of the needed products and of attention, forward and backward (2x, attention 2.5x).

    Every step counts the projections of its rows' states and tokens, as the model's formulas say, although the program
    projects tokens once.
    """
    shape = SHAPE
    hidden, queries = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    keys = 2 * shape.num_key_value_heads * shape.head_dim
    per_row = 2 * hidden * (2 * queries + keys * 2 + queries + 3 * shape.intermediate_size + shape.draft_vocab_size)
    live = [int((batch.steps > number).sum()) for number in range(STEPS)]
    base = batch.taps.shape[0] * 2 * hidden * (shape.taps * hidden + 2 * keys)
    products = 3 * (sum(live) * per_row - live[0] * 4 * hidden * keys + base)
    positions, all_keys = batch.key_positions[batch.start_index], batch.key_positions
    seen = torch.searchsorted(all_keys, positions, right=True) - torch.searchsorted(
        all_keys, positions - (shape.sliding_window or 0) + 1
    )
    scores = sum(int(seen[batch.steps > number].sum()) for number in range(STEPS))
    return float(products + 3.5 * 4 * queries * scores)
