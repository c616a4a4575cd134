"""Integer weights, and their layout in a file.

A file packs codes along the output channels n as a bit stream, low bits first. With 4 bits two output
channels share a byte: codes 1 (channel 0) and 15 (channel 1) make `0xF1`. With 3 bits eight channels
share three bytes. Zeros fill the last, partial byte.

The same 4-bit codes `q[n, k]` have three layouts. Each cell below is one byte, written `high low`:

    file     uint8[ceil(N / 2), K, kh, kw]: a byte holds two output channels
             (this module; `quantized.safetensors`)

        n=0,1    q[1,0] q[0,0]    q[1,1] q[0,1]    q[1,2] q[0,2]    ...
        n=2,3    q[3,0] q[2,0]    q[3,1] q[2,1]    q[3,2] q[2,2]    ...

    ONNX     INT4 values q - 8 in row-major order: a byte holds two neighbours along the last axis
             (`trtq.graph.passes.low_bit_to_qdq`)

        convolution, int4[N, K, kh, kw]; k counts all axes but the first
        n=0      q[0,1] q[0,0]    q[0,3] q[0,2]    q[0,5] q[0,4]    ...
        linear layer, int4[K, N]
        k=0      q[1,0] q[0,0]    q[3,0] q[2,0]    q[5,0] q[4,0]    ...

    kernel   uint8[N, kh, kw, ceil(K / 32) * 16]: four bytes hold eight neighbours k of one kernel tap,
             k = j in the low half of byte j and k = j + 4 in the high half (`trtq.plugins.low_bit.pack`)

        n=0      q[0,4] q[0,0]    q[0,5] q[0,1]    q[0,6] q[0,2]    q[0,7] q[0,3]    ...

The kernel's order lets one mask each extract the four low and the four high codes of a 32-bit word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from trtq.bits import check_bits
from trtq.errors import ArtefactError, QuantizationError

__all__ = ["PackedWeight", "checked_stream", "pack_codes", "unpack_codes"]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes[N, ...] in `0 .. 2**bits - 1` -> uint8[ceil(N * bits / 8), ...].

    Args:
        codes: codes, uint8[N, ...].
        bits: width of the codes.

    Raises:
        QuantizationError: a code does not fit the width.
    """
    check_bits(bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise QuantizationError(
            f"codes must lie in 0 .. {2**bits - 1} to be packed into {bits} bits, got "
            f"{int(codes.min())} .. {int(codes.max())}"
        )
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes
    rest = codes.shape[1:]
    if bits == 4:
        # The same bytes as below, with less memory.
        packed = codes[::2].clone()
        packed[: len(codes) // 2] |= codes[1::2] << 4
        return packed
    shifts = torch.arange(bits, dtype=torch.uint8).reshape(1, -1, *(1,) * len(rest))
    stream = ((codes.unsqueeze(1) >> shifts) & 1).reshape(len(codes) * bits, *rest)
    padding = -len(stream) % 8
    stream = torch.cat([stream, stream.new_zeros(padding, *rest)])
    octets = stream.reshape(-1, 8, *rest)
    places = torch.arange(8, dtype=torch.uint8).reshape(1, -1, *(1,) * len(rest))
    return (octets << places).sum(1, dtype=torch.uint8)


def checked_stream(packed: Tensor, bits: int, channels: int) -> Tensor:
    """A bit stream along the output channels, if it has the size of its codes.

    Args:
        packed: bit stream, uint8.
        bits: width of the codes.
        channels: number of output channels.

    Raises:
        ArtefactError: the number of bytes does not match the number of channels.
    """
    check_bits(bits)
    if packed.dtype != torch.uint8 or len(packed) != -(-channels * bits // 8):
        raise ArtefactError(
            f"{channels} channels of {bits} bits need {-(-channels * bits // 8)} bytes of uint8, "
            f"got {len(packed)} of {packed.dtype}"
        )
    return packed


def unpack_codes(packed: Tensor, bits: int, channels: int) -> Tensor:
    """uint8[ceil(channels * bits / 8), ...] -> uint8 codes[channels, ...]; inverse of `pack_codes`.

    Args:
        packed: bit stream along the output channels, uint8.
        bits: width of the codes.
        channels: number of output channels.

    Raises:
        ArtefactError: the number of bytes does not match the number of channels.
    """
    checked_stream(packed, bits, channels)
    if bits == 8:
        return packed
    rest = packed.shape[1:]
    if 8 % bits == 0:
        # Each byte holds complete codes, so the bit stream can be avoided.
        places = torch.arange(0, 8, bits, dtype=torch.uint8).reshape(1, -1, *(1,) * len(rest))
        codes = (packed.unsqueeze(1) >> places).bitwise_and_(2**bits - 1)
        return codes.reshape(-1, *rest)[:channels].contiguous()
    places = torch.arange(8, dtype=torch.uint8).reshape(1, -1, *(1,) * len(rest))
    stream = ((packed.unsqueeze(1) >> places) & 1).reshape(len(packed) * 8, *rest)
    octets = stream[: channels * bits].reshape(channels, bits, *rest)
    shifts = torch.arange(bits, dtype=torch.uint8).reshape(1, -1, *(1,) * len(rest))
    return (octets << shifts).sum(1, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight as integers: `w[o] ~ (codes[o] - zero_point[o]) * scale[o]`.

    Only the bit stream is in memory: the codes of a large model would take twice the memory of its
    4-bit weights.

    Attributes:
        packed: the codes as a bit stream along the output channels, uint8 `[ceil(N * bits / 8), ...]`.
        scale: scales, float32 `[N, 1, ...]`.
        zero_point: zero points, float32 `[N, 1, ...]`, integers.
        bits: width of the codes.
        channels: number N of output channels.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    channels: int

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, **more: Any) -> Self:
        """The weight with these codes, uint8 `[N, ...]` in `0 .. 2**bits - 1`; see the attributes."""
        return cls(pack_codes(codes, bits), scale, zero_point, bits, len(codes), **more)

    @property
    def codes(self) -> Tensor:
        """The codes, uint8 `[N, ...]`, in `0 .. 2**bits - 1`; unpacked anew each time."""
        return unpack_codes(self.packed, self.bits, self.channels)

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight, `[N, ...]`."""
        return torch.Size([self.channels, *self.packed.shape[1:]])

    def integers(self) -> Tensor:
        """`codes - zero_point` as int8[N, ...], the operand of an integer kernel.

        Raises:
            QuantizationError: a value does not fit int8.
        """
        low, high = 2**self.bits - 128, 127
        if bool(((self.zero_point >= low) & (self.zero_point <= high)).all()):
            # All differences fit int8. Layers whose codes stay packed compute this in every call.
            return self.codes.view(torch.int8) - self.zero_point.to(torch.int8)
        # int16 in between, because int8 would wrap 8-bit codes above 127.
        values = self.codes.to(torch.int16) - self.zero_point.to(torch.int16)
        if values.numel() and (int(values.min()) < -128 or int(values.max()) > 127):
            raise QuantizationError(
                f"{self.bits}-bit weights minus their zero points span {int(values.min())} .. "
                f"{int(values.max())}, which int8 cannot hold; quantise 8-bit weights symmetrically"
            )
        return values.to(torch.int8)

    def dequantize(self) -> Tensor:
        """The float32[N, ...] values that the integers represent."""
        return (self.codes.float() - self.zero_point) * self.scale
