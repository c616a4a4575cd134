"""Weights in the kernel's layout; `trtq.quant.packing` compares it with those of files and graphs.

Channels are innermost, padded to a multiple of 32. Eight codes 0 .. 15 share four bytes: byte j holds
the code of channel j in its low nibble and the code of channel j + 4 in its high nibble. The codes 1 2
3 4 5 6 7 8 make the bytes 0x51 0x62 0x73 0x84. The four low nibbles of a 32-bit word are adjacent
channels, and so are the four high nibbles, so two operations unpack each half to bytes. Padding holds
the zero point, the code of zero.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trtq.errors import ArtefactError, QuantizationError
from trtq.plugins.spec import CHANNEL_BLOCK

__all__ = ["pack_bytes", "pack_nibbles", "storage_bits", "terms", "unpack_bytes", "unpack_nibbles"]

_Integers = NDArray[np.integer[Any]]
_Int8 = NDArray[np.int8]
_UInt8 = NDArray[np.uint8]
_Code = TypeVar("_Code", np.int8, np.uint8)
_WORD = 8
_HIGHEST = 15


def storage_bits(bits: int, zero_point: _Integers) -> int:
    """4 if codes and zero points `[N]` fit nibbles, otherwise 8.

    Args:
        bits: width of the codes.
        zero_point: zero points, integers `[N]`.
    """
    small = bool(((zero_point >= 0) & (zero_point <= _HIGHEST)).all())
    return 4 if bits <= 4 and small else 8


def _innermost(values: NDArray[_Code], fill: _Integers) -> NDArray[_Code]:
    """[N, C] or [N, C, kh, kw] -> [N, kh, kw, C32], padded with `fill[N]`."""
    if values.ndim == 2:
        values = values[:, :, None, None]
    moved: NDArray[_Code] = np.moveaxis(values, 1, -1)
    out = np.empty(
        (*moved.shape[:-1], -(-moved.shape[-1] // CHANNEL_BLOCK) * CHANNEL_BLOCK), values.dtype
    )
    out[...] = fill.reshape(-1, 1, 1, 1)
    out[..., : moved.shape[-1]] = moved
    return out


def _outermost(values: NDArray[_Code], channels: int) -> NDArray[_Code]:
    """[N, kh, kw, C32] -> [N, C, kh, kw]; inverse of `_innermost`."""
    return np.ascontiguousarray(np.moveaxis(values[..., :channels], -1, 1))


def pack_bytes(integers: _Int8) -> _Int8:
    """Pack codes minus zero points: int8[N, C] or [N, C, kh, kw] -> int8[N, kh, kw, C32]."""
    return _innermost(integers, np.zeros(len(integers), np.int8))


def unpack_bytes(packed: _Int8, channels: int) -> _Int8:
    """int8[N, kh, kw, C32] -> int8[N, C, kh, kw]; inverse of `pack_bytes`."""
    return _outermost(packed, channels)


def pack_nibbles(codes: _UInt8, zero_point: _Integers) -> _Int8:
    """Pack codes in 0 .. 15: uint8[N, C] or [N, C, kh, kw] -> int8[N, kh, kw, C32 / 2].

    The bytes have the type int8, because engines accept no other one-byte constants.

    Args:
        codes: codes of the weight.
        zero_point: zero points, `[N]`, the codes of the padding.

    Raises:
        QuantizationError: a code or zero point does not fit a nibble.
    """
    for name, values in (("codes", codes), ("zero points", zero_point)):
        if values.size and not (values.min() >= 0 and values.max() <= _HIGHEST):
            raise QuantizationError(
                f"{name} span {values.min()} .. {values.max()}; nibbles hold 0 .. {_HIGHEST}"
            )
    words = _innermost(codes, zero_point.astype(np.uint8))
    words = words.reshape(*words.shape[:-1], -1, 2, _WORD // 2)
    packed = words[..., 0, :] + 16 * words[..., 1, :]
    return packed.astype(np.uint8).reshape(*packed.shape[:-2], -1).view(np.int8)


def unpack_nibbles(packed: _Int8, channels: int) -> _UInt8:
    """int8[N, kh, kw, C32 / 2] -> uint8[N, C, kh, kw]; inverse of `pack_nibbles`.

    Raises:
        ArtefactError: the packed weight has fewer channels.
    """
    if 2 * packed.shape[-1] < channels:
        raise ArtefactError(
            f"a packed weight of {2 * packed.shape[-1]} channels cannot hold {channels}"
        )
    words = packed.view(np.uint8).reshape(*packed.shape[:-1], -1, _WORD // 2)
    codes = np.stack([words & _HIGHEST, words >> 4], axis=-2)
    return _outermost(codes.reshape(*packed.shape[:-1], -1), channels)


def terms(
    scale: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    zero_point: _Integers,
    integers: _Int8,
) -> NDArray[np.float32]:
    """The kernel's terms per output channel, float32[4, N]: scale, bias, zero point, sum of `q - z`.

    Args:
        scale: scales `d`, `[N]`.
        bias: biases, `[N]`; None: no bias.
        zero_point: zero points `z` of codes stored as nibbles, `[N]`; zeros for bytes.
        integers: weights `q - z`, `[N, ...]`.

    Raises:
        QuantizationError: a sum of integers exceeds the exact integers of float32.
    """
    count = len(scale)
    sums = integers.reshape(count, -1).sum(1, dtype=np.int64)
    if np.abs(sums).max(initial=0) > 1 << 24:
        raise QuantizationError(
            f"the integers of a channel sum to {np.abs(sums).max()}, beyond 2^24"
        )
    rows = [scale, np.zeros(count) if bias is None else bias, zero_point, sums]
    return np.stack([np.asarray(row, np.float32).reshape(count) for row in rows])
