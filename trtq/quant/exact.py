"""Float modules between low-bit layers, computed in float64 where the last bit matters.

Runtimes add in different orders and implement exponentials and sines differently, so their last bits
differ. Values that are computed in float64 and rounded once are equal in all runtimes, so torch and the
exported graph pass the same bits to the next quantisers. Letters: B images, C channels, N features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "DeployedGroupNorm",
    "DeployedLayerNorm",
    "DeployedSilu",
    "DeployedTimesteps",
    "replaces_layer_norm",
]


def replaces_layer_norm(module: nn.LayerNorm) -> bool:
    """Whether `DeployedLayerNorm` computes what a layer norm does, up to rounding.

    A subclass with a forward of its own may, e.g., move the axes. `FP32LayerNorm` of diffusers is plain
    layer norm in float32.
    """
    if type(module).forward is nn.LayerNorm.forward:
        return True
    if isinstance(module, DeployedLayerNorm):
        return False
    from diffusers.models.normalization import FP32LayerNorm

    return type(module).forward is FP32LayerNorm.forward


class DeployedGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` with mean and deviation summed in float64, as in the exported graph.

    After rounding to float32, mean and deviation do not depend on the order of the additions, so torch
    and onnxruntime pass the same bits to the next quantiser.

    Args:
        source: float layer; its parameters are shared.
    """

    def __init__(self, source: nn.GroupNorm) -> None:
        super().__init__(source.num_groups, source.num_channels, source.eps, affine=False)
        self.affine = source.affine
        self.weight = source.weight
        self.bias = source.bias
        # ONNX stores epsilon in float32.
        self.epsilon = float(torch.tensor(source.eps, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """x[B,C,...] -> the same shape and dtype, normalised over each group of channels."""
        rows = x.float().reshape(len(x), self.num_groups, -1)
        exact = rows.double()
        mean = exact.mean(2, keepdim=True)
        variance = (exact - mean).square().mean(2, keepdim=True)
        inverse = (variance + self.epsilon).sqrt().reciprocal()
        y = ((rows - mean.float()) * inverse.float()).reshape(x.shape)
        channel = (-1, *(1,) * (x.ndim - 2))
        y = y * self.weight.reshape(channel) + self.bias.reshape(channel)
        return y.to(x.dtype)


class DeployedLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` in float64, rounded once, as in the exported graph.

    Args:
        source: float layer; its parameters are shared.
    """

    def __init__(self, source: nn.LayerNorm) -> None:
        super().__init__(source.normalized_shape, source.eps, elementwise_affine=False)
        self.elementwise_affine = source.elementwise_affine
        self.weight = source.weight
        self.bias = source.bias
        # ONNX stores epsilon in float32.
        self.epsilon = float(torch.tensor(source.eps, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """x[..., N] -> the same shape and dtype, normalised over the last axis."""
        weight, bias = (p if p is None else p.double() for p in (self.weight, self.bias))
        return functional.layer_norm(
            x.double(), self.normalized_shape, weight, bias, self.epsilon
        ).to(x.dtype)


class DeployedSilu(nn.Module):
    """`nn.SiLU`, computed in float64 for embeddings `[B,N]`, as in the exported graph."""

    def forward(self, x: Tensor) -> Tensor:
        """`x / (1 + exp(-x))`, with the shape and dtype of x."""
        if x.ndim != 2:
            return functional.silu(x)
        exact = x.double()
        return (exact / (1 + (-exact).exp())).to(x.dtype)


class DeployedTimesteps(nn.Module):
    """diffusers' `Timesteps`, with frequencies, sines and cosines computed in float64.

    Deployed denoisers and traced graphs both contain this module. All images of a step share a time
    embedding, so a single value on a rounding tie that torch and a graph resolve differently would
    change every image.

    Args:
        source: diffusers module without parameters.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        half, shift = int(source.num_channels) // 2, float(source.downscale_freq_shift)
        self.channels = int(source.num_channels)
        self.flip = bool(source.flip_sin_to_cos)
        self.scale = float(source.scale)
        # Not a buffer: converting the model to half precision would make the angles inaccurate.
        index = torch.arange(half, dtype=torch.float64)
        self.frequencies = (-math.log(10000) * index / (half - shift)).exp().float()

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps[B] -> float32[B, channels] (arXiv 1706.03762, section 3.5)."""
        if self.frequencies.device != timesteps.device:
            # Copy only at the first call: a CUDA graph cannot contain the copy.
            self.frequencies = self.frequencies.to(timesteps.device)
        angles = (self.scale * (timesteps[:, None].float() * self.frequencies)).double()
        parts = [angles.sin().float(), angles.cos().float()]
        embedding = torch.cat(parts[::-1] if self.flip else parts, dim=1)
        return functional.pad(embedding, (0, self.channels % 2))
