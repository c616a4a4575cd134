"""Encoding of weights for ComfyUI's kernels, bit by bit as comfy-kitchen encodes them.

N, K are a layer's outputs and inputs. All functions take float32 weights or integers on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trtq.comfy.formats import E2M1, INT4_GROUP, LayerFormat, StoredWeight
from trtq.comfy.rotation import rotate
from trtq.comfy.tiles import pack_signed, tiled
from trtq.errors import NonFiniteError, QuantizationError

__all__ = [
    "IntegerWeight",
    "encode_fp8",
    "encode_int4",
    "encode_int8",
    "encode_nvfp4",
    "store_awq",
    "store_int4",
    "store_int8",
]

_INT8_MAX, _INT4_MAX = 127, 7
_INT8_FLOOR, _INT4_FLOOR = 1e-30, 1e-10
"""Floors of the scale (8 bits) and of the largest absolute value (4 bits), for rows of zeros."""
_E4M3_MAX = 448.0
_E2M1_MAX = 6.0
_NVFP4_BLOCK = 16


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight as integers and scales: `w = integers * scale`, perhaps rotated.

    Attributes:
        integers: int8[N, K].
        scale: float32[N, 1], one per output; float32[N, K / G], one per output and group of inputs.
        rotation: group size of the rotation that the integers are in; 0: none.
        group: number G of inputs that share a scale; 0: all of them.
    """

    integers: Tensor
    scale: Tensor
    rotation: int = 0
    group: int = 0

    def dequantize(self) -> Tensor:
        """float32[N, K], with the rotation undone."""
        scale = self.scale.repeat_interleave(self.group, 1) if self.group else self.scale
        values = self.integers.float() * scale
        return rotate(values, self.rotation) if self.rotation else values


def _checked(weight: Tensor) -> Tensor:
    """The weight as float32[N, K].

    Raises:
        QuantizationError: the weight is no matrix.
        NonFiniteError: the weight holds NaN or infinity.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise QuantizationError(
            f"ComfyUI quantises linear layers, whose weight has 2 axes, got {tuple(weight.shape)}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError("the weight holds NaN or infinity")
    return weight.detach().float()


def encode_int8(weight: Tensor, rotation: int = 0) -> IntegerWeight:
    """`q = round(w / s)`, `s = max|w[n]| / 127` per output, of the rotated weight if it is rotated.

    Args:
        weight: float32[N, K].
        rotation: group size, see `trtq.comfy.rotation.rotate`; 0: none.

    Raises:
        QuantizationError: the weight is no matrix, or the rotation does not fit.
        NonFiniteError: the weight holds NaN or infinity.
    """
    values = _checked(weight)
    if rotation:
        values = rotate(values, rotation)
    scale = (values.abs().amax(1, keepdim=True) / _INT8_MAX).clamp_min(_INT8_FLOOR)
    codes = (values / scale).round_().clamp_(-128, 127).to(torch.int8)
    return IntegerWeight(codes, scale, rotation)


def encode_int4(weight: Tensor, rotation: int) -> IntegerWeight:
    """`q = round(w / s)` in -7 .. 7, `s = max|w[n]| / 7` per output, of the rotated weight.

    Args:
        weight: float32[N, K].
        rotation: group size, see `trtq.comfy.rotation.rotate`.

    Raises:
        QuantizationError: the weight is no matrix, or the rotation does not fit.
        NonFiniteError: the weight holds NaN or infinity.
    """
    values = rotate(_checked(weight), rotation)
    scale = values.abs().amax(1, keepdim=True).clamp_min(_INT4_FLOOR) / _INT4_MAX
    codes = (values / scale).round_().clamp_(-_INT4_MAX, _INT4_MAX).to(torch.int8)
    return IntegerWeight(codes, scale, rotation)


def store_int8(weight: IntegerWeight, *, float_input: bool = False) -> StoredWeight:
    """Integers in the format `int8_tensorwise`, with one scale per output; the codes are not changed.

    Args:
        weight: integers with one scale per output.
        float_input: whether the layer's input stays float.
    """
    return StoredWeight(
        LayerFormat("int8_tensorwise", weight.rotation, float_input=float_input),
        {
            "weight": weight.integers.contiguous(),
            "weight_scale": weight.scale.reshape(-1, 1).contiguous(),
        },
    )


def store_int4(weight: IntegerWeight) -> StoredWeight:
    """Integers in the format `convrot_w4a4`, two codes per byte; the codes are not changed.

    Raises:
        QuantizationError: a code does not fit 4 bits, the weight is not rotated, or the number of inputs
            is not a multiple of `INT4_GROUP`.
    """
    codes = weight.integers
    if not weight.rotation or codes.shape[1] % INT4_GROUP:
        raise QuantizationError(
            f"convrot_w4a4 holds rotated weights of a multiple of {INT4_GROUP} inputs; this one has "
            f"{codes.shape[1]} inputs and a rotation of {weight.rotation}"
        )
    if int(codes.min()) < -8 or int(codes.max()) > 7:
        raise QuantizationError(
            f"4-bit codes lie in -8 .. 7, got {int(codes.min())} .. {int(codes.max())}"
        )
    return StoredWeight(
        LayerFormat("convrot_w4a4", weight.rotation),
        {"weight": pack_signed(codes), "weight_scale": weight.scale.reshape(-1).contiguous()},
    )


def store_awq(weight: IntegerWeight) -> StoredWeight:
    """Integers in the format `awq_w4a16`, two codes per byte, whose input stays float.

    Args:
        weight: integers in -8 .. 7 with a scale per group of inputs.

    Raises:
        QuantizationError: a code does not fit 4 bits, or the weight has no groups or is rotated.
    """
    codes = weight.integers
    if not weight.group or weight.rotation:
        raise QuantizationError("awq_w4a16 holds weights with groups of inputs, without rotation")
    if int(codes.min()) < -8 or int(codes.max()) > 7:
        raise QuantizationError(
            f"4-bit codes lie in -8 .. 7, got {int(codes.min())} .. {int(codes.max())}"
        )
    scale = weight.scale.T.contiguous()
    return StoredWeight(
        LayerFormat("awq_w4a16", group=weight.group),
        {
            # An offset of 8 makes the codes unsigned, the offset of the format.
            "weight": pack_signed(codes + 8),
            "weight_scale": scale,
            "weight_zeros": torch.zeros_like(scale),
        },
    )


def encode_fp8(weight: Tensor) -> StoredWeight:
    """A weight in the format `float8_e4m3fn`: `s = max|w| / 448` for the whole tensor.

    Args:
        weight: float32[N, K].

    Raises:
        QuantizationError: the weight is no matrix.
        NonFiniteError: the weight holds NaN or infinity.
    """
    values = _checked(weight)
    scale = values.abs().amax() / _E4M3_MAX
    if not bool(scale > 0):
        scale = torch.ones(())
    codes = (values * (1.0 / scale)).clamp_(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return StoredWeight(
        LayerFormat("float8_e4m3fn"), {"weight": codes, "weight_scale": scale.reshape(())}
    )


def encode_nvfp4(weight: Tensor) -> StoredWeight:
    """A weight in the format `nvfp4`: E2M1 codes, an E4M3 scale per 16 inputs, and one float32 scale.

    The second scale is `s2 = max|w| / (6 * 448)`, a block's scale `E4M3(max|block| / 6 / s2)`; codes are
    rounded to nearest, ties to even.

    Args:
        weight: float32[N, K], N and K multiples of 16.

    Raises:
        QuantizationError: the weight is no matrix, or its sizes are no multiples of 16.
        NonFiniteError: the weight holds NaN or infinity.
    """
    values = _checked(weight)
    rows, columns = values.shape
    if rows % _NVFP4_BLOCK or columns % _NVFP4_BLOCK:
        raise QuantizationError(
            f"nvfp4 needs multiples of {_NVFP4_BLOCK} outputs and inputs, got {rows} and {columns}"
        )
    blocks = values.reshape(rows, -1, _NVFP4_BLOCK)
    tensor_scale = values.abs().amax() / (_E4M3_MAX * _E2M1_MAX)
    safe = tensor_scale if bool(tensor_scale > 0) else torch.ones(())
    block_scale = blocks.abs().amax(-1) / _E2M1_MAX / safe
    block_scale = block_scale.clamp_max(_E4M3_MAX).to(torch.float8_e4m3fn)
    total = (safe * block_scale.float()).unsqueeze(-1)
    scaled = torch.where(total == 0, 0.0, blocks / torch.where(total == 0, 1.0, total))
    codes = _e2m1(scaled.clamp_(-_E2M1_MAX, _E2M1_MAX).reshape(rows, columns))
    return StoredWeight(
        LayerFormat("nvfp4"),
        {
            "weight": (codes[:, 0::2] << 4) | codes[:, 1::2],
            "weight_scale": tiled(block_scale.view(torch.uint8)).view(torch.float8_e4m3fn),
            "weight_scale_2": tensor_scale.reshape(()),
        },
    )


def _e2m1(values: Tensor) -> Tensor:
    """float32 in -6 .. 6 -> E2M1 codes, uint8: bit 3 is the sign, bits 0 .. 2 count the magnitudes."""
    levels = torch.tensor(E2M1)
    middles = (levels[1:] + levels[:-1]) / 2
    magnitude = values.abs()
    above = torch.bucketize(magnitude, middles)
    # On a tie `bucketize` takes the lower neighbour; the even one of the two codes is right.
    tie = (above < len(middles)) & (magnitude == middles[above.clamp_max(len(middles) - 1)])
    code = above + (tie & (above % 2 == 1)).to(above.dtype)
    sign = torch.signbit(values).to(code.dtype) << 3
    return (code | sign).to(torch.uint8)
