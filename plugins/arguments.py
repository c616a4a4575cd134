"""Integer arguments of the product kernel, see `low_bit/layer.cuh`."""

from __future__ import annotations

from trtq.errors import UsageError
from trtq.plugins.spec import Problem
from trtq.plugins.variants import TILE_BYTES

__all__ = ["path_arguments", "shape_arguments"]

_CHUNK = 16
"""Number of bytes in a chunk; kernels count codes in chunks."""
_MAX_CHUNKS = (1 << 32) - (1 << 20)
"""Number of chunks of codes that kernels can count; the rest is for the codes of zero."""


def shape_arguments(problem: Problem) -> tuple[int, ...]:
    """The integer arguments of the product kernel, in the order of its parameters."""
    g = problem.geometry
    sizes = (problem.batch, problem.height, problem.width, problem.group_channels)
    out = (*problem.out_size, problem.out_channels, g.groups)
    return *sizes, *out, *g.kernel, *g.stride, *g.padding, *g.dilation, problem.steps


def path_arguments(problem: Problem, *, native_4: bool) -> tuple[int, ...]:
    """How the product kernel moves in the codes of a convolution, see `Path` in `low_bit/layer.cuh`.

    Raises:
        UsageError: the codes do not fit the kernel's integers.
    """
    g = problem.geometry
    channels = problem.padded_channels // 2 if native_4 else problem.padded_channels
    tap = channels // _CHUNK
    pixel = g.groups * tap
    line = problem.width * pixel
    taps, channel = divmod(TILE_BYTES, channels)
    row, column = divmod(taps, g.kernel[1])
    y, x = row * g.dilation[0], column * g.dilation[1]
    tile = y * line + x * pixel + channel // _CHUNK
    next_tap = g.dilation[1] * pixel - tap
    next_line = g.dilation[0] * line - g.kernel[1] * g.dilation[1] * pixel
    if problem.batch * problem.height * line > _MAX_CHUNKS:
        raise UsageError(
            f"the codes of a {problem.batch}x{problem.channels}x{problem.height}x{problem.width} input "
            "have more than 64 GiB; use a smaller batch"
        )
    return x, y, channel, tile, next_tap, next_line
