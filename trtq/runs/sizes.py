"""Sizes of tensors in `quantized.safetensors`."""

from __future__ import annotations

from torch import nn

__all__ = ["entry_bytes", "grouped_bytes", "weight_bytes"]


def entry_bytes(name: str) -> int:
    """Upper bound of the size of one tensor's entry in a safetensors header, in bytes."""
    return len(name) + 110


def weight_bytes(weight: nn.Parameter, bits: int) -> int:
    """Size of a weight's packed codes, scales (float32) and zero points (int16), in bytes."""
    channels = len(weight)
    return -(-channels * bits // 8) * (weight.numel() // channels) + 6 * channels


def grouped_bytes(weight: nn.Parameter, bits: int, group: int | None) -> int:
    """Size of a weight-only weight's packed codes and scales (float16), in bytes."""
    channels = len(weight)
    groups = 1 if group is None else weight.shape[1] // group
    return -(-channels * bits // 8) * (weight.numel() // channels) + 2 * channels * groups
