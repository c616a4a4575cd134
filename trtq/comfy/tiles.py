"""Nibbles and tiles: the layouts of 4-bit codes and of block scales.

Block scales lie in tiles of 128 rows and 4 columns, as cuBLAS reads them (cuBLAS documentation, "1D
block scaling factors layout"): row 32 a + b of a tile (a < 4, b < 32), column c is at place
16 b + 4 a + c.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_signed", "tiled", "tiled_shape", "unpack_signed", "unpack_unsigned", "untiled"]

_ROWS, _COLUMNS = 128, 4


def pack_signed(codes: Tensor) -> Tensor:
    """int8 codes[..., K] in -8 .. 7 -> int8[..., K / 2]; the low half of a byte is the even code."""
    low, high = codes[..., 0::2] & 0xF, codes[..., 1::2] & 0xF
    return low | (high << 4)


def unpack_signed(packed: Tensor) -> Tensor:
    """Inverse of `pack_signed`."""
    # A shift of int8 to the right keeps the sign.
    low, high = (packed << 4) >> 4, packed >> 4
    return torch.stack([low, high], -1).flatten(-2)


def unpack_unsigned(packed: Tensor) -> Tensor:
    """As `unpack_signed`, for codes in 0 .. 15."""
    return torch.stack([packed & 0xF, (packed >> 4) & 0xF], -1).flatten(-2)


def tiled_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of `tiled` of a matrix[rows, columns]."""
    return -(-rows // _ROWS) * _ROWS, -(-columns // _COLUMNS) * _COLUMNS


def tiled(matrix: Tensor) -> Tensor:
    """matrix[R, C] -> the same values in tiles, padded with zeros, see the module docstring."""
    rows, columns = tiled_shape(*matrix.shape)
    whole = matrix.new_zeros(rows, columns)
    whole[: matrix.shape[0], : matrix.shape[1]] = matrix
    tiles = whole.reshape(rows // _ROWS, 4, 32, columns // _COLUMNS, _COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def untiled(stored: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of `tiled`: the matrix[rows, columns] without the padding."""
    high, wide = tiled_shape(rows, columns)
    tiles = stored.reshape(high // _ROWS, wide // _COLUMNS, 32, 4, _COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(high, wide)[:rows, :columns]
