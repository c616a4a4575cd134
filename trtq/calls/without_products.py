"""Denoiser calls without the products of its layers, for their structure and shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trtq.quant.geometry import CONVOLUTIONS
from trtq.quant.modules import QuantLayer
from trtq.quant.weightless import WeightlessLayer
from trtq.seeds import seeded_generator

__all__ = ["noise_like", "without_products"]

_LAYERS = (nn.Linear, *CONVOLUTIONS, QuantLayer, WeightlessLayer)


@contextmanager
def without_products(denoiser: nn.Module) -> Iterator[None]:
    """Inside the block, linear layers and convolutions return ones in the shape of their output.

    Products of weights take the largest part of a denoiser's time, and weights that stay in their files
    are not read. Everything else is computed, so that structures and shapes are those of a real call.
    Layers with padding by name, transposed convolutions, and layers whose input does not fit compute as
    usual.
    """
    with ExitStack() as stack:
        for module in denoiser.modules():
            if isinstance(module, _LAYERS) and not isinstance(getattr(module, "padding", 0), str):
                stack.enter_context(_ones(module))
        yield


@contextmanager
def _ones(layer: Any) -> Iterator[None]:
    patched = layer.__dict__.get("forward")

    compute = layer.forward

    def forward(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shape = _out_shape(layer, input)
        if shape is None:
            result: Tensor = compute(input, *args, **kwargs)
            return result
        return input.new_ones(shape)

    layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        if patched is None:
            del layer.__dict__["forward"]
        else:
            layer.__dict__["forward"] = patched


def _out_shape(layer: Any, x: Tensor) -> list[int] | None:
    """Shape of a layer's output, from the attributes of torch's classes; None: a misfit."""
    if hasattr(layer, "out_features"):
        fits = x.ndim >= 1 and x.shape[-1] == layer.in_features
        return [*x.shape[:-1], layer.out_features] if fits else None
    axes = len(layer.kernel_size)
    if x.ndim not in (axes + 1, axes + 2) or x.shape[-axes - 1] != layer.in_channels:
        return None
    geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    sizes = [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in zip(x.shape[-axes:], *geometry, strict=True)
    ]
    return [*x.shape[: -axes - 1], layer.out_channels, *sizes] if min(sizes) > 0 else None


def noise_like(value: Any, index: int) -> Any:
    """Gaussian noise in the place of a result's float tensor, the same for the same index and size.

    Constant results would make later inputs constant, e.g. those of a second denoiser.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    generator = seeded_generator(index, "result without products", value.numel())
    noise = torch.randn(value.shape, generator=generator)
    return noise.to(value)
