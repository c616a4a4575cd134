"""Variants of the kernels: tiles, macros of the compilation, and architectures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

__all__ = [
    "ARCHITECTURES",
    "NORM_FORMS",
    "ONE_LAUNCH_TILES",
    "TILES",
    "TILE_BYTES",
    "Tile",
    "Variant",
    "all_variants",
    "fits",
    "fused_variants",
    "has_native_4",
]

ARCHITECTURES = ("sm75", "sm80", "sm86", "sm89", "sm90", "sm120")
TILE_BYTES = 64
"""Bytes of codes in a row of an operand tile."""
_QUANTIZE_THREADS = 128
_STATISTICS_THREADS = 512
NORM_FORMS = ("statistics", "pixels", "rows")
"""Forms of the kernel that quantises together with the operators in front of it."""


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
        blocks: number of blocks for which a processor must have enough registers.
    """

    m: int
    n: int
    warps_m: int
    warps_n: int
    stages: int = 3
    blocks: int = 1

    @property
    def threads(self) -> int:
        """Number of threads of a block."""
        return 32 * self.warps_m * self.warps_n

    def shared_bytes(self, *, packed: bool = False) -> int:
        """Shared memory of a block, in bytes.

        Args:
            packed: whether bytes of codes meet packed nibbles of weights.
        """
        weights = self.n // 2 if packed else self.n
        return self.stages * (self.m + weights) * TILE_BYTES


TILES = (Tile(64, 64, 2, 2, blocks=4), Tile(128, 128, 2, 4, blocks=2))
"""Tiles of the product kernel, from small to large. A larger one would leave a processor one block, and
tensor cores would wait while it starts and ends."""
ONE_LAUNCH_TILES = (Tile(64, 64, 2, 2, blocks=4), Tile(128, 128, 2, 4, stages=2, blocks=2))
"""Tiles of the fused kernel. TensorRT starts the kernel with the default limit of 48 KiB of shared
memory; the system reserves 1 KiB of it on sm90 and later."""


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel.

    Attributes:
        kernel: name of the kernel's folder and entry point.
        half: whether values are float16 instead of float32.
        native_4: whether activation codes are nibbles that tensor cores multiply directly.
        weight_bits: storage bits of the weights, 4 or 8. For the quantise kernel 4 asks for the order of
            codes that 4-bit weights have, and for sums; None: neither.
        fused: whether the product kernel quantises its input while it loads shared memory.
        tile: tile of the product; None for other kernels.
        pointwise: whether the layer is linear, or a 1 x 1 convolution with stride 1 and without padding.
        channels_last: whether values of the product's output have channels last.
        residual: whether the product adds a residual.
        silu: whether the product applies SiLU.
        form: one of `NORM_FORMS` for the kernel `norm_codes`; empty for other kernels.
    """

    kernel: str
    half: bool
    native_4: bool
    weight_bits: int | None = None
    fused: bool = False
    tile: Tile | None = None
    pointwise: bool = False
    channels_last: bool = False
    residual: bool = False
    silu: bool = False
    form: str = ""

    @property
    def packed(self) -> bool:
        """Whether bytes of codes meet packed nibbles of weights."""
        return self.weight_bits == 4 and not self.native_4

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block, in bytes."""
        return 0 if self.tile is None else self.tile.shared_bytes(packed=self.packed)

    @property
    def threads(self) -> int:
        """Number of threads of a block."""
        if self.tile is not None:
            return self.tile.threads
        return _STATISTICS_THREADS if self.form == "statistics" else _QUANTIZE_THREADS

    @property
    def defines(self) -> dict[str, int]:
        """The macros of the source."""
        bits = 4 if self.native_4 else self.weight_bits or 8
        macros = {"VALUE_HALF": self.half, "NATIVE_4": self.native_4, "WEIGHT_BITS": bits}
        if self.form:
            macros |= {"FORM": NORM_FORMS.index(self.form)}
        if self.tile is not None:
            macros |= {"FUSED": self.fused, "POINTWISE": self.pointwise}
            macros |= {"CHANNELS_LAST": self.channels_last}
            macros |= {"RESIDUAL": self.residual, "SILU": self.silu}
            macros |= {"TILE_M": self.tile.m, "TILE_N": self.tile.n, "STAGES": self.tile.stages}
            macros |= {"WARPS_M": self.tile.warps_m, "WARPS_N": self.tile.warps_n}
            macros |= {"BLOCKS": self.tile.blocks}
        return {name: int(value) for name, value in macros.items()}

    def __str__(self) -> str:
        """Short name for messages and file names."""
        parts = [self.kernel, *([self.form] if self.form else []), "f16" if self.half else "f32"]
        if self.weight_bits is not None:
            parts.append(f"w{self.weight_bits}")
        parts += ["a4"] if self.native_4 else []
        parts += ["fused"] if self.fused else []
        parts += ["residual"] if self.residual else []
        parts += ["silu"] if self.silu else []
        if self.tile:
            parts += ["1x1"] if self.pointwise else []
            parts.append("nhwc" if self.channels_last else "nchw")
            stages = "" if self.tile.stages == TILES[0].stages else f"x{self.tile.stages}"
            parts.append(f"{self.tile.m}x{self.tile.n}{stages}")
        return "-".join(parts)


def _bits(architecture: str) -> list[tuple[bool, int]]:
    """Whether products are native 4-bit ones, and storage bits of the weights."""
    return [(False, 4), (False, 8)] + ([(True, 4)] if has_native_4(architecture) else [])


def fused_variants(architecture: str) -> list[Variant]:
    """The variants that fused plugins add to `all_variants`, except those with SiLU.

    Only the embedding of the time has SiLU behind a layer; its engine waits for NVRTC once.
    """
    halves = (True, False)
    variants = [Variant("norm_codes", half, False, form="statistics") for half in halves]
    variants += [
        Variant("norm_codes", half, native, None if width == 8 or native else 4, form=form)
        for half, form in product(halves, ("pixels", "rows"))
        for native, width in _bits(architecture)
    ]
    layers = [v for v in all_variants(architecture) if v.tile is not None and not v.fused]
    return variants + [replace(variant, residual=True) for variant in layers]


def all_variants(architecture: str) -> list[Variant]:
    """All variants of layers alone for an architecture, without residual or SiLU.

    A caller of the operator who asks for these waits for NVRTC once; see `fused_variants` for engines.
    """
    halves = (True, False)
    bits = _bits(architecture)
    variants = [
        Variant("quantize", half, native, None if width == 8 or native else 4)
        for half in halves
        for native, width in bits
    ]
    tiles = [tile for tile in TILES if fits(tile, architecture)]
    variants += [
        Variant("low_bit", half, native, width, False, tile, pointwise, last)
        for half, tile, (native, width) in product(halves, tiles, bits)
        for pointwise, last in product((True, False), repeat=2)
    ]
    variants += [
        Variant("low_bit", half, False, width, True, tile, False, last)
        for half, tile, width in product(halves, ONE_LAUNCH_TILES, (4, 8))
        for last in (True, False)
    ]
    return variants


def fits(tile: Tile, architecture: str) -> bool:
    """Whether an architecture has enough shared memory for a block."""
    return tile.shared_bytes() <= (64 << 10 if architecture == "sm75" else 99 << 10)
