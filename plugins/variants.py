"""Variants of the kernels: tiles, macros of the compilation, and architectures."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ARCHITECTURES",
    "ONE_LAUNCH_TILES",
    "TILES",
    "Tile",
    "Variant",
    "all_variants",
    "fits",
    "has_native_4",
]

ARCHITECTURES = ("sm75", "sm80", "sm86", "sm89", "sm90", "sm120")
_TILE_BYTES = 64


def has_native_4(architecture: str) -> bool:
    """Whether an architecture's tensor cores multiply 4-bit integers; later ones emulate this."""
    return architecture in ("sm75", "sm80", "sm86", "sm87", "sm89")


@dataclass(frozen=True)
class Tile:
    """Work of one thread block and its division among warps, see `low_bit/kernel.cu`.

    Attributes:
        m: number of output pixels.
        n: number of output channels.
        warps_m: number of warps along m.
        warps_n: number of warps along n.
        stages: number of operand tiles in shared memory.
    """

    m: int
    n: int
    warps_m: int
    warps_n: int
    stages: int = 3

    @property
    def threads(self) -> int:
        """Number of threads of a block."""
        return 32 * self.warps_m * self.warps_n

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block, in bytes."""
        return self.stages * (self.m + self.n) * _TILE_BYTES


TILES = (Tile(64, 64, 2, 2), Tile(128, 128, 2, 4), Tile(128, 256, 2, 4))
"""Tiles of the product kernel, from small to large."""
ONE_LAUNCH_TILES = (Tile(64, 64, 2, 2), Tile(128, 128, 2, 4, stages=2))
"""Tiles of the fused kernel. TensorRT starts the kernel with the default limit of 48 KiB of shared
memory; the system reserves 1 KiB of it on sm90 and later."""


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel.

    Attributes:
        kernel: name of the kernel's folder and entry point.
        half: whether values are float16 instead of float32.
        native_4: whether activation codes are nibbles that tensor cores multiply directly.
        weight_bits: storage bits of the weights, 4 or 8; None for a kernel without weights.
        fused: whether the product kernel quantises its input while it loads shared memory.
        tile: tile of the product; None for other kernels.
    """

    kernel: str
    half: bool
    native_4: bool
    weight_bits: int | None = None
    fused: bool = False
    tile: Tile | None = None

    @property
    def defines(self) -> dict[str, int]:
        """The macros of the source."""
        macros = {"VALUE_HALF": int(self.half), "NATIVE_4": int(self.native_4)}
        if self.tile is not None and self.weight_bits is not None:
            macros |= {"WEIGHT_BITS": self.weight_bits, "FUSED": int(self.fused)}
            macros |= {"TILE_M": self.tile.m, "TILE_N": self.tile.n, "STAGES": self.tile.stages}
            macros |= {"WARPS_M": self.tile.warps_m, "WARPS_N": self.tile.warps_n}
        return macros

    def __str__(self) -> str:
        """Short name for messages and file names."""
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
    """All variants for an architecture."""
    natives = [False, True] if has_native_4(architecture) else [False]
    variants = [Variant("quantize", half, native) for half in (True, False) for native in natives]
    for half in (True, False):
        for tile in TILES:
            if not fits(tile, architecture):
                continue
            variants += [Variant("low_bit", half, False, bits, False, tile) for bits in (4, 8)]
            if True in natives:
                variants.append(Variant("low_bit", half, True, 4, False, tile))
        for tile in ONE_LAUNCH_TILES:
            variants += [Variant("low_bit", half, False, bits, True, tile) for bits in (4, 8)]
    return variants


def fits(tile: Tile, architecture: str) -> bool:
    """Whether an architecture has enough shared memory for a block."""
    return tile.shared_bytes <= (64 << 10 if architecture == "sm75" else 99 << 10)
