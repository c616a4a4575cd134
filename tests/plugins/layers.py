"""Random low-bit layers with all operands of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trtq.plugins.low_bit import pack
from trtq.plugins.spec import Geometry, Problem


@dataclass
class Case:
    problem: Problem
    x: np.ndarray  # [B, C, H, W]
    codes: np.ndarray  # uint8[N, C, kh, kw]
    zero_point: np.ndarray
    integers: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    tables: np.ndarray
    step: np.ndarray
    bits: int

    @property
    def terms(self):
        zero_point = self.zero_point if self.bits == 4 else np.zeros_like(self.zero_point)
        return pack.terms(self.scale, self.bias, zero_point, self.integers)

    @property
    def packed(self):
        if self.bits == 4:
            return pack.pack_nibbles(self.codes, self.zero_point)
        return pack.pack_bytes(self.integers)


def draw(
    seed,
    *,
    batch=2,
    height=5,
    width=4,
    channels=36,
    out=20,
    geometry=None,
    bits=4,
    activation_bits=4,
    channels_last=False,
    half=True,
    steps=5,
):
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
    x = (rng.standard_normal((batch, channels, height, width)) * 2).astype(np.float16)
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
