"""One pass before the first shard, for the norm bands and channel scales that all workers of a store share.

The norms come from conversations at even steps through the dataset, so that the bands do not depend on which shards
were captured before; int8's channel scales come from the same conversations. Both are written to the manifest.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.gates import Gates, gate_statistics
from draftcache.capture.job.work_plan import WorkPlan
from draftcache.capture.verifier.source import StateSource
from draftcache.store.common.errors import GateError
from draftcache.store.format import torch_codecs
from draftcache.store.format.channel_scales import Calibration
from draftcache.store.format.norm_band import bands_to_json
from draftcache.store.format.rows import rows_in_reach, teacher_positions

LEAST_CONVERSATIONS = 32
"""A mean of 32 logarithms is within 0.7 sigma (4 standard errors) of the true mean; the band's limits are 8 sigma."""
PIECE = 8192
"""Largest number of tokens per piece of the forward; a multiple of the scan's chunk."""


@dataclass(frozen=True)
class StoreCalibration:
    """The fields of `StoreManifest` that the calibration measures, as JSON values."""

    norm_bands: dict[str, Any]
    channel_scales: dict[str, Any] | None


def calibration_conversations(config: CaptureConfig, work: WorkPlan) -> list[tuple[str, int]]:
    """At least 32 conversations, as (split, number in it); for int8 enough to hold about `--calibration-tokens`."""
    wanted = LEAST_CONVERSATIONS
    if config.mode == "int8":
        conversations = sum(len(work.dataset.split(name).conversations) for name in work.splits)
        tokens = max(sum(shard.tokens for shard in work.shards), 1)
        wanted = max(wanted, round(conversations * min(1.0, config.calibration_tokens / tokens)))
    return work.spread(wanted)


def calibrate(config: CaptureConfig, work: WorkPlan, verifier: StateSource) -> StoreCalibration:
    """Measure the bands of the taps' norms over rows in reach, and for int8 the rms of every channel.

    A conversation that fails a gate counts for neither. Raises InputError where int8 finds no state at all.
    """
    gates = Gates(config.layers)
    scales = Calibration(config.layers, verifier.hidden_size) if config.mode == "int8" else None
    for split, number in calibration_conversations(config, work):
        token_ids, loss_mask, _ = work.dataset.split(split)[number]
        with contextlib.suppress(GateError):
            _add(gates, scales, config, verifier, token_ids, loss_mask)
    return StoreCalibration(
        norm_bands=bands_to_json(gates.norms), channel_scales=None if scales is None else scales.finish().to_json()
    )


def _add(
    gates: Gates,
    scales: Calibration | None,
    config: CaptureConfig,
    verifier: StateSource,
    token_ids: np.ndarray[Any, Any],
    loss_mask: np.ndarray[Any, Any],
) -> None:
    positions, teacher = rows_in_reach(loss_mask, config.window or None), teacher_positions(loss_mask)
    if not teacher.size:
        return
    ids = torch.from_numpy(token_ids.astype(np.int64))
    total = torch.zeros(len(config.layers) + 1, 4)
    for piece in verifier.states(ids[None], [ids.shape[0]], config.layers, min(PIECE, config.prefill_chunk)):
        tap_rows, teacher_rows = (
            torch.from_numpy(piece.rows_of(wanted)).to(verifier.device) for wanted in (positions, teacher)
        )
        taps = {layer: tap[0][tap_rows] for layer, tap in piece.taps.items()}
        statistics = gate_statistics(taps, piece.final[0][teacher_rows]).cpu()
        if scales is not None and bool(torch.isfinite(statistics).all()):
            for layer, tap in taps.items():
                torch_codecs.add_squares(scales, layer, tap)
        total += statistics
    gates.judge(total)
