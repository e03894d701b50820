"""Training-time test: the draft is unrolled on its own outputs, as it runs when it is served.

At step 0, row t consumes its taps and `emb(x_{t+1})`; at step k, its output of step k-1 (un-normed, or after the final
norm where the shape says `norm_output`) and `emb(x_{t+1+k})`.
Its position at step k is t + k, for the query and for the new diagonal key. Rows that are not start rows only provide
step-0 keys and values. A row whose turn has ended takes no part in later steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.drafts.eagle3.window_attention import window_attention
from draftcache.draft_train.drafts.layers import compute_dtype
from draftcache.draft_train.loss.objective import StepOutput


def unroll(model: Eagle3Model, embeddings: torch.Tensor, batch: Batch, steps: int) -> Iterator[StepOutput]:
    """Yield the outputs of steps 0 .. steps-1 while any row is left. `embeddings` [V, H] are the verifier's."""
    dtype = compute_dtype(model.fc.weight)
    layer, attention = model.midlayer, model.midlayer.self_attn
    base = model.combine(batch.taps.to(dtype))
    inputs = layer.attention_input(F.embedding(batch.key_tokens, embeddings).to(base.dtype), base)
    keys, values = attention.keys_values(inputs, batch.key_positions)

    rows = torch.arange(batch.start_index.shape[0], device=batch.start_index.device)
    positions = batch.key_positions[batch.start_index]
    hidden, inputs = base[batch.start_index], inputs[batch.start_index]
    diagonal_keys: list[torch.Tensor] = []
    diagonal_values: list[torch.Tensor] = []
    for step in range(steps if rows.numel() else 0):
        if step:
            alive = torch.nonzero(batch.steps[rows] > step)[:, 0]
            if alive.numel() == 0:
                return
            if alive.numel() < rows.numel():
                rows, positions, hidden = rows[alive], positions[alive], hidden[alive]
                diagonal_keys = [key[:, alive] for key in diagonal_keys]
                diagonal_values = [value[:, alive] for value in diagonal_values]
            hidden = model.carried(hidden)
            embedded = F.embedding(batch.step_tokens[rows, step], embeddings).to(hidden.dtype)
            inputs = layer.attention_input(embedded, hidden)
            key, value = attention.keys_values(inputs, positions + step)
            diagonal_keys.append(key)
            diagonal_values.append(value)
        attended = window_attention(
            attention.queries(inputs, positions + step),
            keys,
            values,
            diagonal_keys,
            diagonal_values,
            positions,
            batch.key_positions,
            step=step,
            window=batch.window,
        )
        hidden = layer.finish(hidden, attended)
        yield StepOutput(number=step, rows=rows, hidden=hidden)
