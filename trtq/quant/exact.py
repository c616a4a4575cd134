"""Float modules between low-bit layers, rounded from float64 where a last bit would be carried on.

Runtimes add in different orders and have their own exponentials and sines; their last bits differ.
Values computed in float64 and rounded once are the same everywhere, so torch and the exported graph hand
the same bits to the quantisers that follow. Letters: B images, C channels, N features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DeployedGroupNorm", "DeployedLayerNorm", "DeployedSilu", "DeployedTimesteps"]


class DeployedGroupNorm(nn.Module):
    """`nn.GroupNorm` with mean and deviation summed in float64, as the exported graph has it.

    Rounded to float32 afterwards they no longer depend on the order of the additions, so torch and
    onnxruntime hand the same bits to the quantiser that follows.

    Args:
        source: the layer; its parameters are shared.
    """

    def __init__(self, source: nn.GroupNorm) -> None:
        super().__init__()
        self.weight = source.weight
        self.bias = source.bias
        self.groups = source.num_groups
        # ONNX keeps epsilon in float32.
        self.epsilon = float(torch.tensor(source.eps, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """x[B,C,...] -> the same shape and dtype, normalised over each group of channels."""
        rows = x.float().reshape(len(x), self.groups, -1)
        exact = rows.double()
        mean = exact.mean(2, keepdim=True)
        variance = (exact - mean).square().mean(2, keepdim=True)
        inverse = (variance + self.epsilon).sqrt().reciprocal()
        y = ((rows - mean.float()) * inverse.float()).reshape(x.shape)
        channel = (-1, *(1,) * (x.ndim - 2))
        y = y * self.weight.reshape(channel) + self.bias.reshape(channel)
        return y.to(x.dtype)


class DeployedLayerNorm(nn.Module):
    """`nn.LayerNorm` in float64, rounded once, as the exported graph has it.

    Args:
        source: the layer; its parameters are shared.
    """

    def __init__(self, source: nn.LayerNorm) -> None:
        super().__init__()
        self.weight = source.weight
        self.bias = source.bias
        self.shape = source.normalized_shape
        # ONNX keeps epsilon in float32.
        self.epsilon = float(torch.tensor(source.eps, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """x[..., N] -> the same shape and dtype, normalised over N."""
        weight, bias = (p if p is None else p.double() for p in (self.weight, self.bias))
        return functional.layer_norm(x.double(), self.shape, weight, bias, self.epsilon).to(x.dtype)


class DeployedSilu(nn.Module):
    """`nn.SiLU`, which rounds embeddings `[B,N]` from float64 as the exported graph does."""

    def forward(self, x: Tensor) -> Tensor:
        """X -> `x / (1 + exp(-x))`, same shape and dtype."""
        if x.ndim != 2:
            return functional.silu(x)
        exact = x.double()
        return (exact / (1 + (-exact).exp())).to(x.dtype)


class DeployedTimesteps(nn.Module):
    """Diffusers' `Timesteps`, with frequencies, sines and cosines rounded from float64.

    It is deployed, and it is what is traced: a time embedding is the same for all images of a step, so
    one of its values on a rounding tie that torch and a graph break differently would move every image.

    Args:
        source: the module; it has no parameters.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        half, shift = int(source.num_channels) // 2, float(source.downscale_freq_shift)
        self.channels = int(source.num_channels)
        self.flip = bool(source.flip_sin_to_cos)
        self.scale = float(source.scale)
        # No buffer: half precision is for weights, and would take digits off the angles.
        steps = torch.arange(half, dtype=torch.float64)
        self.frequencies = (-math.log(10000) * steps / (half - shift)).exp().float()

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps[B] -> float32[B, channels] (arXiv 1706.03762, section 3.5)."""
        if self.frequencies.device != timesteps.device:
            # Once, and not again: a CUDA graph cannot hold the copy.
            self.frequencies = self.frequencies.to(timesteps.device)
        angles = (self.scale * (timesteps[:, None].float() * self.frequencies)).double()
        parts = [angles.sin().float(), angles.cos().float()]
        found = torch.cat(parts[::-1] if self.flip else parts, dim=1)
        return functional.pad(found, (0, self.channels % 2))
