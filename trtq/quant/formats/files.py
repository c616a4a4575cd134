"""Tensors of a file, checked before use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trtq.errors import ArtefactError

__all__ = ["checked_tensor"]


def checked_tensor(
    named: Mapping[str, Tensor],
    leaf: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    positive: bool = False,
) -> Tensor:
    """A tensor of a file.

    Args:
        named: tensors by name.
        leaf: name of the tensor.
        shape: required shape.
        dtype: required type.
        positive: whether every number must be positive and finite.

    Raises:
        ArtefactError: the tensor is missing, has another shape or type, or holds other numbers.
    """
    if leaf not in named:
        raise ArtefactError(f"the tensor {leaf!r} is missing")
    tensor = named[leaf]
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ArtefactError(
            f"the tensor {leaf!r} has shape {tuple(tensor.shape)} and type {tensor.dtype}; the manifest "
            f"requires {shape} and {dtype}"
        )
    if positive and not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
        raise ArtefactError(f"the tensor {leaf!r} must hold positive finite numbers")
    return tensor
