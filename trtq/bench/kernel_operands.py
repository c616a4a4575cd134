"""Layers for the kernel benchmark: shapes of well-known models, random operands, exact results.

Letters: B images, C channels, H, W pixels, N output channels, T denoising steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trtq.plugins.low_bit import pack
from trtq.plugins.low_bit.op import flat_fields, low_bit
from trtq.plugins.spec import Geometry, LayerSpec, Problem

__all__ = ["FORMS", "SHAPES", "Operands", "Shape", "draw_operands", "expected", "operations"]

FORMS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4)}
"""Bit widths of weights and activations, by name."""
_STEPS = 20


@dataclass(frozen=True)
class Shape:
    """The shape of one layer of a well-known model.

    Attributes:
        model: name of the model.
        size: input shape, `(B, tokens, C)` or `(B, C, H, W)`.
        out: number of output channels N.
        geometry: kernel, stride and padding of a convolution; None for a linear layer.
    """

    model: str
    size: tuple[int, ...]
    out: int
    geometry: Geometry | None = None

    @property
    def text(self) -> str:
        """E.g. `8192 x 320 -> 1280` or `2 x 320 x 64 x 64 -> 320, 3 x 3`."""
        if self.geometry is None:
            return f"{self.size[0] * self.size[1]} x {self.size[2]} -> {self.out}"
        sides = " x ".join(map(str, self.size))
        return f"{sides} -> {self.out}, {self.geometry.kernel[0]} x {self.geometry.kernel[1]}"


_SAME = Geometry((3, 3), padding=(1, 1))
SHAPES = (
    Shape("SD 1.5", (2, 4096, 320), 320),
    Shape("SD 1.5", (2, 4096, 320), 2560),
    Shape("SD 1.5", (2, 4096, 1280), 320),
    Shape("SD 1.5", (2, 1024, 640), 5120),
    Shape("SD 1.5", (2, 320, 64, 64), 320, _SAME),
    Shape("SD 1.5", (2, 640, 32, 32), 640, _SAME),
    Shape("SD 1.5", (2, 1280, 32, 32), 640, _SAME),
    Shape("SDXL", (2, 4096, 640), 5120),
    Shape("SDXL", (2, 4096, 1280), 5120),
    Shape("SDXL", (2, 4096, 5120), 1280),
    Shape("SDXL", (2, 1280, 32, 32), 1280, _SAME),
    Shape("SDXL", (2, 640, 64, 64), 640, _SAME),
    Shape("DiT-XL/2", (16, 256, 1152), 4608),
    Shape("DiT-XL/2", (16, 256, 4608), 1152),
)


def operations(shape: Shape) -> int:
    """Number of operations in a layer; a multiply-add counts as two."""
    geometry = shape.geometry or Geometry()
    if shape.geometry is None:
        rows, channels = shape.size[0] * shape.size[1], shape.size[2]
    else:
        spec = LayerSpec(shape.size[1], shape.out, 1, 8, 8, geometry)
        rows, channels = spec.problem(shape.size).rows, shape.size[1] // geometry.groups
    return 2 * rows * shape.out * channels * geometry.kernel[0] * geometry.kernel[1]


@dataclass(frozen=True)
class Operands:
    """A random layer and its input on a device.

    Attributes:
        spec: channels, bit widths and geometry of the layer.
        x: input in half precision; images are stored with channels last.
        weight: packed weight codes.
        integers: weights `q - z` as int8[N, C, ...].
        terms: per-channel terms of the kernel, float32[4, N].
        tables: scale, inverse scale, lower and upper bound of each step, float32[4, T].
        step: step index of each image, int64[B]; the indices differ if B > 1.
    """

    spec: LayerSpec
    x: Tensor
    weight: Tensor
    integers: Tensor
    terms: Tensor
    tables: Tensor
    step: Tensor

    @property
    def problem(self) -> Problem:
        """Sizes of the call."""
        return self.spec.problem(self.x.shape, channels_last=self.spec.geometry is not None)

    def call(self) -> Tensor:
        """Output of the layer, computed by the low-bit kernels."""
        output: Tensor = low_bit(
            self.x,
            self.weight,
            self.terms,
            self.tables,
            self.step,
            None,
            flat_fields(self.spec),
            False,
        )
        return output


def draw_operands(
    shape: Shape, form: str, device: torch.device, *, steps: int = _STEPS, seed: int = 0
) -> Operands:
    """Create a layer with random weight codes and an input that spans the activation range.

    Args:
        shape: shape of the layer.
        form: name of one of `FORMS`, e.g. `w4a8`.
        device: device of the operands.
        steps: number T of denoising steps in the tables.
        seed: seed of the random numbers.
    """
    weight_bits, activation_bits = FORMS[form]
    rng = np.random.default_rng(seed)
    channels = shape.size[1] if shape.geometry else shape.size[-1]
    spec = LayerSpec(channels, shape.out, steps, weight_bits, activation_bits, shape.geometry)
    geometry = shape.geometry or Geometry()
    size = (shape.out, channels // geometry.groups, *geometry.kernel)
    codes = rng.integers(0, 1 << weight_bits, size, np.uint8)
    zero_point = rng.integers(4, 12, shape.out) if weight_bits == 4 else np.full(shape.out, 128)
    integers = (codes.astype(np.int16) - zero_point.reshape(-1, 1, 1, 1)).astype(np.int8)
    stored = zero_point if weight_bits == 4 else np.zeros_like(zero_point)
    packed = pack.pack_nibbles(codes, zero_point) if weight_bits == 4 else pack.pack_bytes(integers)
    span = (1 << activation_bits) - 1
    scale = (rng.uniform(2, 4, steps) / (span / 2)).astype(np.float32)
    low = np.full(steps, -(1 << (activation_bits - 1)))
    tables = np.stack([scale, 1 / scale, low, low + span]).astype(np.float32)
    terms = pack.terms(
        rng.uniform(0.5e-3, 1e-3, shape.out).astype(np.float32),
        rng.standard_normal(shape.out).astype(np.float32),
        stored,
        integers,
    )
    x = torch.from_numpy(rng.standard_normal(shape.size, np.float32)).to(device).half()
    if shape.geometry is not None:
        x = x.contiguous(memory_format=torch.channels_last)
    step = torch.arange(shape.size[0], device=device) % steps
    tensors = (packed, integers, terms, tables)
    weight, whole, on_device, table = (torch.from_numpy(t).to(device) for t in tensors)
    return Operands(spec, x, weight, whole, on_device, table, step)


def expected(operands: Operands) -> Tensor:
    """The exact output: sums in float64, then the same float32 scaling as in the kernel."""
    o, geometry = operands, operands.spec.geometry
    items = (-1, *(1,) * (o.x.ndim - 1))
    scale, inverse, low, high = (row[o.step].reshape(items) for row in o.tables)
    codes = (o.x.float() * inverse).round().clamp(low, high).double()
    channel = (-1,) if geometry is None else (-1, 1, 1)
    if geometry is None:
        sums = functional.linear(codes, o.integers.double().flatten(1))
    else:
        g = geometry
        size = (codes.shape[0], o.spec.out_channels, -1)
        columns = functional.unfold(codes, g.kernel, g.dilation, g.padding, g.stride)
        sums = (o.integers.double().flatten(1) @ columns).reshape(size)
        sums = sums.reshape(o.spec.problem(o.x.shape).out_shape)
    y = sums.float() * (o.terms[0].reshape(channel) * scale) + o.terms[1].reshape(channel)
    output: Tensor = y.half()
    return output
