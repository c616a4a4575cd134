"""Sizes and memory layouts of a low-bit layer for the kernels.

Letters: B images; C channels of a group; G groups; N output channels of all groups; T steps.

    activation codes  [B, height, width, G, C32]     signed bytes, or nibbles `k - lo`; scratch memory
    weights           [N, kernel_h, kernel_w, C32]   signed bytes, or nibbles
    terms             float32[4, N]                  scale d, bias, zero point z, sum of `q - z`
    tables            float32[4, T]                  scale, its reciprocal, smallest and largest code

C32 is C rounded up to a multiple of 32; `trtq.quant.packing` compares the layout of 4-bit weights with
those of files and graphs. Where bytes of codes meet 4-bit weights, the codes of 32 channels have another
order: byte 16 h + 4 t + i is channel 8 t + 4 h + i (t, i: 0 to 3; h: 0, 1). A thread of the product that
reads a word of weights, eight neighbouring channels, then has the codes of these channels.

A linear layer is a 1 x 1 convolution over an image of one column, whose rows are the tokens, with
channels last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from trtq.errors import UsageError
from trtq.plugins.variants import TILE_BYTES, TILES, Tile, has_native_4

__all__ = ["CHANNEL_BLOCK", "COUNTER_BYTES", "MAX_SPLIT_BYTES", "Geometry", "LayerSpec", "Problem"]

CHANNEL_BLOCK = 32
"""Channels are padded to a multiple of this number: 16 bytes of nibbles."""
MAX_SPLIT_BYTES = 16 << 20
"""Maximum size of the memory for sums of several splits, in bytes."""
COUNTER_BYTES = 16
"""Bytes per counter of splits; sums after the counters are aligned."""
CODE_OF_ZERO_BYTES = 16
"""Bytes of each image's code of zero after nibbles of codes, for pixels beyond the image."""


def _whole_blocks(channels: int) -> int:
    return -(-channels // CHANNEL_BLOCK) * CHANNEL_BLOCK


@dataclass(frozen=True)
class Geometry:
    """Geometry of a convolution; the defaults are those of a linear layer. Pairs are (height, width).

    Attributes:
        kernel: size of the kernel.
        stride: distance between neighbouring windows, in pixels.
        padding: number of rows and columns of zeros on each side.
        dilation: distance between neighbouring kernel rows and columns, in pixels.
        groups: number of channel groups.
    """

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def pointwise(self) -> bool:
        """Whether each output pixel depends on the input pixel in the same place only."""
        return (self.kernel, self.stride, self.padding) == ((1, 1), (1, 1), (0, 0))


@dataclass(frozen=True)
class Problem:
    """Sizes of one call of a low-bit layer.

    Attributes:
        batch: number of images.
        height: height of the input; number of tokens for a linear layer.
        width: width of the input; 1 for a linear layer.
        channels: number of input channels of all groups.
        out_channels: number of output channels of all groups.
        steps: number of steps in the tables.
        geometry: geometry of the convolution.
        channels_last: whether values are `[B, height, width, channels]`, not `[B, channels, ...]`.

    Raises:
        UsageError: the sizes are invalid; the message names them.
    """

    batch: int
    height: int
    width: int
    channels: int
    out_channels: int
    steps: int
    geometry: Geometry = field(default_factory=Geometry)
    channels_last: bool = False

    def __post_init__(self) -> None:
        groups = self.geometry.groups
        if self.channels % groups or self.out_channels % groups:
            raise UsageError(
                f"{self.channels} input and {self.out_channels} output channels do not divide into "
                f"{groups} groups"
            )
        sizes = (self.batch, self.height, self.width, self.channels, self.out_channels, self.steps)
        if min(sizes) < 1 or min(self.out_size) < 1:
            raise UsageError(
                f"an input of {self.batch}x{self.channels}x{self.height}x{self.width} with a kernel of "
                f"{self.geometry.kernel[0]}x{self.geometry.kernel[1]} has no output"
            )

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        g = self.geometry
        height, width = (
            (size + 2 * g.padding[axis] - g.dilation[axis] * (g.kernel[axis] - 1) - 1)
            // g.stride[axis]
            + 1
            for axis, size in enumerate((self.height, self.width))
        )
        return height, width

    @property
    def rows(self) -> int:
        """Number of output pixels of all images."""
        height, width = self.out_size
        return self.batch * height * width

    @property
    def group_channels(self) -> int:
        """Number C of input channels of one group."""
        return self.channels // self.geometry.groups

    @property
    def padded_channels(self) -> int:
        """Number C32 of input channels of one group, including padding."""
        return _whole_blocks(self.group_channels)

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """Shape of the output, in the input's order of axes."""
        height, width = self.out_size
        if self.channels_last:
            return self.batch, height, width, self.out_channels
        return self.batch, self.out_channels, height, width

    def code_bytes(self, *, native_4: bool) -> int:
        """Size of the activation codes, in bytes; nibbles never need more than bytes."""
        count = self.batch * self.height * self.width * self.geometry.groups * self.padded_channels
        return count // 2 + CODE_OF_ZERO_BYTES * self.batch if native_4 else count

    def k_tiles(self, *, native_4: bool) -> int:
        """Number of operand tiles along k."""
        kernel = self.geometry.kernel
        k_bytes = kernel[0] * kernel[1] * self.padded_channels // (2 if native_4 else 1)
        return -(-k_bytes // TILE_BYTES)

    def grid(self, tile: Tile) -> tuple[int, int, int]:
        """Number of tiles along the output channels of a group, along rows, and of groups."""
        columns = -(-(self.out_channels // self.geometry.groups) // tile.n)
        return columns, -(-self.rows // tile.m), self.geometry.groups

    def blocks(self, tile: Tile) -> int:
        """Number of tiles of outputs."""
        return math.prod(self.grid(tile))

    def plan_bytes(self, tile: Tile, splits: int) -> int:
        """Size of the counters and sums of several splits, in bytes."""
        return self.blocks(tile) * (COUNTER_BYTES + 4 * splits * tile.m * tile.n)

    @property
    def split_bytes(self) -> int:
        """Size of the memory with which splits can be useful, in bytes; 0 for large layers."""
        blocks = self.blocks(TILES[0])
        return min(MAX_SPLIT_BYTES, self.plan_bytes(TILES[0], 8)) if blocks <= 512 else 0

    @property
    def sum_bytes(self) -> int:
        """Size of the sums of codes per pixel and group for 4-bit weights, in bytes."""
        return 4 * self.batch * self.height * self.width * self.geometry.groups


@dataclass(frozen=True)
class LayerSpec:
    """Properties of a layer that do not depend on the size of its input.

    Attributes:
        channels: number of input channels.
        out_channels: number of output channels.
        steps: number of steps in the tables.
        weight_bits: storage bits of the weight, 4 or 8.
        activation_bits: width of the input's codes.
        geometry: geometry of a convolution; None: a linear layer.
    """

    channels: int
    out_channels: int
    steps: int
    weight_bits: int
    activation_bits: int
    geometry: Geometry | None = None

    def problem(self, shape: Sequence[int], *, channels_last: bool = False) -> Problem:
        """Sizes of a call with a given input.

        Args:
            shape: shape of the input: `[B, ..., channels]`, for a convolution `[B, channels, H, W]`.
            channels_last: whether a convolution's input is stored as `[B, H, W, channels]`.

        Raises:
            UsageError: the layer does not accept inputs of this shape.
        """
        linear = self.geometry is None
        axis = -1 if linear else 1
        if len(shape) < 2 or (not linear and len(shape) != 4) or shape[axis] != self.channels:
            form = "[B, ..., {0}]" if linear else "[B, {0}, height, width]"
            raise UsageError(
                f"a low-bit layer takes {form.format(self.channels)}, got {list(shape)}"
            )
        height, width = (math.prod(shape[1:-1]), 1) if linear else (shape[2], shape[3])
        sizes = (shape[0], height, width, self.channels, self.out_channels, self.steps)
        return Problem(*sizes, self.geometry or Geometry(), linear or channels_last)

    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the packed weight."""
        geometry = self.geometry or Geometry()
        padded = _whole_blocks(self.channels // geometry.groups)
        return (self.out_channels, *geometry.kernel, padded * self.weight_bits // 8)

    def native_4(self, architecture: str) -> bool:
        """Whether an architecture's tensor cores multiply both factors as nibbles."""
        return has_native_4(architecture) and self.weight_bits == 4 and self.activation_bits <= 4

    def packed(self, architecture: str) -> bool:
        """Whether bytes of activation codes meet packed 4-bit weights on an architecture."""
        return self.weight_bits == 4 and not self.native_4(architecture)
