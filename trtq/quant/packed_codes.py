"""Codes of a deployed layer that stay packed, and are unpacked each time the layer is called.

A deployed layer holds one byte per weight, which is twice the size of 4-bit codes in their file. For a
model that hardly fits into memory, the layer reads its codes through a parametrisation of torch, as
`trtq.quant.stored_weight` reads weights; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["register_codes"]


class _Unpacked(nn.Module):
    """Unpacks codes."""

    def __init__(self, unpack: Callable[[], Tensor]) -> None:
        super().__init__()
        self._unpack = unpack

    def forward(self, placeholder: Tensor) -> Tensor:
        return self._unpack()


def register_codes(
    layer: nn.Module,
    name: str,
    unpack: Callable[[], Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    packed: bool,
) -> None:
    """Add the codes of a weight to a layer.

    Args:
        layer: the layer; changed in place.
        name: name of the attribute.
        unpack: function that returns the codes.
        shape: shape of the codes.
        dtype: type of the codes.
        packed: whether to call `unpack` each time the attribute is read; otherwise it is a buffer.
    """
    if not packed:
        layer.register_buffer(name, unpack())
        return
    # One number, which has the shape of the codes.
    layer.register_buffer(name, torch.zeros((1,) * len(shape), dtype=dtype).expand(*shape))
    parametrize.register_parametrization(layer, name, _Unpacked(unpack), unsafe=True)
