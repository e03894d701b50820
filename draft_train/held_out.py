"""The acceptance length of runs on their held-out split while they train."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from draftcache.draft_train.measure import draft_hits, measure
from draftcache.draft_train.training_run import TrainingRun

DRAFT_TOKENS = 5
"""Tokens that are proposed per verify step."""


def acceptance_lengths(trainers: Sequence[TrainingRun]) -> list[float]:
    """Return the acceptance length of each run's draft on the conversations that all of them hold out.

    The runs agree on split, window, packing and device (`TrainingRun.evaluates_like`), so that one reading serves all.
    Of several ranks, each measures its part of the conversations, and all return the lengths over all of them.
    """
    lead = trainers[0]
    config, ranks = lead.config, lead.ranks
    tokens = lead.schedule.tokens
    packed = config.pack_tokens if config.batch_conversations > 1 else int(tokens[lead.members].max())
    drafts = {
        str(number): draft_hits(
            item.draft, item.frozen, item.store, draft_tokens=DRAFT_TOKENS, compute=item.config.compute
        )
        for number, item in enumerate(trainers)
    }
    found = measure(
        lead.store,
        lead.held_out[ranks.rank :: ranks.world],
        drafts,
        draft_tokens=DRAFT_TOKENS,
        window=lead.shape.sliding_window,
        device=lead.device,
        pack_tokens=packed,  # so that it takes no more memory than training does
        most_bytes=int(config.prefetch_gb * 1e9),
    )
    counts = [[found[name].tokens, found[name].verify_steps] for name in drafts]
    sums = ranks.add_up(torch.tensor(counts, dtype=torch.float64, device=lead.device))
    return [gained / max(1.0, steps) for gained, steps in sums.tolist()]
