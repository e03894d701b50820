"""Rows of teacher ids of which some are absent (-1), as a view of another vocabulary leaves them."""

from __future__ import annotations

import torch

D = 9
"""Ids of the draft vocabulary."""
IDS = torch.tensor(
    [
        [3, 0, 5, 1],  # none absent
        [-1, -1, -1, -1],  # S is empty
        [-1, 0, -1, 4],  # absent beside id 0, which stands in for what is absent
        [0, -1, -1, -1],
        [-1, -1, 7, -1],
        [8, 2, -1, 6],
        [-1, 1, 2, 3],
    ]
)
"""Teacher ids, int64 [7, 4]: seven rows of a top 4."""
