"""Kernel launches for a call of a low-bit layer: variant, grid and arguments.

Pointers are plain addresses of device memory; the module depends on neither torch nor TensorRT.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

from trtq.errors import UsageError
from trtq.plugins.arguments import path_arguments, shape_arguments
from trtq.plugins.spec import COUNTER_BYTES, LayerSpec, Problem
from trtq.plugins.tile_choice import Plan, choose_plan
from trtq.plugins.variants import TILES, Tile, Variant, fits

__all__ = [
    "Device",
    "Launch",
    "Pointers",
    "layer_launches",
    "plan_of",
    "prepare_any_shape",
    "prepare_layer",
    "smallest_problem",
    "start_layer",
]

_CHANNELS_LAST = 1
_QUANTIZE_PIXELS = 32
_ALIGNMENT = 16
_MAX_BLOCKS = 65_535
"""CUDA's maximum number of blocks along y and z of a grid."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        variant: variant of the kernel.
        grid: number of blocks along x, y and z.
        threads: number of threads per block.
        shared_bytes: dynamic shared memory per block, in bytes.
        arguments: arguments as ctypes values, in the order of the kernel's parameters.
    """

    variant: Variant
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[Any, ...]


class Device(Protocol):
    """A GPU, or its stand-in in a test.

    Attributes:
        architecture: architecture, e.g. `sm89`.
        processors: number of streaming multiprocessors.
    """

    architecture: str
    processors: int

    def prepare(self, launch: Launch) -> None:
        """Compile and load a kernel."""

    def start(self, launch: Launch, stream: int) -> None:
        """Start a kernel on a stream, asynchronously.

        Args:
            launch: kernel, grid and arguments.
            stream: handle of a CUDA stream.
        """


@dataclass(frozen=True)
class Pointers:
    """Addresses of a layer's operands on the device; `trtq.plugins.spec` documents the layouts.

    Attributes:
        x: input values, float16 or float32.
        weight: packed weight.
        terms: terms per output channel, float32[4, N].
        tables: scales and limits per step, float32[4, T].
        step: index of each image's step, int64[B].
        out: output values, in the dtype of x.
        codes: scratch memory of `Problem.code_bytes` bytes.
        sums: scratch memory of `Problem.sum_bytes` bytes, for 4-bit weights.
        residual: values to add, in the layout of the output; 0: no residual.
        partial: scratch memory of `Problem.split_bytes` bytes (counters, then sums); 0: no splits.
    """

    x: int
    weight: int
    terms: int
    tables: int
    step: int
    out: int
    codes: int
    sums: int = 0
    residual: int = 0
    partial: int = 0


def start_layer(
    device: Device,
    layer: LayerSpec,
    problem: Problem,
    at: Pointers,
    stream: int,
    *,
    half: bool,
    silu: bool = False,
) -> None:
    """Start all kernels of a layer on a stream, in the fastest form for the device.

    Args:
        device: the GPU.
        layer: properties of the layer.
        problem: sizes of the call, see `LayerSpec.problem`.
        at: addresses of the operands.
        stream: handle of a CUDA stream.
        half: whether values are float16 instead of float32.
        silu: whether to apply SiLU to the result.

    Raises:
        UsageError: an operand is not aligned.
        KernelError: a kernel cannot be compiled, loaded or started.
    """
    for launch in _chosen(device, layer, problem, at, half=half, silu=silu):
        device.start(launch, stream)


def prepare_layer(device: Device, layer: LayerSpec, problem: Problem, *, half: bool) -> None:
    """Compile and load the kernels that `start_layer` starts for the same arguments.

    Raises:
        KernelError: a kernel cannot be compiled or loaded.
    """
    nowhere = Pointers(0, 0, 0, 0, 0, 0, 0)
    for launch in _chosen(device, layer, problem, nowhere, half=half, silu=False):
        device.prepare(launch)


def prepare_any_shape(device: Device, layer: LayerSpec) -> None:
    """Compile and load all kernels that `start_layer` may start for any input.

    Raises:
        KernelError: a kernel cannot be compiled or loaded.
    """
    nowhere = Pointers(0, 0, 0, 0, 0, 0, 0)
    problem = smallest_problem(layer)
    for half in (True, False):
        for tile in TILES:
            if not fits(tile, device.architecture):
                continue
            for launch in layer_launches(
                problem,
                nowhere,
                tile,
                half=half,
                weight_bits=layer.weight_bits,
                native_4=layer.native_4(device.architecture),
            ):
                device.prepare(launch)


def smallest_problem(layer: LayerSpec, *, channels_last: bool = False) -> Problem:
    """Sizes of a call with one output pixel, or with one token.

    Args:
        layer: properties of the layer.
        channels_last: see `LayerSpec.problem`.
    """
    g = layer.geometry
    sides = [] if g is None else [g.dilation[axis] * (g.kernel[axis] - 1) + 1 for axis in (0, 1)]
    return layer.problem((1, layer.channels, *sides), channels_last=channels_last)


def plan_of(device: Device, layer: LayerSpec, problem: Problem, at: Pointers) -> Plan:
    """The fastest plan of a layer's product on a device; see `start_layer` for the arguments."""
    return choose_plan(
        problem,
        device.processors,
        device.architecture,
        packed=layer.packed(device.architecture),
        native_4=layer.native_4(device.architecture),
        scratch_bytes=problem.split_bytes if at.partial else 0,
    )


def _chosen(
    device: Device, layer: LayerSpec, problem: Problem, at: Pointers, *, half: bool, silu: bool
) -> list[Launch]:
    plan = plan_of(device, layer, problem, at)
    return layer_launches(
        problem,
        at,
        plan.tile,
        splits=plan.splits,
        half=half,
        weight_bits=layer.weight_bits,
        native_4=layer.native_4(device.architecture),
        silu=silu,
    )


def layer_launches(
    problem: Problem,
    at: Pointers,
    tile: Tile,
    *,
    half: bool,
    weight_bits: int,
    native_4: bool,
    silu: bool = False,
    fused: bool = False,
    splits: int = 1,
) -> list[Launch]:
    """The launches of one layer: a quantise and a product kernel, or the fused kernel.

    Args:
        problem: sizes of the call.
        at: addresses of the operands; the fused kernel uses neither codes nor sums.
        tile: tile of the product, see `choose_plan`.
        half: whether values are float16 instead of float32.
        weight_bits: storage bits of the weights, 4 or 8.
        native_4: whether tensor cores multiply activation codes as nibbles, without unpacking.
        silu: whether to apply SiLU to the result.
        fused: whether to use the fused kernel, which supports no residual.
        splits: number of blocks that divide the tiles along k of the same outputs.

    Raises:
        UsageError: an operand is not aligned, or no kernel computes the combination.
    """
    if weight_bits not in (4, 8) or (native_4 and (weight_bits == 8 or fused)):
        raise UsageError(
            f"no kernel has weight_bits={weight_bits}, native_4={native_4} and fused={fused}; weights "
            "have 4 or 8 storage bits, and native 4-bit products need 4-bit weights and two launches"
        )
    if fused and at.residual:
        raise UsageError("the fused kernel adds no residual; use two launches")
    if splits > 1 and (fused or not at.partial):
        raise UsageError("several splits need two launches, and memory for sums")
    _check_alignment(at, fused=fused)
    packed = None if native_4 or weight_bits == 8 else weight_bits
    quantize = Variant("quantize", half, native_4, packed)
    counters = problem.blocks(tile) if splits > 1 else 0
    launches = [] if fused else [_quantize(problem, at, quantize, counters)]
    variant = Variant(
        "low_bit",
        half,
        native_4,
        weight_bits,
        fused,
        tile,
        pointwise=problem.geometry.pointwise and not fused,
        channels_last=problem.channels_last,
        residual=at.residual != 0,
        silu=silu,
    )
    values = [at.x] if fused else [at.codes, at.sums]
    operands = [*values, at.weight, at.terms, at.tables, at.step]
    operands += [] if fused else [at.residual]
    integers = list(shape_arguments(problem))
    outputs = [at.out]
    if not fused:
        integers += [*path_arguments(problem, native_4=native_4), splits]
        outputs = [at.partial + COUNTER_BYTES * counters, at.partial, at.out]
    arguments = (
        *map(ctypes.c_void_p, operands),
        *map(ctypes.c_int, integers),
        *map(ctypes.c_void_p, outputs),
    )
    columns, rows, groups = problem.grid(tile)
    grid = _check_grid((columns, rows, groups * splits))
    launches.append(Launch(variant, grid, tile.threads, variant.shared_bytes, arguments))
    return launches


def _quantize(problem: Problem, at: Pointers, variant: Variant, counters: int) -> Launch:
    pixels, groups = problem.height * problem.width, problem.geometry.groups
    sizes = (pixels, problem.group_channels, groups, problem.steps)
    arguments = (
        *map(ctypes.c_void_p, (at.x, at.tables, at.step)),
        *map(ctypes.c_int, (*sizes, _CHANNELS_LAST * problem.channels_last)),
        *map(ctypes.c_void_p, (at.codes, at.sums, at.partial)),
        ctypes.c_int(counters),
    )
    grid = -(-pixels // _QUANTIZE_PIXELS), groups, problem.batch
    return Launch(variant, _check_grid(grid), variant.threads, 0, arguments)


def _check_grid(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    if max(grid[1:]) > _MAX_BLOCKS:
        raise UsageError(
            f"a grid of {grid[0]}x{grid[1]}x{grid[2]} blocks exceeds CUDA's limit of {_MAX_BLOCKS}; use "
            "a smaller batch"
        )
    return grid


def _check_alignment(at: Pointers, *, fused: bool) -> None:
    wanted = {"the weight": at.weight} if fused else {"the weight": at.weight, "codes": at.codes}
    for name, address in wanted.items():
        if address % _ALIGNMENT:
            raise UsageError(
                f"the address of {name} is not a multiple of {_ALIGNMENT} bytes; pass a whole tensor, "
                "not a slice"
            )
