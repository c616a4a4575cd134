"""Calls of engines that take arrays of the host, with tensors of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trtq.engine.base import Engine, check_names

__all__ = ["as_array", "run_on_arrays"]


def run_on_arrays(engine: Engine, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the host, run an engine, and return its outputs as tensors on the host.

    Args:
        engine: the engine.
        feeds: a tensor for each input, by name.

    Raises:
        UsageError: an input is missing or unknown.
    """
    check_names(engine.inputs, feeds)
    arrays = {name: as_array(feeds[name], spec.dtype) for name, spec in engine.inputs.items()}
    return {name: torch.from_numpy(value) for name, value in engine.run(arrays).items()}


def as_array(tensor: Tensor, dtype: np.dtype[Any]) -> np.ndarray:
    """A tensor as a contiguous array of the host, of numpy's type `dtype`."""
    value = tensor.detach().cpu()
    # numpy has no bfloat16.
    array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    # Not ascontiguousarray, which adds an axis to a scalar.
    return np.require(array.astype(dtype, copy=False), requirements="C")
