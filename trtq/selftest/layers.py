"""Random low-bit layers with all operands of a kernel, in numpy.

Letters: B images; C input channels; N output channels; T steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtq.plugins.low_bit import pack
from trtq.plugins.spec import Geometry, Problem

__all__ = ["Array", "Case", "draw"]

Array = NDArray[Any]


@dataclass
class Case:
    """A layer and its input.

    Attributes:
        problem: sizes of the call.
        x: input, `[B, C, H, W]`, float16 or float32.
        codes: weight codes q, uint8[N, C, kh, kw].
        zero_point: zero point z of each output channel, `[N]`.
        integers: weights `q - z`, int8[N, C, kh, kw].
        scale: scale of each output channel, float32[N].
        bias: bias of each output channel, float32[N].
        tables: scale, its reciprocal, smallest and largest code of each step, float32[4, T].
        step: index of each image's step, `[B]`.
        bits: storage bits of the weights, 4 or 8.
    """

    problem: Problem
    x: Array
    codes: Array
    zero_point: Array
    integers: Array
    scale: Array
    bias: Array
    tables: Array
    step: Array
    bits: int

    @property
    def terms(self) -> Array:
        """Terms per output channel, float32[4, N]."""
        zero_point = self.zero_point if self.bits == 4 else np.zeros_like(self.zero_point)
        return pack.terms(self.scale, self.bias, zero_point, self.integers)

    @property
    def packed(self) -> Array:
        """The weight in the kernels' layout."""
        if self.bits == 4:
            return pack.pack_nibbles(self.codes, self.zero_point)
        return pack.pack_bytes(self.integers)


def draw(
    seed: int,
    *,
    batch: int = 2,
    height: int = 5,
    width: int = 4,
    channels: int = 36,
    out: int = 20,
    geometry: Geometry | None = None,
    bits: int = 4,
    activation_bits: int = 4,
    channels_last: bool = False,
    half: bool = True,
    steps: int = 5,
) -> Case:
    """Draw a layer; an odd seed gives values that often lie on rounding ties.

    Args:
        seed: seed of the random numbers.
        batch: number B of images.
        height: height of the input.
        width: width of the input.
        channels: number C of input channels of all groups.
        out: number N of output channels.
        geometry: geometry of the convolution; None: 1 x 1.
        bits: storage bits of the weights, 4 or 8.
        activation_bits: width of the input's codes.
        channels_last: whether values have channels last on the device.
        half: whether values are float16 instead of float32.
        steps: number T of steps in the tables.
    """
    rng = np.random.default_rng(seed)
    geometry = geometry or Geometry()
    problem = Problem(batch, height, width, channels, out, steps, geometry, channels_last)
    shape = (out, channels // geometry.groups, *geometry.kernel)
    codes = rng.integers(0, 1 << bits, shape, dtype=np.uint8)
    zero_point = rng.integers(0, 16, out) if bits == 4 else np.full(out, 128)
    integers = (codes.astype(np.int16) - zero_point.reshape(-1, 1, 1, 1)).astype(np.int8)
    # Powers of two that differ by step, so that values often lie on rounding ties.
    scale = 2.0 ** -rng.integers(2, 5, steps).astype(np.float32)
    span = (1 << activation_bits) - 1
    low = -rng.integers(0, span + 1, steps) if activation_bits < 8 else np.full(steps, -128)
    tables = np.stack([scale, 1 / scale, low, low + span]).astype(np.float32)
    x: Array = (rng.standard_normal((batch, channels, height, width)) * 2).astype(np.float16)
    x = np.round(x * 8) / 8 if seed % 2 else x
    return Case(
        problem,
        x.astype(np.float16 if half else np.float32),
        codes,
        zero_point,
        integers,
        rng.uniform(0.001, 0.01, out).astype(np.float32),
        rng.standard_normal(out).astype(np.float32),
        tables,
        rng.integers(0, steps, batch),
        bits,
    )
