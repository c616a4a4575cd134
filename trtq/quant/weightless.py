"""Base class of layers that replace a float layer and hold no float weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trtq.quant.geometry import ConvGeometry, set_sizes

__all__ = ["WeightlessLayer"]


class WeightlessLayer(nn.Module):
    """A layer with the attributes of `nn.Linear` or a convolution, but without a float weight.

    diffusers reads `layer.weight.dtype` and `next(module.parameters()).dtype`, so the layer has an empty
    parameter `weight`. State dicts do not contain the parameter.

    Args:
        shape: shape of the weight that the layer stands for, `[N, K, ...]`.
        geometry: geometry of a convolution; None for a linear layer.

    Attributes:
        weight: empty parameter with the dtype and device of the layer.
    """

    weight: nn.Parameter

    def __init__(self, shape: Sequence[int], geometry: ConvGeometry | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        set_sizes(self, shape, geometry)

    def take_dtype(self, dtype: torch.dtype) -> None:
        """Set the dtype of `weight`, e.g. to that of the float layer."""
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}weight"]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        missing = lists[0]
        missing[:] = [key for key in missing if key != f"{prefix}weight"]
