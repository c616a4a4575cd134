"""The reference of a fused plugin's values before their codes, in numpy; the kernel's are equal.

Every operation is in float32 and rounds once. The order of additions is part of the definition:

    rows     lane l of 32 adds channels l, l + 32, ... in order; then lanes that differ by 16, 8, 4, 2
             and 1 are added
    groups   thread t of 512 adds values t, t + 512, ... of the group in order, channel after channel;
             then lanes of each of 16 warps as above, and the warps in order

    mean = sum / count        inverse = 1 / sqrt(sum (x - mean)^2 / count + epsilon)
    y = ((x - mean) * inverse) * scale + shift, then SiLU, then * factor

The exponential is a polynomial, and 1 - erf is formula 7.1.26 of Abramowitz and Stegun, both with a
fixed order of operations, so that no library's functions matter.

Letters: B images; C channels; P pixels of an image, or tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtq.plugins.fused.attributes import Fusion

__all__ = ["exponential", "gelu", "prepared", "silu"]

_Float = NDArray[np.float32]
_LANES, _THREADS = 32, 512
_f = np.float32


def exponential(x: _Float) -> _Float:
    """e^x in float32, clipped to [-87, 88]."""
    x = np.fmin(np.fmax(x, _f(-87)), _f(88))
    n = np.rint(x * _f(1.44269504))
    r = (x + n * _f(-0.693359375)) + n * _f(2.12194440e-4)
    y = np.full_like(r, _f(1) / _f(5040))
    for factor in (720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0):
        y = y * r + _f(1) / _f(factor)
    result: _Float = y * ((n.astype(np.int32) + 127) << 23).view(np.float32)
    return result


def silu(y: _Float) -> _Float:
    """Y / (1 + e^-y) in float32."""
    result: _Float = y / (_f(1) + exponential(-y))
    return result


def gelu(x: _Float) -> _Float:
    """X (1 + erf(x / sqrt 2)) / 2 in float32."""
    z = np.abs(x) * _f(0.70710678)
    t = _f(1) / (_f(1) + _f(0.3275911) * z)
    y = np.full_like(t, 1.061405429)
    for term in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        y = y * t + _f(term)
    rest = (y * t) * exponential(-(z * z))
    result: _Float = (_f(0.5) * x) * np.where(x < 0, rest, _f(2) + -rest)
    return result


def prepared(
    x: NDArray[np.generic],
    fusion: Fusion,
    affine: _Float | None = None,
    image_shift: NDArray[np.generic] | None = None,
    *,
    channels_first: bool = False,
) -> _Float:
    """Values in front of their codes.

    Args:
        x: input, see `trtq.plugins.fused.attributes`.
        fusion: what precedes the codes.
        affine: scale, shift, factor and epsilon, float32[4, C]; None: nothing precedes them.
        image_shift: values of which some are added to each image's channels, [B, ...].
        channels_first: whether x is `[B, C, H, W]`.

    Returns:
        The values, in the shape of the layer's input: `[B, P, C]` for heads.
    """
    values = x.astype(np.float32)
    if affine is None:
        return values
    if fusion.heads:
        values = values.swapaxes(1, 2).reshape(len(x), x.shape[2], -1)
    if image_shift is not None:
        first, count = fusion.shift_first, affine.shape[1]
        shift = image_shift[:, first : first + count].astype(np.float32)
        values = values + shift[:, :, None, None]
    if fusion.norm == "layer":
        values = _layer_norm(values, affine[3, 0])
    elif fusion.norm == "gated":
        values, gates = np.split(values, 2, axis=-1)
        values = values * gelu(gates)
    elif fusion.norm == "group":
        values = _group_norm(values, fusion.norm_groups, affine[3, 0])
    columns = (3, -1, *(1,) * (values.ndim - 2)) if channels_first else (3, -1)
    scale, shift, factor = affine[:3].reshape(columns)
    values = values * scale + shift
    if fusion.activated:
        values = silu(values)
    result: _Float = values * factor
    return result


def _lane_sum(lanes: _Float) -> _Float:
    """The sum over the last axis of 32 lanes."""
    for width in (16, 8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    total: _Float = lanes[..., 0]
    return total


def _strided_sum(values: _Float, threads: int) -> _Float:
    """Sums of threads: values[..., n] -> [..., threads], every `threads`-th value in order."""
    count = values.shape[-1]
    padding = [(0, 0)] * (values.ndim - 1) + [(0, -count % threads)]
    parts = np.pad(values, padding).reshape(*values.shape[:-1], -1, threads)
    sums = np.zeros(parts.shape[:-2] + parts.shape[-1:], np.float32)
    for index in range(parts.shape[-2]):
        sums = sums + parts[..., index, :]
    return sums


def _layer_norm(values: _Float, epsilon: np.float32) -> _Float:
    count = _f(values.shape[-1])
    mean = (_lane_sum(_strided_sum(values, _LANES)) / count)[..., None]
    centred = values + -mean
    variance = _lane_sum(_strided_sum(centred * centred, _LANES)) / count
    inverse: _Float = _f(1) / np.sqrt(variance + epsilon)
    result: _Float = centred * inverse[..., None]
    return result


def _group_norm(values: _Float, groups: int, epsilon: np.float32) -> _Float:
    rows = values.reshape(len(values), groups, -1)
    count = _f(rows.shape[-1])
    mean = (_block_sum(rows) / count)[..., None]
    centred = rows + -mean
    variance = _block_sum(centred * centred) / count
    inverse: _Float = _f(1) / np.sqrt(variance + epsilon)
    result: _Float = (centred * inverse[..., None]).reshape(values.shape)
    return result


def _block_sum(rows: _Float) -> _Float:
    threads = _strided_sum(rows, _THREADS)
    warps = _lane_sum(threads.reshape(*threads.shape[:-1], -1, _LANES))
    total: _Float = warps[..., 0]
    for index in range(1, warps.shape[-1]):
        total = total + warps[..., index]
    return total
