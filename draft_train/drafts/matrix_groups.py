"""A draft's matrices as a fused pass multiplies them, and float32 buffers for the gradients of all its parameters.

Matrices that read the same input are concatenated by rows, as a group under one name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn


class MatrixGroups:
    """Copies of groups of matrices in the dtype of the products, and the buffers where gradients are added up."""

    def __init__(
        self, groups: Mapping[str, list[nn.Parameter]], parameters: Iterable[nn.Parameter], dtype: torch.dtype
    ) -> None:
        """`groups` holds by name the matrices of one width that are concatenated. `parameters` are the draft's: those
        in no group have gradients, but no copy.
        """
        self.dtype = dtype
        self._groups = dict(groups)
        grouped = {id(value) for group in groups.values() for value in group}
        self._others = [value for value in parameters if id(value) not in grouped]
        self.copies = self._memory(dtype)
        """By name, the concatenated matrices [rows, width]."""

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """By name, gradients of the concatenated matrices. After `attach`, parameters' `.grad` are views of them."""
        return self._memory(None)

    @cached_property
    def other_gradients(self) -> dict[nn.Parameter, Tensor]:
        """The gradients of the parameters that are in no group."""
        return {value: torch.zeros_like(value, requires_grad=False) for value in self._others}

    def _memory(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {
            name: group[0].new_zeros(
                sum(value.shape[0] for value in group), group[0].shape[1], dtype=dtype, requires_grad=False
            )
            for name, group in self._groups.items()
        }

    def refresh(self) -> None:
        """Copy the parameters, with 6 bytes of memory traffic for each.

        They are copied in every pass, because nothing tells whether they were written since the last one: fused AdamW
        does not raise a tensor's version.
        """
        for name, group in self._groups.items():
            for target, value in zip(_parts(self.copies[name], group), group, strict=True):
                target.copy_(value.detach())

    def attach(self) -> None:
        """Make every parameter's `.grad` a view of the buffers: zeros where it was None, else its present values."""
        for name, group in self._groups.items():
            for part, value in zip(_parts(self.gradients[name], group), group, strict=True):
                _attach(value, part)
        for value, part in self.other_gradients.items():
            _attach(value, part)


def weights(*modules: nn.Module) -> list[nn.Parameter]:
    """Return the parameters named `weight` of these modules."""
    return [module.get_parameter("weight") for module in modules]


def _parts(matrix: Tensor, group: list[nn.Parameter]) -> list[Tensor]:
    return list(torch.split(matrix, [value.shape[0] for value in group]))


def _attach(parameter: nn.Parameter, memory: Tensor) -> None:
    held = parameter.grad
    if held is None:
        parameter.grad = memory.zero_()
    elif held.data_ptr() != memory.data_ptr():  # another pass made it, and its values count too
        parameter.grad = memory.copy_(held)
