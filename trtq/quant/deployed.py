"""Deployed layers: integer weights, integer activation codes, and scales per step.

    k = clip(round(x * inv_s[t]), lo[t], hi[t])
    y = op(k, q - z) * (d * s[t]) + bias

This is the arithmetic of the exported graph, operation by operation. The layer multiplies integers and
scales the sum afterwards. float32 adds integers below 2^24 without rounding, in any order, so runtimes
that compute the product in float and in integers produce the same bits. If the weight were scaled
first, sums would differ in their last bits, values near a rounding tie would get the neighbouring code,
and a 4-bit network would carry such a difference to its output.

Letters: N, K out / in features or channels, T steps, B images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trtq.errors import QuantizationError
from trtq.quant.activation import per_item, select_step
from trtq.quant.dynamic_scale import RowAxis, row_scale
from trtq.quant.geometry import ConvGeometry
from trtq.quant.input_transform import InputTransform
from trtq.quant.packed_codes import register_codes
from trtq.quant.tensors import ActivationTensors, LayerTensors, ProductTensors
from trtq.quant.timestep import Step, current_step
from trtq.quant.weightless import WeightlessLayer

__all__ = ["DeployedLayer", "DeployedProduct", "ExactBuffers", "enclosing_step"]


class ExactBuffers(nn.Module):
    """A module whose float32 buffers keep their dtype in a model that is cast to half precision.

    Rounded scales would change the codes.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        exact = {
            name: buffer
            for name, buffer in self._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class _DeployedActivation(ExactBuffers):
    """`x -> (k, s)`: integer codes and their scale at a step."""

    scale: Tensor
    inv_scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, tensors: ActivationTensors, row_axis: RowAxis) -> None:
        super().__init__()
        self.bits, self.policy, self.row_axis = tensors.bits, tensors.policy, row_axis
        self.register_buffer("scale", tensors.scale)
        self.register_buffer("inv_scale", tensors.inv_scale)
        self.register_buffer("low", tensors.low.float())
        self.register_buffer("high", tensors.high.float())

    def forward(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """x[B, ...] -> codes[B, ...] and their scale, `[]`, per item or per row; both float32."""
        scale, inv_scale, low, high = (
            per_item(select_step(values, step, len(x)), x)
            for values in (self.scale, self.inv_scale, self.low, self.high)
        )
        x = x.float()
        if self.policy != "step":
            of_row = row_scale(x, self.bits, self.row_axis)
            scale = of_row if self.policy == "row" else torch.minimum(of_row, scale)
            inv_scale = scale.reciprocal()
        return (x * inv_scale).round().clamp(low, high), scale


def enclosing_step(step: Step | None) -> Step:
    """`step`, or the step of the enclosing scope if `step` is None.

    Raises:
        StepError: there is no current step.
        QuantizationError: the call is inside `float_scope`.
    """
    if step is None:
        step = current_step()
        if step is None:
            raise QuantizationError("a deployed layer holds integers only; it has no float form")
    return step


class DeployedLayer(ExactBuffers, WeightlessLayer):
    """A linear layer or convolution computed from integers; the reference for every engine.

    Args:
        tensors: integers and scales of the layer.
        geometry: geometry of a convolution; None for a linear layer.
        packed: whether the integers are unpacked in each call, see `trtq.quant.packed_codes`.
    """

    bias: Tensor | None
    weight_scale: Tensor
    integers: Tensor

    def __init__(
        self, tensors: LayerTensors, geometry: ConvGeometry | None, *, packed: bool = False
    ) -> None:
        super().__init__(tensors.weight.shape, geometry)
        self.geometry = geometry
        rows: RowAxis = "last" if geometry is None else "image"
        self.activation = _DeployedActivation(tensors.activation, rows)
        transform = tensors.transform
        axis = -1 if geometry is None else 1
        self.input_transform = None if transform is None else InputTransform(transform, axis)
        self.register_buffer("bias", tensors.bias)
        self.register_buffer("weight_scale", tensors.weight.scale.reshape(-1))
        weight = tensors.weight
        register_codes(self, "integers", weight.integers, weight.shape, torch.int8, packed=packed)

    def forward(self, input: Tensor, step: Step | None = None) -> Tensor:
        """input[B, ...] -> the layer's output, with the dtype of the input.

        Args:
            input: input, with the rows of `step` first; named as in `nn.Linear`.
            step: index of the denoising step, one for all rows or one per row; None: the step of the
                enclosing `step_scope`.

        Raises:
            StepError: there is no current step, or the step is outside the table.
        """
        x = input if self.input_transform is None else self.input_transform(input)
        codes, scale = self.activation(x, enclosing_step(step))
        # The layer stores at most one byte per weight; the float copy exists only during the call.
        weight = self.integers.float()
        if self.geometry is None:
            channel: tuple[int, ...] = (-1,)
            product = functional.linear(codes, weight)
        else:
            channel = (-1, *(1,) * self.geometry.axes)
            product = self.geometry.convolve(codes, weight, None)
        weight_scale = self.weight_scale.reshape(channel)
        if self.activation.policy == "step":
            # Both scales are small tensors: multiplying them first saves a pass over the large product.
            out: Tensor = product * (weight_scale * scale)
        else:
            out = product * scale * weight_scale
        if self.bias is not None:
            out = out + self.bias.reshape(channel)
        return out.to(input.dtype)


class DeployedProduct(nn.Module):
    """`a @ b` computed from codes: `(k_a @ k_b) * s_a[t] * s_b[t]`.

    Args:
        tensors: scales and code limits of both operands.

    Attributes:
        transform: see `trtq.quant.tensors.ProductTensors`.
    """

    def __init__(self, tensors: ProductTensors) -> None:
        super().__init__()
        self.transform = tensors.transform
        self.left = _DeployedActivation(tensors.left, "last")
        self.right = _DeployedActivation(tensors.right, "second_last")

    def forward(self, a: Tensor, b: Tensor, step: Step | None = None) -> Tensor:
        """a[B, ..., M, K], b[B, ..., K, N] -> [B, ..., M, N]; errors as in `DeployedLayer`."""
        step = enclosing_step(step)
        left, left_scale = self.left(a, step)
        right, right_scale = self.right(b, step)
        out: Tensor = (left @ right) * left_scale * right_scale
        return out.to(a.dtype)
