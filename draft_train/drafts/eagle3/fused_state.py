"""What the fused pass keeps between its forward and its backward pass, and the settings that trade memory for time.

Shape suffixes: R key rows, S start rows, T rows of a step, H hidden, N query heads, G key-value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from draftcache.draft_train.drafts.eagle3.kernels.sight import Attended


@dataclass(frozen=True)
class PassSettings:
    """What trades memory for time."""

    rows: int = 8192
    """Rows whose logits are there at once."""
    mlp_rows: int = 8192
    """Rows of the MLP at a time. Its weights' gradients go through memory for every slice."""
    recompute_mlp: bool = False
    """Make gate and up again in the backward pass instead of keeping them."""
    flash_attention: bool = False
    """FlashAttention 4 instead of the attention kernels of our own: faster, for more memory."""


@dataclass
class BaseRows:
    """What every step shares."""

    projected: Tensor
    """[R, (N + 2G) D]: the tokens' part of queries, keys and values."""
    hidden: Tensor
    """[R, H]: fc's output, un-normed."""
    table: Tensor
    kv: Tensor
    """[R, 2, G, D]."""
    diagonal: Tensor
    """[steps - 1, S, 2, G, D]."""
    positions: Tensor
    """[R] int32."""


@dataclass
class StepState:
    """What one step keeps for the backward pass; T rows."""

    number: int
    rows: Tensor
    """[T] int64 start rows."""
    places: Tensor
    """[T] int64: the key row whose token this step consumes."""
    kept: Tensor | None
    """[T] int64: which rows of the previous step these are; None where all."""
    attended: Attended
    after: Tensor
    """[T, H]: what the MLP reads, un-normed."""
    gate_up: list[Tensor]
    result: Tensor


@dataclass
class KeyGradients:
    """Of what all steps attend to, added up in float32 at least."""

    kv: Tensor
    diagonal: Tensor
