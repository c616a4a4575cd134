"""Random streams that depend only on their key, not on earlier draws."""

from __future__ import annotations

import hashlib
import math
import threading
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["seeded_generator", "seeded_normal"]

_CHUNK = 16
# Reseeding a stream takes a hundredth of the time of creating one.
_STREAM = np.random.RandomState(0)
_STREAM_LOCK = threading.Lock()


def _number(key: tuple[int | str, ...]) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def seeded_generator(*key: int | str) -> torch.Generator:
    """A torch generator for a key, e.g. `(seed, "noise", image)`; each key has a different stream."""
    import torch

    return torch.Generator().manual_seed(_number(key))


def seeded_normal(shape: tuple[int, ...], *key: int | str) -> np.ndarray:
    """The values of `torch.randn(shape, generator=seeded_generator(*key))`, without torch.

    Stream (MT19937) and pairing in the Box-Muller transform are those of torch on a CPU, so the values
    equal torch's except for the last bits of logarithms and cosines.

    Args:
        shape: shape of at least 16 values; torch draws fewer values with another algorithm.
        key: key of the stream, see `seeded_generator`.

    Returns:
        Standard normal values, float32[*shape].
    """
    count = math.prod(shape)
    assert count >= _CHUNK
    whole, rest = count - count % _CHUNK, count % _CHUNK
    drawn = count + (_CHUNK if rest else 0)
    # torch seeds MT19937 with the low 32 bits, and redraws the last 16 values after an incomplete chunk.
    with _STREAM_LOCK:
        _STREAM.seed(_number(key) & 0xFFFFFFFF)
        words = _STREAM.randint(0, 1 << 32, size=drawn, dtype=np.uint32)
    uniform = (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
    values = np.empty(count, np.float32)
    _box_muller(uniform[:whole], values[:whole])
    if rest:
        _box_muller(uniform[count:], values[-_CHUNK:])
    return values.reshape(shape)


def _box_muller(uniform: np.ndarray, out: np.ndarray) -> None:
    """Uniform in [0, 1) -> standard normal; in chunks of 16: 8 radii, then 8 angles."""
    half = _CHUNK // 2
    chunks, normal = uniform.reshape(-1, _CHUNK), out.reshape(-1, _CHUNK)
    radius = np.sqrt(np.float32(-2) * np.log(1 - chunks[:, :half]))
    angle = np.float32(2 * math.pi) * chunks[:, half:]
    np.multiply(radius, np.cos(angle), out=normal[:, :half])
    np.multiply(radius, np.sin(angle), out=normal[:, half:])
