"""Kernel launches for a call of a fused plugin.

    statistics   of a group norm
    codes        norm, SiLU and quantisation; the quantise kernel if nothing precedes the codes
    product      with residual and SiLU

The product and its codes do not depend on the layout of the input, so that the input may have other axes
last than the output.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trtq.errors import UsageError
from trtq.plugins.fused.attributes import Fusion
from trtq.plugins.launch import (
    Device,
    Launch,
    Pointers,
    layer_launches,
    plan_of,
    smallest_problem,
)
from trtq.plugins.spec import LayerSpec, Problem
from trtq.plugins.variants import TILES, Tile, Variant, fits

__all__ = [
    "FusedCall",
    "FusedPointers",
    "fused_launches",
    "prepare_fused",
    "start_fused",
]

_PIXELS, _ROWS = 32, 4
_ROW_NORMS = {"none": 0, "layer": 1, "gated": 2}


@dataclass(frozen=True)
class FusedPointers:
    """Addresses of a fused plugin's operands on the device.

    Attributes:
        layer: operands of the layer, without `partial` if the product has one split.
        affine: scale, shift, factor and epsilon, float32[4, C]; 0: none.
        image_shift: values of which some are added to each image's channels; 0: none.
        shift_width: number of values of each image in `image_shift`.
        statistics: scratch memory of `FusedCall.statistics_bytes` bytes.
    """

    layer: Pointers
    affine: int = 0
    image_shift: int = 0
    shift_width: int = 0
    statistics: int = 0


@dataclass(frozen=True)
class FusedCall:
    """A fused layer with the sizes of one call.

    Attributes:
        layer: properties of the layer.
        fusion: what is computed in addition to it.
        source: sizes of the call, in the layout of the input.
        problem: sizes of the call, in the layout of the output.
    """

    layer: LayerSpec
    fusion: Fusion
    source: Problem
    problem: Problem

    @classmethod
    def of(cls, layer: LayerSpec, fusion: Fusion, shape: Sequence[int]) -> FusedCall:
        """The call with an input of a given shape.

        Raises:
            UsageError: the layer does not accept inputs of this shape.
        """
        sizes = tuple(shape)
        if fusion.heads:
            if len(sizes) != 4 or sizes[1] != fusion.heads:
                raise UsageError(
                    f"a fused layer takes [B, {fusion.heads}, tokens, "
                    f"{layer.channels // fusion.heads}], got {list(sizes)}"
                )
            sizes = (sizes[0], sizes[2], sizes[1] * sizes[3])
        elif fusion.norm == "gated":
            if sizes[-1] != 2 * layer.channels:
                raise UsageError(
                    f"a fused layer takes [B, ..., {2 * layer.channels}], got {list(sizes)}"
                )
            sizes = (*sizes[:-1], layer.channels)
        if fusion.x_last and len(sizes) == 4:
            sizes = (sizes[0], sizes[3], sizes[1], sizes[2])
        source = layer.problem(sizes, channels_last=fusion.x_last)
        linear = layer.geometry is None
        problem = replace(source, channels_last=linear or fusion.out_last)
        return cls(layer, fusion, source, problem)

    @property
    def statistics_bytes(self) -> int:
        """Size of the statistics of a group norm, in bytes."""
        return 8 * self.source.batch * self.fusion.norm_groups


def start_fused(
    device: Device, call: FusedCall, at: FusedPointers, stream: int, *, half: bool
) -> None:
    """Start all kernels of a fused layer on a stream.

    Args:
        device: the GPU.
        call: the layer and its sizes.
        at: addresses of the operands.
        stream: handle of a CUDA stream.
        half: whether values are float16 instead of float32.

    Raises:
        UsageError: an operand is not aligned.
        KernelError: a kernel cannot be compiled, loaded or started.
    """
    plan = plan_of(device, call.layer, call.problem, at.layer)
    native_4 = call.layer.native_4(device.architecture)
    for launch in fused_launches(
        call, at, plan.tile, half=half, native_4=native_4, splits=plan.splits
    ):
        device.start(launch, stream)


def prepare_fused(device: Device, layer: LayerSpec, fusion: Fusion) -> None:
    """Compile and load all kernels that `start_fused` may start for any input.

    Raises:
        KernelError: a kernel cannot be compiled or loaded.
    """
    source = smallest_problem(layer, channels_last=fusion.x_last)
    problem = replace(source, channels_last=layer.geometry is None or fusion.out_last)
    call = FusedCall(layer, fusion, source, problem)
    somewhere = FusedPointers(
        Pointers(0, 0, 0, 0, 0, 0, 0, residual=16 * fusion.residual),
        affine=16 * fusion.affine,
    )
    native_4 = layer.native_4(device.architecture)
    for half in (True, False):
        for tile in TILES:
            if fits(tile, device.architecture):
                for launch in fused_launches(call, somewhere, tile, half=half, native_4=native_4):
                    device.prepare(launch)


def fused_launches(
    call: FusedCall,
    at: FusedPointers,
    tile: Tile,
    *,
    half: bool,
    native_4: bool,
    splits: int = 1,
) -> list[Launch]:
    """The launches of a fused layer, in order.

    Args:
        call: the layer and its sizes.
        at: addresses of the operands.
        tile: tile of the product.
        half: whether values are float16 instead of float32.
        native_4: whether tensor cores multiply activation codes as nibbles.
        splits: number of blocks that divide the tiles along k of the same outputs.

    Raises:
        UsageError: an operand is not aligned, or no kernel computes the combination.
    """

    def plain(problem: Problem) -> list[Launch]:
        return layer_launches(
            problem,
            at.layer,
            tile,
            half=half,
            weight_bits=call.layer.weight_bits,
            native_4=native_4,
            silu=call.fusion.silu,
            splits=splits,
        )

    product = plain(call.problem)[-1]
    if not call.fusion.affine:
        return [plain(call.source)[0], product]
    counters = call.problem.blocks(tile) if splits > 1 else 0
    return [*_norm_launches(call, at, half, native_4, counters), product]


def _norm_launches(
    call: FusedCall, at: FusedPointers, half: bool, native_4: bool, counters: int
) -> Iterator[Launch]:
    """The launches in front of the product: statistics, if there is a group norm, and codes."""
    fusion, problem, layer = call.fusion, call.source, at.layer
    bits = None if native_4 or call.layer.weight_bits == 8 else 4
    pixels, channels = problem.height * problem.width, problem.channels
    scratch = map(ctypes.c_void_p, (layer.codes, layer.sums, layer.partial))
    outputs: list[Any] = [*scratch, ctypes.c_int(counters)]
    rows = call.layer.geometry is None or fusion.x_last
    shift: tuple[Any, ...] = ()
    if rows:
        norm = _ROW_NORMS[fusion.norm]
        operands: tuple[int, ...] = (at.affine, layer.tables, layer.step)
        numbers: tuple[int, ...] = (pixels, channels, norm, fusion.heads)
    else:
        grouped = fusion.norm == "group"
        if grouped:
            yield _statistics(call, at, half)
        statistics = at.statistics if grouped else 0
        shift = _shift(at, fusion, half)
        operands = (statistics, at.affine, layer.tables, layer.step)
        numbers = (pixels, channels, fusion.norm_groups)
    variant = Variant("norm_codes", half, native_4, bits, form="rows" if rows else "pixels")
    arguments = (
        ctypes.c_void_p(layer.x),
        *shift,
        *map(ctypes.c_void_p, operands),
        *map(ctypes.c_int, (*numbers, fusion.activated, problem.steps)),
        *outputs,
    )
    blocks = -(-pixels // (_ROWS if rows else _PIXELS))
    yield Launch(variant, (blocks, 1, problem.batch), variant.threads, 0, arguments)


def _shift(at: FusedPointers, fusion: Fusion, half: bool) -> tuple[Any, ...]:
    """The arguments of the values that are added to each image's channels."""
    first = fusion.shift_first * (2 if half else 4)
    pointer = at.image_shift + first if at.image_shift else 0
    return ctypes.c_void_p(pointer), ctypes.c_int(at.shift_width)


def _statistics(call: FusedCall, at: FusedPointers, half: bool) -> Launch:
    problem = call.source
    variant = Variant("norm_codes", half, False, form="statistics")
    arguments = (
        ctypes.c_void_p(at.layer.x),
        *_shift(at, call.fusion, half),
        ctypes.c_void_p(at.affine),
        *map(ctypes.c_int, (problem.height * problem.width, problem.channels)),
        ctypes.c_void_p(at.statistics),
    )
    grid = call.fusion.norm_groups, 1, problem.batch
    return Launch(variant, grid, variant.threads, 0, arguments)
