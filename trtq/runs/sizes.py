"""Sizes of tensors in `quantized.safetensors`."""

from __future__ import annotations

from torch import nn

from trtq.quant.formats.e2m1 import BLOCK
from trtq.quant.plan import LayerPlan

__all__ = ["entry_bytes", "format_bytes", "weight_bytes"]


def entry_bytes(name: str) -> int:
    """Upper bound of the size of one tensor's entry in a safetensors header, in bytes."""
    return len(name) + 110


def weight_bytes(weight: nn.Parameter, bits: int) -> int:
    """Size of a weight's packed codes, scales (float32) and zero points (int16), in bytes."""
    channels = len(weight)
    return -(-channels * bits // 8) * (weight.numel() // channels) + 6 * channels


def format_bytes(weight: nn.Parameter, plan: LayerPlan) -> int:
    """Size of a weight's codes and scales in the format of its plan, in bytes."""
    bits, channels = plan.weight_bits or 0, len(weight)
    if plan.format == "int":
        return weight_bytes(weight, bits)
    codes = -(-channels * bits // 8) * (weight.numel() // channels)
    if plan.format == "weight_only":  # Scales in float16.
        return codes + 2 * channels * (1 if plan.group is None else weight.shape[1] // plan.group)
    if plan.format == "fp8":
        return codes + 4 * channels
    return codes + channels * (weight.shape[1] // BLOCK) + 4
