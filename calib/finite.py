"""The check that a recorded input is finite."""

from __future__ import annotations

import torch
from torch import Tensor

from trtq.errors import NonFiniteError

__all__ = ["check_finite"]


def check_finite(values: Tensor, layer: str, step: int) -> None:
    """Raise unless values of a layer's recorded input are finite.

    Args:
        values: all values, or extremes that are not finite if a value is not.
        layer: path of the layer.
        step: index of the denoising step.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            f"layer {layer!r}: its input holds NaN or infinity at step {step}; "
            "the float model itself is broken there"
        )
