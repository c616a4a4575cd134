"""Samples of images in progress: arrays of the host, or tensors of torch where a graph computes.

A graph on a GPU provider of onnxruntime reads and writes tensors by their addresses, so that latents and
conditions stay in the GPU's memory from the first step to the decoder. This module imports torch only if
it is given tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["Samples", "beside", "joined", "repeated"]

Samples = Any
"""A `numpy.ndarray` or a `torch.Tensor`; both have a first axis of rows."""


def joined(values: Sequence[Samples]) -> Samples:
    """The rows of all values, in order; a single value is returned as it is."""
    if len(values) == 1:
        return values[0]
    if isinstance(values[0], np.ndarray):
        return np.concatenate(values)
    import torch

    return torch.cat(list(values))


def repeated(value: Samples, rows: int) -> Samples:
    """A value `[1, ...]` as `rows` equal rows."""
    if isinstance(value, np.ndarray):
        return np.repeat(value, rows, axis=0)
    return value.repeat_interleave(rows, dim=0)


def beside(array: np.ndarray, like: Samples) -> Samples:
    """An array of the host as samples of the same kind as `like`, in the same memory."""
    if isinstance(like, np.ndarray):
        return array
    import torch

    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)
