"""From a call of a low-bit layer to launches of kernels: which variant, which grid, which arguments.

Pointers are plain addresses of device memory; nothing here knows of torch or TensorRT.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

from trtq.errors import UsageError
from trtq.plugins.spec import TILES, LayerSpec, Problem, Tile, Variant, fits

__all__ = [
    "Device",
    "Launch",
    "Pointers",
    "choose_tile",
    "layer_launches",
    "prepare_any_shape",
    "prepare_layer",
    "shape_arguments",
    "start_layer",
]

_CHANNELS_LAST, _SILU = 1, 2
_QUANTIZE_PIXELS, _QUANTIZE_THREADS = 32, 128
_ALIGNMENT = 16
_MAX_BLOCKS = 65_535
"""CUDA's bound on y and z of a grid."""


@dataclass(frozen=True)
class Launch:
    """One kernel to start.

    Attributes:
        variant: the kernel.
        grid: blocks along x, y, z.
        threads: of a block.
        shared_bytes: of a block, beyond what the kernel itself declares.
        arguments: in the kernel's order, as ctypes values.
    """

    variant: Variant
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[Any, ...]


class Device(Protocol):
    """A GPU, or what stands in for one in a test.

    Attributes:
        architecture: e.g. `sm89`.
        processors: its streaming multiprocessors.
    """

    architecture: str
    processors: int

    def prepare(self, launch: Launch) -> None:
        """Compile and load a kernel."""

    def start(self, launch: Launch, stream: int) -> None:
        """Start a kernel on a stream; returns before it is done."""


@dataclass(frozen=True)
class Pointers:
    """Where the operands of a layer lie on the device, see `trtq.plugins.spec` for their layouts.

    Attributes:
        x: values of the input.
        weight: packed.
        terms: float32[4, N].
        tables: float32[4, T].
        step: int64[B].
        out: values of the output.
        codes: scratch of `Problem.code_bytes`.
        sums: scratch of `Problem.sum_bytes`, for 4-bit products.
        residual: values laid out as the output; 0: none.
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
    """Start a whole layer on a stream, as it runs fastest on the device.

    Args:
        device: the GPU.
        layer: what it is.
        problem: `layer.problem` of the input's shape.
        at: operands, on the device.
        stream: of CUDA, as an integer.
        half: values are half precision, otherwise float32.
        silu: applied last.

    Raises:
        UsageError: an operand is not aligned.
        KernelError: a kernel cannot be compiled, loaded or started.
    """
    for launch in _chosen(device, layer, problem, at, half=half, silu=silu):
        device.start(launch, stream)


def prepare_layer(device: Device, layer: LayerSpec, problem: Problem, *, half: bool) -> None:
    """Compile and load what `start_layer` will start; arguments are its own.

    Raises:
        KernelError: a kernel cannot be compiled or loaded.
    """
    nowhere = Pointers(0, 0, 0, 0, 0, 0, 0)
    for launch in _chosen(device, layer, problem, nowhere, half=half, silu=False):
        device.prepare(launch)


def prepare_any_shape(device: Device, layer: LayerSpec) -> None:
    """Compile and load all that `start_layer` may start, whatever the input's shape and type.

    Raises:
        KernelError: a kernel cannot be compiled or loaded.
    """
    nowhere = Pointers(0, 0, 0, 0, 0, 0, 0)
    if layer.geometry is None:
        shape: tuple[int, ...] = (1, layer.channels)
    else:
        g = layer.geometry
        sides = (g.dilation[axis] * (g.kernel[axis] - 1) + 1 for axis in (0, 1))
        shape = (1, layer.channels, *sides)
    problem = layer.problem(shape)
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


def _chosen(
    device: Device, layer: LayerSpec, problem: Problem, at: Pointers, *, half: bool, silu: bool
) -> list[Launch]:
    return layer_launches(
        problem,
        at,
        choose_tile(problem, device.processors, device.architecture),
        half=half,
        weight_bits=layer.weight_bits,
        native_4=layer.native_4(device.architecture),
        silu=silu,
    )


def choose_tile(problem: Problem, processors: int, architecture: str) -> Tile:
    """The tile whose waves of blocks compute the least beside the problem.

    Args:
        problem: what is computed.
        processors: streaming multiprocessors of the GPU.
        architecture: of the GPU.
    """
    groups = problem.geometry.groups
    per_group = problem.out_channels // groups

    def work(tile: Tile) -> tuple[int, int]:
        blocks = -(-problem.rows // tile.m) * -(-per_group // tile.n) * groups
        # Blocks that share a processor share its tensor cores: a wave is one block on each. Among
        # equals the larger tile loads less per product.
        return -(-blocks // processors) * tile.m * tile.n, -tile.m * tile.n

    return min((tile for tile in TILES if fits(tile, architecture)), key=work)


def shape_arguments(problem: Problem, *, silu: bool) -> tuple[int, ...]:
    """The integers that the product kernel takes, in its order."""
    g = problem.geometry
    flags = _CHANNELS_LAST * problem.channels_last | _SILU * silu
    sizes = (problem.batch, problem.height, problem.width, problem.group_channels)
    out = (*problem.out_size, problem.out_channels, g.groups)
    return *sizes, *out, *g.kernel, *g.stride, *g.padding, *g.dilation, problem.steps, flags


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
) -> list[Launch]:
    """The launches of one layer: quantise, then multiply; or both in one.

    Args:
        problem: sizes.
        at: operands; codes and sums are not needed when fused.
        tile: see `choose_tile`.
        half: values are half precision, otherwise float32.
        weight_bits: 4 or 8, as the weights lie.
        native_4: quantise to nibbles and multiply them as they are.
        silu: applied last.
        fused: one launch that quantises as it reads; takes no residual.

    Raises:
        UsageError: an operand is not aligned, or a combination that no kernel computes.
    """
    if weight_bits not in (4, 8) or (native_4 and (weight_bits == 8 or fused)):
        raise UsageError(
            f"no kernel has weight_bits={weight_bits}, native_4={native_4} and fused={fused}; weights "
            "lie in 4 or 8 bits, and native 4-bit products take 4-bit weights in two launches"
        )
    if fused and at.residual:
        raise UsageError("the kernel in one launch adds no residual; use two launches")
    _check_alignment(at, fused=fused)
    launches = [] if fused else [_quantize(problem, at, half=half, native_4=native_4)]
    variant = Variant("low_bit", half, native_4, weight_bits, fused, tile)
    values = [at.x] if fused else [at.codes, at.sums]
    operands = [*values, at.weight, at.terms, at.tables, at.step]
    operands += [] if fused else [at.residual]
    arguments = (
        *map(ctypes.c_void_p, operands),
        *map(ctypes.c_int, shape_arguments(problem, silu=silu)),
        ctypes.c_void_p(at.out),
    )
    groups = problem.geometry.groups
    columns = -(-(problem.out_channels // groups) // tile.n)
    grid = columns, -(-problem.rows // tile.m), groups
    _check_grid(grid)
    launches.append(Launch(variant, grid, tile.threads, tile.shared_bytes, arguments))
    return launches


def _quantize(problem: Problem, at: Pointers, *, half: bool, native_4: bool) -> Launch:
    pixels, groups = problem.height * problem.width, problem.geometry.groups
    sizes = (pixels, problem.group_channels, groups, problem.steps)
    arguments = (
        *map(ctypes.c_void_p, (at.x, at.tables, at.step)),
        *map(ctypes.c_int, (*sizes, _CHANNELS_LAST * problem.channels_last)),
        *map(ctypes.c_void_p, (at.codes, at.sums)),
    )
    grid = -(-pixels // _QUANTIZE_PIXELS), groups, problem.batch
    _check_grid(grid)
    return Launch(Variant("quantize", half, native_4), grid, _QUANTIZE_THREADS, 0, arguments)


def _check_grid(grid: tuple[int, int, int]) -> None:
    if max(grid[1:]) > _MAX_BLOCKS:
        raise UsageError(
            f"a grid of {grid[0]}x{grid[1]}x{grid[2]} blocks is beyond CUDA's {_MAX_BLOCKS}; use a "
            "smaller batch"
        )


def _check_alignment(at: Pointers, *, fused: bool) -> None:
    wanted = {"the weight": at.weight} if fused else {"the weight": at.weight, "codes": at.codes}
    for name, address in wanted.items():
        if address % _ALIGNMENT:
            raise UsageError(
                f"{name} lies at an address that is no multiple of {_ALIGNMENT} bytes; give a tensor of "
                "its own, not a slice of one"
            )
