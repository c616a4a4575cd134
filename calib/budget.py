"""The limit of a mixed-precision model's cost, as text and as an object."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from trtq.documents import shown
from trtq.errors import RecipeError

__all__ = ["Budget", "parse_budget"]

_BUDGET = re.compile(r"(size|bitops)=([0-9.]+)x")


@dataclass(frozen=True)
class Budget:
    """Cost limit of a mixed-precision model, relative to the float model.

    Attributes:
        kind: `size`: bytes of the denoiser, relative to float32 parameters; `bitops`: weight bits times
            activation bits of every multiplication, relative to half precision.
        share: share of the float model's cost, e.g. 0.15.
    """

    kind: Literal["size", "bitops"]
    share: float


def parse_budget(text: str) -> Budget:
    """`size=0.3x` -> a `Budget`.

    Raises:
        RecipeError: the text is malformed, or the share is not between 0 and 1.
    """
    match = _BUDGET.fullmatch(text)
    try:
        share = float(match[2]) if match else 0.0
    except ValueError:
        share = 0.0
    if match is None or not 0 < share <= 1:
        raise RecipeError(
            f"budget {shown(text)} is not understood; write size=0.15x or bitops=0.1x, a share of the "
            "float model's"
        )
    return Budget("size" if match[1] == "size" else "bitops", share)
