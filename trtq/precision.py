"""Format, bits and scales of a layer: names, and their text `w4a8`, `w4a16`, `fp8`, `nvfp4`.

This module loads neither numpy nor torch, so that a wrong setting is refused at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from trtq.bits import parse_bits
from trtq.documents import shown
from trtq.errors import RecipeError

__all__ = [
    "FORMATS",
    "GROUPS",
    "HALF_BITS",
    "METHODS",
    "WEIGHT_ONLY_BITS",
    "Format",
    "Method",
    "Precision",
    "ScaleChoice",
    "ScalePolicy",
    "fitting_group",
    "parse_precision",
    "precision_text",
]

Format = Literal["int", "weight_only", "fp8", "nvfp4"]
"""Formats of low-bit layers. `int`: integer weights and activations. `weight_only`: symmetric codes of
the weight, activations in float. `fp8`: E4M3 weights and activations. `nvfp4`: E2M1 weights and
activations in blocks with E4M3 scales."""
FORMATS: tuple[Format, ...] = get_args(Format)

HALF_BITS = 16
"""Activation bits of a weight-only layer, whose activations are not quantised."""
WEIGHT_ONLY_BITS = (4, 8)
GROUPS = (128, 64, 32)
"""Input channels that may share a scale of a weight-only layer, largest first."""
_DEFAULT_GROUP = 64
_FLOATS: dict[str, tuple[Format, int]] = {"fp8": ("fp8", 8), "nvfp4": ("nvfp4", 4)}


ScalePolicy = Literal["step", "row", "hybrid"]
"""Origin of an activation's scale, see `trtq.quant.dynamic_scale`."""

ScaleChoice = Literal["step", "row", "hybrid", "auto"]
"""Origin of an activation's scale in a recipe. `auto`: calibration chooses `step` or `row` for each
linear layer, and each product of attention, by the error of the output; everything else has `step`."""

Method = Literal["minmax", "search"]
"""Methods of finding ranges of weights and activations, see `trtq.quant.ranges`."""
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Precision:
    """Format and bits of a layer.

    Attributes:
        format: see `Format`.
        weight_bits: width of the weight codes.
        activation_bits: width of the activation codes; `HALF_BITS`: not quantised.
    """

    format: Format
    weight_bits: int
    activation_bits: int


def parse_precision(text: str) -> Precision:
    """`w4a8` -> integers, `w4a16` -> weight-only, `fp8`, `nvfp4`.

    Raises:
        RecipeError: the text is malformed, or a width is not supported.
    """
    lowered = text.lower()
    if lowered in _FLOATS:
        name, bits = _FLOATS[lowered]
        return Precision(name, bits, bits)
    weights, marker, rest = lowered.partition(f"a{HALF_BITS}")
    if marker and not rest and weights.startswith("w") and weights[1:].isdecimal():
        if weights[1:] not in map(str, WEIGHT_ONLY_BITS):
            raise RecipeError(
                f"bits={shown(text)} is not supported; weight-only layers are w4a16 or w8a16"
            )
        return Precision("weight_only", int(weights[1:]), HALF_BITS)
    return Precision("int", *parse_bits(text))


def precision_text(
    weight: int | None, activation: int | None, right: int | None = None, format: str = "int"
) -> str:
    """Precision as text: `w4a4`, `w4a16`, `fp8`, `nvfp4`, for a product `a8a4`, or `float`."""
    if activation is None:
        return "float"
    if format in _FLOATS:
        return format
    return f"a{activation}a{right}" if weight is None else f"w{weight}a{activation}"


def fitting_group(channels: int, wanted: int | None, bits: int) -> int | None:
    """The number of input channels that share a scale of a weight-only linear layer.

    Args:
        channels: number K of input channels.
        wanted: largest allowed group, one of `GROUPS`, or 0 for one scale per output channel; None: 64
            with 4-bit codes, and one scale per output channel with 8-bit codes.
        bits: width of the weight codes.

    Returns:
        The largest of `GROUPS` that is no larger than wanted and divides K; None: no group does, or
        one scale per output channel was requested.
    """
    if wanted is None:
        wanted = _DEFAULT_GROUP if bits == WEIGHT_ONLY_BITS[0] else 0
    return next((group for group in GROUPS if group <= wanted and channels % group == 0), None)
