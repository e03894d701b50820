"""The settings of the fused pass, and the tensors that it keeps between its forward and its backward pass.

Shape suffixes: R key rows, S start rows, T rows of a step, H hidden, N query heads, G key-value heads, D head width,
I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from draftcache.draft_train.drafts.eagle3.kernels.attention_result import AttentionResult


@dataclass(frozen=True)
class FusedPassSettings:
    """Settings that trade memory for time."""

    rows: int = 8192
    """Rows whose logits exist at once."""
    mlp_rows: int = 8192
    """Rows that the MLP computes at once. Every such slice reads and writes the gradients of the MLP's weights."""
    recompute_mlp: bool = False
    """Whether gate and up are recomputed in the backward pass instead of kept."""
    flash_attention: bool = False
    """Whether FlashAttention 4 runs instead of the kernels here: faster, for more memory."""


@dataclass
class BaseRows:
    """The tensors that every step shares."""

    projected: Tensor
    """[R, (N + 2G) D]: the part of queries, keys and values that comes from the embeddings."""
    hidden: Tensor
    """[R, H]: fc's output, un-normed."""
    table: Tensor
    """[2, R, D/2]: the rotary table of the key rows' positions."""
    kv: Tensor
    """[R, 2, G, D]: step-0 keys and values."""
    diagonal: Tensor
    """[steps - 1, S, 2, G, D]: diagonal keys and values of steps 1 and later."""
    positions: Tensor
    """[R] int32: positions of the key rows."""


@dataclass
class StepState:
    """The tensors that one step of T rows keeps for the backward pass."""

    number: int
    rows: Tensor
    """[T] int64 start rows."""
    key_rows: Tensor
    """[T] int64: the key row whose token each row consumes at this step."""
    kept: Tensor | None
    """[T] int64: the row of the previous step that each row was; None if they are all rows of it."""
    attention: AttentionResult
    after: Tensor
    """[T, H]: the state after attention, un-normed, which the MLP reads."""
    gate_up: list[Tensor]
    """[slice, 2I] for each slice of the MLP; no slices if they are recomputed."""
    result: Tensor
    """[T, H]: the layer's output, un-normed."""


@dataclass
class KeyGradients:
    """Gradients of all keys and values, added up over the steps in float32 at least. Shapes are those of `BaseRows`."""

    kv: Tensor
    diagonal: Tensor
