"""Supported bit widths of codes, and which widths are symmetric."""

from __future__ import annotations

import re

from trtq.documents import shown
from trtq.errors import RecipeError

__all__ = ["BITS", "check_bits", "parse_bits", "symmetric_weights"]

BITS = (2, 3, 4, 5, 6, 7, 8)
_BITS_TEXT = re.compile(r"w([0-9]{1,3})a([0-9]{1,3})")


def check_bits(bits: int) -> int:
    """Return `bits` if the width is supported.

    Raises:
        RecipeError: `bits` is not one of 2 .. 8.
    """
    if bits not in BITS:
        raise RecipeError(f"bits={bits} is not supported; choose one of {BITS[0]} .. {BITS[-1]}")
    return bits


def parse_bits(text: str) -> tuple[int, int]:
    """`w4a8` -> (4, 8): the bits of weights and of activations.

    Raises:
        RecipeError: the text is malformed, or a width is not supported.
    """
    match = _BITS_TEXT.fullmatch(text.lower())
    if match is None:
        raise RecipeError(f"bits={shown(text)} is malformed; write e.g. w4a4 or w8a8")
    return check_bits(int(match[1])), check_bits(int(match[2]))


def symmetric_weights(bits: int) -> bool:
    """Whether weights of this width have their zero point in the middle of the codes.

    8-bit weights fit int8 in this form only. Symmetric 7-bit weights lie in -64 .. 63, so the sum of
    two products with 8-bit activations fits int16, the accumulator type of processors without VNNI.
    """
    return bits >= 7
