"""The rotation of groups of input channels (ConvRot, arXiv 2512.03673) as comfy-kitchen computes it."""

from __future__ import annotations

from torch import Tensor

from trtq.errors import QuantizationError
from trtq.quant.input_transform import hadamard

__all__ = ["rotate"]


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
    matrix = hadamard(group)
    if columns % group:
        raise QuantizationError(
            f"a rotation of {group} channels does not fit {columns} input channels; choose a group "
            "that divides them"
        )
    # The transposed view selects the same matrix kernel as comfy-kitchen's: equal in the last bit.
    turned: Tensor = weight.reshape(rows, -1, group) @ matrix.T
    return turned.reshape(rows, columns)
