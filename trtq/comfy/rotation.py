"""The regular Hadamard rotation of ConvRot, on groups of input channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trtq.errors import QuantizationError

__all__ = ["GROUPS", "regular_hadamard", "rotate"]

GROUPS = (16, 64, 256)
"""Group sizes for which comfy-kitchen has fused kernels."""
_H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def regular_hadamard(size: int) -> Tensor:
    """`kron(H4, ..., H4) / sqrt(size)`, float32[size, size], equal to its transpose and its inverse.

    All row sums are equal, so a common offset of the channels stays spread over the group (ConvRot,
    arXiv 2512.03673).

    Args:
        size: a power of 4.

    Raises:
        QuantizationError: the size is not a power of 4.
    """
    if size < 4 or size & (size - 1) or size.bit_length() % 2 == 0:
        raise QuantizationError(
            f"a regular Hadamard matrix has a power of 4 as its size, got {size}"
        )
    block = torch.tensor(_H4, dtype=torch.float32)
    matrix = block
    while len(matrix) < size:
        matrix = torch.kron(matrix, block)
    return matrix / math.sqrt(size)


def rotate(weight: Tensor, group: int) -> Tensor:
    """`weight[:, g] H` for each group g of input channels; the rotation is its own inverse.

    Args:
        weight: float32[N, K].
        group: size of the groups, a power of 4 that divides K.

    Returns:
        float32[N, K].

    Raises:
        QuantizationError: the group is not a power of 4, or does not divide K.
    """
    rows, columns = weight.shape
    matrix = regular_hadamard(group)
    if columns % group:
        raise QuantizationError(
            f"a rotation of {group} channels does not fit {columns} input channels; choose a group "
            "that divides them"
        )
    # The transposed view selects the same matrix kernel as comfy-kitchen's: equal in the last bit.
    turned: Tensor = weight.reshape(rows, -1, group) @ matrix.T
    return turned.reshape(rows, columns)
