"""Sizes of tensors in `quantized.safetensors`."""

from __future__ import annotations

from torch import nn

__all__ = ["entry_bytes", "weight_bytes"]


def entry_bytes(name: str) -> int:
    """An upper bound of what safetensors' header needs for one tensor of a module."""
    return len(name) + 110


def weight_bytes(weight: nn.Parameter, bits: int) -> int:
    """Packed codes, scales (float32) and zero points (int16) of one weight."""
    channels = len(weight)
    return -(-channels * bits // 8) * (weight.numel() // channels) + 6 * channels
