"""What a fused plugin computes in addition to its layer, and the names and attributes of its graph node.

    x (+ image_shift) -> norm -> scale, shift -> SiLU -> factor -> codes
    y = layer(codes) (+ residual) -> SiLU

Letters: B images; C input channels; N output channels.

    x            [B, ..., C], or [B, C, H, W] of a convolution; [B, H, W, C] with `x_last`
                 gated: [B, ..., 2 C], values and gates; with heads: [B, heads, tokens, C / heads]
    affine       float32[4, C]: scale, shift and factor of each channel; the last row begins with the
                 norm's epsilon
    image_shift  [B, ...], in the type of x; C values from `shift_first` on are added to an image
    residual     in type and shape of y
    y            [B, ..., N], or [B, N, P, Q] of a convolution; [B, P, Q, N] with `out_last`

Everything before the codes is float32; the result is rounded to the type of x once, after the residual
and SiLU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtq.errors import UsageError
from trtq.plugins.low_bit.attributes import FIELDS, INPUTS, fields_of, spec_of
from trtq.plugins.spec import LayerSpec

__all__ = [
    "FUSED_FIELDS",
    "FUSED_PLUGINS",
    "NORMS",
    "Fusion",
    "fused_fields",
    "fusion_of",
    "input_names",
]

FUSED_PLUGINS = {"FusedLinear": "LowBitLinear", "FusedConv2d": "LowBitConv2d"}
"""The plugin of the layer alone, by name of the fused plugin."""
NORMS = ("none", "layer", "gated", "group")
"""What precedes scale and shift; `gated`: values times GELU of their gates."""
_FLAGS = {
    "norm": 1,
    "norm_groups": 1,
    "activated": 1,
    "affine": 1,
    "image_shift": 1,
    "shift_first": 1,
    "heads": 1,
    "x_last": 1,
    "out_last": 1,
    "residual": 1,
    "silu": 1,
}
_NUMBERS = ("norm_groups", "shift_first", "heads")
FUSED_FIELDS = FIELDS | _FLAGS
"""Number of integers of each attribute of a fused node, by name."""


@dataclass(frozen=True)
class Fusion:
    """What a fused plugin computes in addition to its layer.

    Attributes:
        norm: one of `NORMS`.
        norm_groups: number of channel groups of a group norm.
        activated: whether SiLU precedes the codes.
        affine: whether there is an input `affine`; every other part before the codes needs it.
        image_shift: whether there is an input `image_shift`.
        shift_first: index of the first channel's value in each row of `image_shift`.
        heads: number of heads of x; 0: x has no axis of heads.
        x_last: whether the input of a convolution has channels last.
        out_last: whether the output of a convolution has channels last.
        residual: whether there is an input `residual`.
        silu: whether SiLU follows the layer.
    """

    norm: str = "none"
    norm_groups: int = 1
    activated: bool = False
    affine: bool = False
    image_shift: bool = False
    shift_first: int = 0
    heads: int = 0
    x_last: bool = False
    out_last: bool = False
    residual: bool = False
    silu: bool = False


def input_names(fusion: Fusion) -> tuple[str, ...]:
    """Names of a node's inputs, in order."""
    further = [name for name in ("affine", "image_shift", "residual") if getattr(fusion, name)]
    return (*INPUTS, *further)


def fused_fields(layer: LayerSpec, fusion: Fusion) -> dict[str, list[int]]:
    """The attributes of a node and plugin; `fusion_of` is the inverse."""
    flags = {name: [int(getattr(fusion, name))] for name in _FLAGS if name != "norm"}
    return fields_of(layer) | {"norm": [NORMS.index(fusion.norm)]} | flags


def fusion_of(name: str, fields: Mapping[str, Sequence[int]]) -> tuple[LayerSpec, Fusion]:
    """The layer and the fusion that a plugin's attributes describe.

    Args:
        name: name of the plugin, one of `FUSED_PLUGINS`.
        fields: attributes, see `fused_fields`.

    Raises:
        UsageError: an attribute is missing or has the wrong length, or no kernel computes the fusion.
    """
    lists = {key: list(values) for key, values in fields.items()}
    layer = spec_of(FUSED_PLUGINS[name], lists)
    for key in _FLAGS:
        if len(lists.get(key, [])) != 1:
            raise UsageError(
                f"the plugin {name} takes {key} as 1 integer, got {lists.get(key)}; build the engine "
                "again with this version"
            )
    numbers = {key: lists[key][0] for key in _FLAGS}
    if not 0 <= numbers["norm"] < len(NORMS):
        raise UsageError(
            f"the plugin {name} has norms 0 to {len(NORMS) - 1}, got {numbers['norm']}"
        )
    norm = NORMS[numbers.pop("norm")]
    flags = {key: bool(value) for key, value in numbers.items() if key not in _NUMBERS}
    sizes: dict[str, Any] = {key: numbers[key] for key in _NUMBERS}
    fusion = Fusion(norm, **sizes, **flags)
    _check(layer, fusion)
    return layer, fusion


def _check(layer: LayerSpec, fusion: Fusion) -> None:
    """Raise unless the kernels compute a fusion."""
    rows = layer.geometry is None or fusion.x_last
    before = fusion.norm != "none" or fusion.activated or fusion.image_shift or fusion.heads > 0
    grouped = layer.geometry is not None and layer.geometry.groups > 1
    wrong = (
        (before and not fusion.affine)
        or (fusion.affine and grouped)
        or (rows and (fusion.norm == "group" or fusion.image_shift))
        or (not rows and (fusion.norm in ("layer", "gated") or fusion.heads > 0))
        or (layer.geometry is None and (fusion.x_last or fusion.out_last))
        or layer.channels % max(fusion.norm_groups, 1) > 0
        or layer.channels % max(fusion.heads, 1) > 0
    )
    if wrong or fusion.norm_groups < 1:
        raise UsageError(f"no kernel computes {fusion} in front of {layer}")
