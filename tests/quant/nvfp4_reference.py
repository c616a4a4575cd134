"""NVFP4 in numpy, with the number types of ml_dtypes; independent of the code under test."""

import ml_dtypes
import numpy as np

BLOCK, UNIT = 16, np.float32(2.0**-11)
LIMIT, WEIGHT_LIMIT = np.float32(1.3125), np.float32(0.75)


def e4m3(x):
    return np.minimum(x, np.float32(448)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def e2m1(x):
    clipped = np.clip(x, np.float32(-6), np.float32(6))
    return clipped.astype(ml_dtypes.float4_e2m1fn).astype(np.float32) + np.float32(0)


def blocks_of(u, largest=6):
    """Block scales `[..., K / 16]` and numbers `[..., K / 16, 16]`."""
    blocks = u.reshape(*u.shape[:-1], -1, BLOCK)
    scale = e4m3(np.abs(blocks).max(-1) / np.float32(largest) * (1 / UNIT))
    step = (scale * UNIT)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers = np.where(step > 0, e2m1(np.where(step > 0, blocks / step, 0)), 0)
    return scale, numbers.astype(np.float32)


def represented(scale, numbers):
    whole = numbers * (scale * UNIT)[..., None]
    return whole.reshape(*whole.shape[:-2], -1)


def of_input(x, inv_scale):
    u = np.clip(x * inv_scale, -LIMIT, LIMIT).astype(np.float16).astype(np.float32)
    return represented(*blocks_of(u))


def of_weight(w, scale):
    """Four-over-Six: the block's scale with the smaller squared error, 6 if both are equal."""
    u = np.clip(w / scale, -WEIGHT_LIMIT, WEIGHT_LIMIT)
    six, four = blocks_of(u, 6), blocks_of(u, 4)

    def error(pair):
        exact = u.reshape(*u.shape[:-1], -1, BLOCK).astype(np.float64)
        there = pair[1].astype(np.float64) * (pair[0].astype(np.float64) * UNIT)[..., None]
        return ((there - exact) ** 2).sum(-1)

    choose = error(four) < error(six)
    scales = np.where(choose, four[0], six[0])
    return scales, np.where(choose[..., None], four[1], six[1])
