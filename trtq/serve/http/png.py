"""PNG files without an imaging library."""

from __future__ import annotations

import struct
import zlib

import numpy as np

__all__ = ["png_bytes"]

_GREY, _RGB = 0, 2


def png_bytes(pixels: np.ndarray) -> bytes:
    """uint8[H,W] or uint8[H,W,3] -> the bytes of a PNG file."""
    height, width = pixels.shape[:2]
    colour = _GREY if pixels.ndim == 2 else _RGB
    # Each row begins with the number of its filter; 0 means no filter.
    rows = np.zeros((height, 1 + pixels[0].size), np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
