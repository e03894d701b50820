"""Statistics of the stored teacher, for commit records."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def tail_mass(arrays: dict[str, NDArray[Any]], in_draft: NDArray[np.bool_] | None = None) -> NDArray[Any]:
    """Return tau [P] float32, the probability within the main draft vocabulary that the stored top-k leaves out.

    `in_draft` [V] bool is needed for teacher "full", whose ids are the verifier's: entries outside the draft vocabulary
    are no part of its probability. The result is empty [0] for teacher "hidden", as a state leaves nothing out.
    """
    if "teacher_gaps" not in arrays:
        return np.empty(0, np.float32)
    logits = arrays["teacher_max"][:, None] - arrays["teacher_gaps"].astype(np.float32)
    if in_draft is not None:
        logits = np.where(in_draft[arrays["teacher_ids"]], logits, np.float32(-np.inf))
    kept = np.exp(logits - arrays["log_z_draft"][:, None]).sum(axis=1)
    return np.asarray(np.clip(1.0 - kept, 0.0, None))


def describe(values: NDArray[Any]) -> dict[str, float | int]:
    """Return the count, mean, median and 99th percentile of the values; only the count where there are none."""
    if values.size == 0:
        return {"count": 0}
    p50, p99 = np.quantile(values, [0.5, 0.99])
    return {"count": int(values.size), "mean": float(values.mean()), "p50": float(p50), "p99": float(p99)}
