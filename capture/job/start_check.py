"""The self-check of a job's verifier at start-up, on the job's own data."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from draftcache.capture.job.calibration import PIECE
from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.work_plan import WorkPlan
from draftcache.capture.verifier.load import Verifier
from draftcache.capture.verifier.self_check import TOKENS, self_check


def check_tokens(work: WorkPlan) -> Tensor:
    """The first tokens of the data, [256] int64, repeated where the first conversation is shorter.

    Random ids would make outliers of a trained model's states.
    """
    token_ids, _, _ = work.dataset.split(work.splits[0])[0]  # prepare leaves neither a split nor a conversation empty
    return torch.from_numpy(np.resize(token_ids[:TOKENS].astype(np.int64), TOKENS))


def check_verifier(verifier: Verifier, config: CaptureConfig, work: WorkPlan) -> dict[str, float]:
    """`self_check` on the job's data, with a prefill in pieces where the job reads a conversation in several pieces.

    Returns the differences by name, for the store's provenance. Raises InputError where one is too large.
    """
    longest = max(int(work.dataset.split(name).conversations["tokens"].max()) for name in work.splits)
    in_pieces = longest > min(PIECE, config.prefill_chunk)
    return self_check(verifier, config.layers, check_tokens(work), in_pieces=in_pieces)
