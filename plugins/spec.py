"""What a low-bit layer is to the kernels: sizes, layouts, and which kernel computes it.

Letters: B images, C channels of a group, G groups, N output channels of all groups, T steps.

    activation codes  [B, height, width, G, C32]     signed bytes, or nibbles `k - lo`
    weights           [N, kernel_h, kernel_w, C32]   signed bytes, or nibbles
    terms             float32[4, N]                  scale d, bias, zero point z, sum of `q - z`
    tables            float32[4, T]                  scale, its reciprocal, smallest and largest code

C32 is C rounded up to whole blocks of 32. A linear layer is a 1 x 1 convolution over an image of one
column whose rows are its tokens, channels last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from trtq.errors import UsageError

__all__ = [
    "ARCHITECTURES",
    "CHANNEL_BLOCK",
    "ONE_LAUNCH_TILES",
    "TILES",
    "Geometry",
    "LayerSpec",
    "Problem",
    "Tile",
    "Variant",
    "all_variants",
    "fits",
    "has_native_4",
]

CHANNEL_BLOCK = 32
"""Channels are padded to multiples of this: 16 bytes of nibbles."""
ARCHITECTURES = ("sm75", "sm80", "sm86", "sm89", "sm90", "sm120")
_TILE_BYTES = 64


def _whole_blocks(channels: int) -> int:
    return -(-channels // CHANNEL_BLOCK) * CHANNEL_BLOCK


def has_native_4(architecture: str) -> bool:
    """Whether the tensor cores of an architecture multiply 4-bit integers; later ones imitate it."""
    return architecture in ("sm75", "sm80", "sm86", "sm87", "sm89")


@dataclass(frozen=True)
class Geometry:
    """Of a convolution; as it stands, of a linear layer.

    Attributes:
        kernel: height and width.
        stride: down and across.
        padding: zeros above (and below), left (and right).
        dilation: distance of the kernel's rows and columns.
        groups: of channels, each with its own kernels.
    """

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class Problem:
    """One call of a low-bit layer.

    Attributes:
        batch: images.
        height: of the input; tokens of a linear layer.
        width: of the input; 1 for a linear layer.
        channels: of the input, of all groups.
        out_channels: of all groups.
        steps: rows of the tables.
        geometry: of the convolution.
        channels_last: values are `[B, height, width, channels]` rather than `[B, channels, ...]`.

    Raises:
        UsageError: sizes that cannot be; the message names them.
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
        """Output pixels of all images."""
        height, width = self.out_size
        return self.batch * height * width

    @property
    def group_channels(self) -> int:
        """Input channels of one group."""
        return self.channels // self.geometry.groups

    @property
    def padded_channels(self) -> int:
        """The same in whole blocks."""
        return _whole_blocks(self.group_channels)

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """Of the output, in the input's order of axes."""
        height, width = self.out_size
        if self.channels_last:
            return self.batch, height, width, self.out_channels
        return self.batch, self.out_channels, height, width

    def code_bytes(self, *, native_4: bool) -> int:
        """Size of the activation codes."""
        count = self.batch * self.height * self.width * self.geometry.groups * self.padded_channels
        return count // 2 if native_4 else count

    @property
    def sum_bytes(self) -> int:
        """Size of the sums per pixel and group that 4-bit products need."""
        return 4 * self.batch * self.height * self.width * self.geometry.groups


@dataclass(frozen=True)
class LayerSpec:
    """What a layer's node, plugin or module knows of itself, whatever its input's size.

    Attributes:
        channels: of the input.
        out_channels: of the output.
        steps: rows of its tables.
        weight_bits: 4 or 8, as its weight lies.
        activation_bits: of its input's codes.
        geometry: of the convolution; None for a linear layer.
    """

    channels: int
    out_channels: int
    steps: int
    weight_bits: int
    activation_bits: int
    geometry: Geometry | None = None

    def problem(self, shape: Sequence[int], *, channels_last: bool = False) -> Problem:
        """The call for an input `[B, ..., channels]`, of a convolution `[B, channels, H, W]`.

        Args:
            shape: of the input.
            channels_last: a convolution's input lies as `[B, H, W, channels]`.

        Raises:
            UsageError: it is not the shape of this layer's input.
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
        """Of the packed weight."""
        geometry = self.geometry or Geometry()
        padded = _whole_blocks(self.channels // geometry.groups)
        return (self.out_channels, *geometry.kernel, padded * self.weight_bits // 8)

    def native_4(self, architecture: str) -> bool:
        """Whether both factors are multiplied as nibbles on an architecture."""
        return has_native_4(architecture) and self.weight_bits == 4 and self.activation_bits <= 4


@dataclass(frozen=True)
class Tile:
    """How one block of threads divides its work, see `low_bit/kernel.cu`.

    Attributes:
        m: output pixels.
        n: output channels.
        warps_m: warps along m.
        warps_n: warps along n.
        stages: tiles of operands in shared memory.
    """

    m: int
    n: int
    warps_m: int
    warps_n: int
    stages: int = 3

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps_m * self.warps_n

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        return self.stages * (self.m + self.n) * _TILE_BYTES


TILES = (Tile(64, 64, 2, 2), Tile(128, 128, 2, 4), Tile(128, 256, 2, 4))
"""From many small blocks to few large ones."""
ONE_LAUNCH_TILES = (Tile(64, 64, 2, 2), Tile(128, 128, 2, 4, stages=2))
"""Of the form in one launch, which TensorRT starts and asks no memory for: 48 KiB is all it may have,
and on sm90 and later the system takes 1 KiB of them."""


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel.

    Attributes:
        kernel: its folder, and the name of its entry.
        half: values are half precision, otherwise float32.
        native_4: activation codes in nibbles, for tensor cores that multiply them.
        weight_bits: 4 or 8, as weights lie in memory; None: the kernel reads none.
        fused: quantise on the way to shared memory instead of before.
        tile: of the product; None for other kernels.
    """

    kernel: str
    half: bool
    native_4: bool
    weight_bits: int | None = None
    fused: bool = False
    tile: Tile | None = None

    @property
    def defines(self) -> dict[str, int]:
        """The macros that the source asks for."""
        found = {"VALUE_HALF": int(self.half), "NATIVE_4": int(self.native_4)}
        if self.tile is not None and self.weight_bits is not None:
            found |= {"WEIGHT_BITS": self.weight_bits, "FUSED": int(self.fused)}
            found |= {"TILE_M": self.tile.m, "TILE_N": self.tile.n, "STAGES": self.tile.stages}
            found |= {"WARPS_M": self.tile.warps_m, "WARPS_N": self.tile.warps_n}
        return found

    def __str__(self) -> str:
        """A short name for messages and reports."""
        parts = [self.kernel, "f16" if self.half else "f32"]
        if self.weight_bits is not None:
            parts.append(f"w{self.weight_bits}")
        parts += ["a4"] if self.native_4 else []
        parts += ["fused"] if self.fused else []
        if self.tile:
            stages = "" if self.tile.stages == TILES[0].stages else f"x{self.tile.stages}"
            parts.append(f"{self.tile.m}x{self.tile.n}{stages}")
        return "-".join(parts)


def all_variants(architecture: str) -> list[Variant]:
    """What can be asked for on an architecture."""
    natives = [False, True] if has_native_4(architecture) else [False]
    found = [Variant("quantize", half, native) for half in (True, False) for native in natives]
    for half in (True, False):
        for tile in TILES:
            if not fits(tile, architecture):
                continue
            found += [Variant("low_bit", half, False, bits, False, tile) for bits in (4, 8)]
            if True in natives:
                found.append(Variant("low_bit", half, True, 4, False, tile))
        for tile in ONE_LAUNCH_TILES:
            found += [Variant("low_bit", half, False, bits, True, tile) for bits in (4, 8)]
    return found


def fits(tile: Tile, architecture: str) -> bool:
    """Whether a block's shared memory fits an architecture's."""
    return tile.shared_bytes <= (64 << 10 if architecture == "sm75" else 99 << 10)
