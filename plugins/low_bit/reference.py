"""The reference of the layer in numpy; the kernel's integers must equal it exactly.

    k = clip(round(x * inv_s[t]), lo[t], hi[t])
    y = sum k (q - z) * (d * s[t]) + bias, plus residual, then SiLU

Letters: B images; C channels of a group; G groups; N output channels; P, Q output height and width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtq.plugins.spec import Geometry

__all__ = ["convolve", "low_bit", "quantize"]

_Float = NDArray[np.float32]


def quantize(x: NDArray[np.generic], tables: _Float, step: NDArray[np.int64]) -> NDArray[np.int8]:
    """Codes of values: x[B, ...], tables[4, T], step[B] -> int8[B, ...].

    Half rounds to even; NaN becomes the smallest code.
    """
    _, inverse, low, high = (row[step].reshape(-1, *(1,) * (x.ndim - 1)) for row in tables)
    with np.errstate(over="ignore", invalid="ignore"):
        codes = np.rint(x.astype(np.float32) * inverse)
    clipped: NDArray[np.int8] = np.fmin(np.fmax(codes, low), high).astype(np.int8)
    return clipped


def convolve(
    codes: NDArray[np.int8], integers: NDArray[np.int8], geometry: Geometry
) -> NDArray[np.int64]:
    """Exact convolution: codes[B, G * C, H, W], integers[N, C, kh, kw] -> int64[B, N, P, Q].

    Args:
        codes: activation codes, int8[B, G * C, H, W].
        integers: weights `q - z`, int8[N, C, kh, kw].
        geometry: geometry of the convolution.
    """
    g = geometry
    (kernel_h, kernel_w), groups = g.kernel, g.groups
    edges = [(0, 0), (0, 0), *((size, size) for size in g.padding)]
    padded = np.pad(codes, edges)
    reach = [dilation * (size - 1) + 1 for dilation, size in zip(g.dilation, g.kernel, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
    windows = windows[:, :, :: g.stride[0], :: g.stride[1], :: g.dilation[0], :: g.dilation[1]]
    batch, channels, height, width = windows.shape[:4]
    # Products of bytes and their sums below 2^53 are exact in float64.
    k = channels // groups * kernel_h * kernel_w
    columns = windows.reshape(batch, groups, channels // groups, height, width, kernel_h, kernel_w)
    columns = columns.transpose(1, 0, 3, 4, 2, 5, 6).reshape(groups, -1, k).astype(np.float64)
    rows = integers.reshape(groups, -1, k).astype(np.float64)
    sums = (columns @ rows.transpose(0, 2, 1)).astype(np.int64)
    sums = sums.reshape(groups, batch, height, width, -1).transpose(1, 0, 4, 2, 3)
    return sums.reshape(batch, -1, height, width)


def low_bit(
    x: NDArray[np.generic],
    integers: NDArray[np.int8],
    terms: _Float,
    tables: _Float,
    step: NDArray[np.int64],
    geometry: Geometry | None = None,
    residual: NDArray[np.generic] | None = None,
    *,
    silu: bool = False,
) -> NDArray[np.generic]:
    """Compute the whole layer.

    Args:
        x: input values, `[B, G * C, H, W]`, float16 or float32.
        integers: weights `q - z`, `[N, C, kh, kw]`.
        terms: terms per output channel, float32[4, N]; the function reads scale and bias.
        tables: scales and limits per step, float32[4, T].
        step: index of each image's step, `[B]`.
        geometry: geometry of the convolution; None: a 1 x 1 convolution.
        residual: values to add, `[B, N, P, Q]`; None: no residual.
        silu: whether to apply SiLU to the result.

    Returns:
        The output, `[B, N, P, Q]`, in the dtype of x.
    """
    sums = convolve(quantize(x, tables, step), integers, geometry or Geometry())
    scale = tables[0][step].reshape(-1, 1, 1, 1) * terms[0].reshape(1, -1, 1, 1)
    y: _Float = sums.astype(np.float32) * scale + terms[1].reshape(1, -1, 1, 1)
    if residual is not None:
        y = y + residual.astype(np.float32)
    if silu:
        y = y / (1 + np.exp(-y))
    out: NDArray[np.generic] = y.astype(x.dtype)
    return out
