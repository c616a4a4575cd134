"""Low-bit layers in the layout of the CUDA kernels, and the module that runs them on an NVIDIA GPU.

`trtq.plugins.spec` documents the operands, and `trtq.quant.packing` the layouts of weights. Weights of
up to 4 bits are stored as nibbles and are never expanded to float. The reference is
`trtq.quant.deployed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from trtq.plugins.low_bit.op import flat_fields, low_bit
from trtq.plugins.low_bit.pack import (
    pack_bytes,
    pack_nibbles,
    storage_bits,
    terms,
    unpack_bytes,
    unpack_nibbles,
)
from trtq.plugins.spec import Geometry, LayerSpec
from trtq.quant.activation import check_indices
from trtq.quant.deployed import enclosing_step
from trtq.quant.geometry import ConvGeometry
from trtq.quant.input_transform import InputTransform
from trtq.quant.packing import PackedWeight
from trtq.quant.tensors import ActivationTensors, LayerTensors
from trtq.quant.timestep import Step
from trtq.quant.weightless import WeightlessLayer

__all__ = ["KernelLayer", "kernel_runs", "layer_tensors", "packed_operands"]


def kernel_runs(geometry: ConvGeometry | None) -> bool:
    """Whether the kernels support a layer: a linear layer, or a convolution over two axes."""
    return geometry is None or geometry.axes == 2


def packed_operands(
    layer: LayerTensors, geometry: ConvGeometry | None
) -> tuple[LayerSpec, dict[str, np.ndarray]]:
    """A layer in the kernels' form: its specification and the arrays `weight`, `terms` and `tables`.

    Args:
        layer: tensors of the deployed layer.
        geometry: geometry of a convolution; None: a linear layer.

    Raises:
        QuantizationError: see `trtq.plugins.low_bit.pack`.
    """
    weight, activation = layer.weight, layer.activation
    integers = weight.integers().numpy()
    zero_point = weight.zero_point.numpy().reshape(-1).astype(np.int64)
    bits = storage_bits(weight.bits, zero_point)
    if bits == 4:
        packed = pack_nibbles(weight.codes.numpy(), zero_point)
    else:
        packed, zero_point = pack_bytes(integers), np.zeros_like(zero_point)
    kernel = None
    if geometry is not None:
        size = int(integers.shape[2]), int(integers.shape[3])
        stride, padding, dilation = (
            (axes[0], axes[1]) for axes in (geometry.stride, geometry.padding, geometry.dilation)
        )
        kernel = Geometry(size, stride, padding, dilation, geometry.groups)
    spec = LayerSpec(
        integers.shape[1] * (1 if kernel is None else kernel.groups),
        len(integers),
        len(activation.scale),
        bits,
        activation.bits,
        kernel,
    )
    bias = None if layer.bias is None else layer.bias.numpy()
    numbers = (activation.scale, activation.inv_scale, activation.low, activation.high)
    return spec, {
        "weight": packed,
        "terms": terms(weight.scale.numpy().reshape(-1), bias, zero_point, integers),
        "tables": np.stack([row.numpy().astype(np.float32) for row in numbers]),
    }


def layer_tensors(spec: LayerSpec, operands: Mapping[str, np.ndarray]) -> LayerTensors:
    """Inverse of `packed_operands`; weights that are stored as bytes become 8-bit codes.

    Args:
        spec: specification of the layer.
        operands: arrays `weight`, `terms` and `tables`.
    """
    scale, bias, zero_point, _ = operands["terms"]
    channels = spec.channels // (1 if spec.geometry is None else spec.geometry.groups)
    if spec.weight_bits == 4:
        codes = unpack_nibbles(operands["weight"], channels)
    else:
        integers = unpack_bytes(operands["weight"], channels)
        codes, zero_point = (integers.astype(np.int16) + 128).astype(np.uint8), zero_point + 128
    if spec.geometry is None:
        codes = codes.reshape(codes.shape[:2])
    columns = (-1, *(1,) * (codes.ndim - 1))
    weight = PackedWeight.of(
        torch.from_numpy(codes),
        torch.from_numpy(scale.reshape(columns).copy()),
        torch.from_numpy(zero_point.reshape(columns).copy()),
        spec.weight_bits,
    )
    rows = [torch.from_numpy(row.copy()) for row in operands["tables"]]
    activation = ActivationTensors(
        rows[0], rows[1], rows[2].int(), rows[3].int(), spec.activation_bits
    )
    return LayerTensors(weight, activation, torch.from_numpy(bias.copy()))


class KernelLayer(WeightlessLayer):
    """A linear layer or 2-D convolution computed by `torch.ops.trtq.low_bit`.

    Args:
        tensors: integers and scales of the layer.
        geometry: geometry of a convolution; None for a linear layer.
    """

    packed: Tensor
    terms: Tensor
    tables: Tensor

    def __init__(self, tensors: LayerTensors, geometry: ConvGeometry | None) -> None:
        super().__init__(tensors.weight.shape, geometry)
        self.spec, operands = packed_operands(tensors, geometry)
        self._flat = flat_fields(self.spec)
        self._has_bias = tensors.bias is not None
        transform = tensors.transform
        axis = -1 if geometry is None else 1
        self.input_transform = None if transform is None else InputTransform(transform, axis)
        for name, values in operands.items():
            # `weight` is the empty parameter whose dtype other code reads.
            self.register_buffer("packed" if name == "weight" else name, torch.from_numpy(values))

    @property
    def bias(self) -> Tensor | None:
        """The bias, float32 `[N]`, a row of `terms`; None: the layer has no bias."""
        return self.terms[1] if self._has_bias else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KernelLayer:
        """Apply `fn` as for other modules, but keep scales in float32 and weights contiguous.

        Converting a model to channels last would reorder every 4-D tensor, including packed weights.
        """
        scales = {name: getattr(self, name) for name in ("terms", "tables")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, exact in scales.items():
            setattr(self, name, exact.to(self.packed.device))
        self.packed = self.packed.contiguous()
        return self

    def forward(self, input: Tensor, step: Step | None = None) -> Tensor:
        """input[B, ...] -> the layer's output, with the dtype of the input.

        Args:
            input: input, with the rows of `step` first; named as in `nn.Linear`.
            step: index of the denoising step, one for all rows or one per row; None: the step of the
                enclosing `step_scope`.

        Raises:
            StepError: there is no current step, or the number of indices does not fit the rows.
            UsageError: the input has a shape or dtype that the layer does not accept.
        """
        index = torch.as_tensor(enclosing_step(step), device=input.device)
        check_indices(index, len(input))
        index = index.expand(len(input))
        x = input if self.input_transform is None else self.input_transform(input)
        result: Tensor = low_bit(
            x, self.packed, self.terms, self.tables, index.contiguous(), None, self._flat, False
        )
        return result
