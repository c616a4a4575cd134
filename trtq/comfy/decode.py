"""Decoding of ComfyUI's quantised weights into float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trtq.comfy.formats import E2M1, StoredWeight
from trtq.comfy.rotation import rotate
from trtq.comfy.tiles import tiled_shape, unpack_signed, unpack_unsigned, untiled
from trtq.documents import shown
from trtq.errors import ArtefactError

__all__ = ["decode", "logical_shape", "required_tensors"]

_BLOCK = {"nvfp4": 16, "mxfp8": 32}
_CODES = {
    "int8_tensorwise": ("I8",),
    "convrot_w4a4": ("I8",),
    "float8_e4m3fn": ("F8_E4M3", "U8"),
    "float8_e5m2": ("F8_E5M2", "U8"),
    "nvfp4": ("U8",),
    "mxfp8": ("F8_E4M3", "U8"),
    "awq_w4a16": ("I8", "U8"),
}
"""Dtypes of the codes in safetensors' notation; some writers store float8 as bytes."""


def required_tensors(format_name: str) -> tuple[str, ...]:
    """Last levels of the names of the tensors that a layer of a format must have."""
    more = {"nvfp4": ("weight_scale_2",), "awq_w4a16": ("weight_zeros",)}
    return ("weight", "weight_scale", *more.get(format_name, ()))


def logical_shape(format_name: str, dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the weight that codes of a format decode to.

    Args:
        format_name: one of `trtq.comfy.formats.FORMATS`.
        dtype: dtype of the stored codes, in safetensors' notation.
        shape: shape of the stored codes.

    Raises:
        ArtefactError: the codes have another dtype or number of axes than the format.
    """
    packed = format_name in ("convrot_w4a4", "nvfp4", "awq_w4a16")
    axes_fit = len(shape) == 2 if packed or format_name == "mxfp8" else len(shape) >= 1
    if dtype not in _CODES[format_name] or not axes_fit:
        raise ArtefactError(
            f"its codes are {dtype} {list(shape)}, but {format_name} has "
            f"{' or '.join(_CODES[format_name])}{' with 2 axes' if packed else ''}"
        )
    return (shape[0], 2 * shape[1]) if packed else shape


def decode(stored: StoredWeight) -> Tensor:
    """The weight that a file holds, with the rotation undone and the scale of the input applied.

    Args:
        stored: format and tensors of a layer; `pre_quant_scale`[K], if present, multiplies the layer's
            input, so it is multiplied into the weight.

    Returns:
        float32[N, K].

    Raises:
        ArtefactError: a scale has the wrong shape or is not positive and finite, or the rotation does
            not fit; the caller adds the layer.
    """
    tensors = stored.tensors
    if stored.format.name == "awq_w4a16":
        weight = _awq(tensors, stored.format.group)
    else:
        weight = _DECODERS[stored.format.name](tensors)
    rotation = stored.format.rotation
    if rotation:
        if weight.ndim != 2 or weight.shape[1] % rotation:
            raise ArtefactError(
                f"its rotation of {rotation} channels does not fit a weight {list(weight.shape)}"
            )
        weight = rotate(weight, rotation)
    if "pre_quant_scale" in tensors:
        scale = tensors["pre_quant_scale"].float()
        if scale.numel() != weight.shape[-1] or not bool(torch.isfinite(scale).all()):
            raise ArtefactError(
                f"its pre_quant_scale {list(scale.shape)} is not one finite number per input"
            )
        weight = weight * scale.reshape(-1)
    return weight


def _scale(tensors: Mapping[str, Tensor], name: str, *counts: int) -> Tensor:
    """A float32 scale that must be positive and finite and have one of these numbers of elements."""
    scale = tensors[name]
    if not scale.is_floating_point() or scale.numel() not in counts:
        raise ArtefactError(
            f"its {name} is {scale.dtype} {list(scale.shape)}; {' or '.join(map(str, counts))} "
            "floating-point numbers are required"
        )
    scale = scale.float()
    if not bool(torch.isfinite(scale).all()) or bool((scale <= 0).any()):
        raise ArtefactError(f"its {name} holds {shown(_worst(scale))}, which is no positive number")
    return scale


def _worst(scale: Tensor) -> float:
    bad = scale[~torch.isfinite(scale) | (scale <= 0)]
    return float(bad.reshape(-1)[0])


def _rows(tensors: Mapping[str, Tensor], codes: Tensor) -> Tensor:
    """Codes times one scale per tensor or per output."""
    scale = _scale(tensors, "weight_scale", 1, len(codes))
    shape = (-1, *(1,) * (codes.ndim - 1)) if scale.numel() > 1 else ()
    return codes * scale.reshape(shape)


def _int8(tensors: Mapping[str, Tensor]) -> Tensor:
    return _rows(tensors, tensors["weight"].float())


def _int4(tensors: Mapping[str, Tensor]) -> Tensor:
    return _rows(tensors, unpack_signed(tensors["weight"]).float())


def _awq(tensors: Mapping[str, Tensor], group: int) -> Tensor:
    codes = unpack_unsigned(tensors["weight"]).float()
    rows, columns = codes.shape
    if columns % group:
        raise ArtefactError(f"its {columns} inputs are no multiple of its group_size {group}")
    count = rows * (columns // group)
    scales = _scale(tensors, "weight_scale", count).reshape(-1, rows).T.unsqueeze(-1)
    zeros = tensors["weight_zeros"].float()
    if zeros.numel() != count or not bool(torch.isfinite(zeros).all()):
        raise ArtefactError(
            f"its weight_zeros {list(zeros.shape)} are not {count} finite numbers, one per scale"
        )
    zeros = zeros.reshape(-1, rows).T.unsqueeze(-1)
    return ((codes.reshape(rows, -1, group) - 8) * scales + zeros).reshape(rows, columns)


def _fp8(dtype: torch.dtype) -> Callable[[Mapping[str, Tensor]], Tensor]:
    return lambda tensors: _rows(tensors, _as(tensors["weight"], dtype).float())


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of bytes in another dtype of one byte; others are returned unchanged."""
    return tensor.view(dtype) if tensor.dtype == torch.uint8 else tensor


def _block_scales(
    tensors: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The float32 block scales[rows, columns] of a tiled tensor."""
    stored = _as(tensors["weight_scale"], dtype)
    if stored.dtype != dtype or stored.numel() != math.prod(tiled_shape(rows, columns)):
        raise ArtefactError(
            f"its weight_scale is {stored.dtype} {list(stored.shape)}; {dtype} "
            f"{list(tiled_shape(rows, columns))} is required"
        )
    scales = untiled(stored.reshape(-1).view(torch.uint8), rows, columns).contiguous().view(dtype)
    values = scales.float()
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ArtefactError("its weight_scale holds NaN, infinity or a negative number")
    return values


def _nvfp4(tensors: Mapping[str, Tensor]) -> Tensor:
    packed = tensors["weight"]
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    block = _BLOCK["nvfp4"]
    if columns % block:
        raise ArtefactError(f"its {columns} inputs are no multiple of {block}")
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    codes = torch.stack([packed >> 4, packed & 0xF], -1).reshape(rows, -1, block)
    scales = _block_scales(tensors, rows, columns // block, torch.float8_e4m3fn)
    total = tensors["weight_scale_2"].float().reshape(-1)
    if total.numel() != 1 or not bool(torch.isfinite(total).all()) or bool(total < 0):
        raise ArtefactError("its weight_scale_2 is not one finite number")
    return (table[codes.int()] * (total * scales).unsqueeze(-1)).reshape(rows, columns)


def _mxfp8(tensors: Mapping[str, Tensor]) -> Tensor:
    codes = _as(tensors["weight"], torch.float8_e4m3fn).float()
    rows, columns = codes.shape
    block = _BLOCK["mxfp8"]
    if columns % block:
        raise ArtefactError(f"its {columns} inputs are no multiple of {block}")
    scales = _block_scales(tensors, rows, columns // block, torch.float8_e8m0fnu)
    return (codes.reshape(rows, -1, block) * scales.unsqueeze(-1)).reshape(rows, columns)


_DECODERS: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "int8_tensorwise": _int8,
    "convrot_w4a4": _int4,
    "float8_e4m3fn": _fp8(torch.float8_e4m3fn),
    "float8_e5m2": _fp8(torch.float8_e5m2),
    "nvfp4": _nvfp4,
    "mxfp8": _mxfp8,
}
