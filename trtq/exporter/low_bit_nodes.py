"""Low-bit layers of a denoiser as single nodes of the domain `trtq` during tracing, without weights.

    trtq::LowBitLinear(x) {name}        trtq::LowBitConv2d(x) {name, strides, pads, dilations, group}
    trtq::LowBitMatMul(a, b) {name}     a product of two activations
    trtq::LowBitConv(x) {name, strides, pads, dilations, group}     a convolution over 1 or 3 axes

The rewrites in `trtq.graph.passes` then replace these nodes by the form of the target, with the weights.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from trtq.graph.nodes import DOMAIN
from trtq.quant.convert import deploy_timesteps
from trtq.quant.geometry import ConvGeometry
from trtq.quant.plan import quantizable_layers
from trtq.quant.structure import replace_module

__all__ = ["replace_low_bit"]

_Weighted = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def replace_low_bit(denoiser: nn.Module, low_bit: Collection[str]) -> None:
    """Replace the layers at the paths `low_bit` by nodes of the domain `trtq`, in place."""
    for name, source in quantizable_layers(denoiser).items():
        if name in low_bit:
            if isinstance(source, _Weighted):
                replace_module(denoiser, name, _LowBitNode(name, source))
            else:
                replace_module(denoiser, name, _LowBitProduct(name))
    if low_bit:
        deploy_timesteps(denoiser)


class _LowBitNode(nn.Module):
    """Replaces a low-bit layer during tracing by one node, named after the layer."""

    def __init__(self, name: str, source: _Weighted) -> None:
        super().__init__()
        self.name = name
        # diffusers reads the dtype of some layers' weights, and the first parameter of others.
        self.weight = nn.Parameter(source.weight.new_zeros(0), requires_grad=False)
        self.bias = None
        self.out_features = int(source.weight.shape[0])
        self.geometry: ConvGeometry | None = None
        if not isinstance(source, nn.Linear):
            self.geometry = ConvGeometry.of(source)
        self.kernel = [int(size) for size in source.weight.shape[2:]]

    def forward(self, input: Tensor, *_: Any) -> Tensor:
        # diffusers passes the input of some layers by its name.
        x = input
        attributes: dict[str, Any] = {"name": self.name}
        if self.geometry is None:
            operator, shape = "LowBitLinear", [*x.shape[:-1], self.out_features]
        else:
            g = self.geometry
            operator = "LowBitConv2d" if len(self.kernel) == 2 else "LowBitConv"
            size = [
                (x.shape[2 + axis] + 2 * g.padding[axis] - g.dilation[axis] * (kernel - 1) - 1)
                // g.stride[axis]
                + 1
                for axis, kernel in enumerate(self.kernel)
            ]
            shape = [x.shape[0], self.out_features, *size]
            attributes |= {
                "strides": list(g.stride),
                "pads": [*g.padding, *g.padding],
                "dilations": list(g.dilation),
                "group": g.groups,
            }
        return _symbolic(operator, (x,), attributes, shape)


class _LowBitProduct(nn.Module):
    """Replaces a low-bit product during tracing by one node, named after the layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, a: Tensor, b: Tensor, *_: Any) -> Tensor:
        shape = [*a.shape[:-1], b.shape[-1]]
        return _symbolic("LowBitMatMul", (a, b), {"name": self.name}, shape)


def _symbolic(
    operator: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], shape: list[Any]
) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{operator}", inputs, attributes, dtype=inputs[0].dtype, shape=shape, version=1
    )
    return result
