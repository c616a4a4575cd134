"""What a case of the kernels' suite is, and how a machine runs it.

A machine computes the launches of a layer on arrays: a GPU, or in the tests the emulator, which compiles
the CUDA C for the CPU, and the PTX runner, which runs what NVRTC made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from trtq.plugins.launch import Launch, Pointers, layer_launches
from trtq.plugins.low_bit import reference
from trtq.plugins.spec import Problem
from trtq.plugins.variants import TILES, Tile, fits, has_native_4
from trtq.selftest.layers import Array, Case

__all__ = [
    "FORMS",
    "Check",
    "Machine",
    "Operand",
    "WrongValueError",
    "compare",
    "expected",
    "place",
    "run",
]

FORMS = {
    "w8a8": (8, 8, False),
    "w4a8": (4, 8, False),
    "w4a4": (4, 4, False),
    "native": (4, 4, True),
}
"""Bits of weights and activations, and whether tensor cores multiply nibbles, by name."""
_POISON, _SUM_POISON = 0x5A, -9


class WrongValueError(AssertionError):
    """A kernel computed or wrote something else than its definition; the message names the place."""


@dataclass(frozen=True)
class Operand:
    """An array in a device's memory.

    Attributes:
        values: contents before the first launch.
        writable: whether kernels may write to it.
    """

    values: Array
    writable: bool = False


class Machine(Protocol):
    """A device, or its stand-in in a test."""

    def compute(
        self,
        operands: Mapping[str, Operand],
        launches: Callable[[Mapping[str, int]], Sequence[Launch]],
        seed: int,
    ) -> Array:
        """Run launches and return the contents of the operand `out`.

        Args:
            operands: operands by name.
            launches: function that makes the launches from the operands' addresses.
            seed: seed of the threads' order, for a machine that can choose it.

        Raises:
            WrongValueError: a kernel wrote to memory that it may not write to.
        """


@dataclass(frozen=True)
class Check:
    """One case of the suite.

    Attributes:
        group: what is checked, one name per test function.
        name: name of the case.
        form: a key of `FORMS`.
        tile: tile of the product.
        call: raises AssertionError on a machine that computes something else.
    """

    group: str
    name: str
    form: str
    tile: Tile
    call: Callable[[Any], None]

    def __str__(self) -> str:
        return self.name

    @property
    def full_name(self) -> str:
        """Group and name."""
        return f"{self.group}/{self.name}"

    def runs_on(self, architecture: str) -> bool:
        """Whether an architecture has the form's products and the tile's memory."""
        native = FORMS[self.form][2]
        return fits(self.tile, architecture) and (not native or has_native_4(architecture))


def run(
    machine: Machine,
    case: Case,
    *,
    tile: Tile = TILES[0],
    native_4: bool = False,
    fused: bool = False,
    residual: Array | None = None,
    silu: bool = False,
    splits: int = 1,
    seed: int = 0,
) -> Array:
    """Run the kernels on a case and return the output, `[B, N, P, Q]`."""
    problem = case.problem

    def laid_out(values: Array) -> Array:
        last = values.transpose(0, 2, 3, 1) if problem.channels_last else values
        return np.ascontiguousarray(last)

    operands = {
        "out": Operand(np.full(problem.out_shape, np.nan, case.x.dtype), writable=True),
        "x": Operand(laid_out(case.x)),
        "weight": Operand(case.packed),
        "terms": Operand(case.terms),
        "tables": Operand(case.tables),
        "step": Operand(case.step),
        "codes": Operand(
            np.full(problem.code_bytes(native_4=native_4), _POISON, np.uint8), writable=True
        ),
        "sums": Operand(np.full(problem.sum_bytes // 4, _SUM_POISON, np.int32), writable=True),
    }
    if residual is not None:
        operands["residual"] = Operand(laid_out(residual))
    if splits > 1:
        size = problem.plan_bytes(tile, splits)
        operands["partial"] = Operand(np.full(size, _POISON, np.uint8), writable=True)

    def launches(addresses: Mapping[str, int]) -> Sequence[Launch]:
        return layer_launches(
            problem,
            Pointers(**addresses),
            tile,
            half=case.x.dtype == np.float16,
            weight_bits=case.bits,
            native_4=native_4,
            silu=silu,
            fused=fused,
            splits=splits,
        )

    out = machine.compute(operands, launches, seed)
    return np.array(out.transpose(0, 3, 1, 2) if problem.channels_last else out)


def expected(case: Case, **options: Any) -> Array:
    """The reference's output for a case."""
    return reference.low_bit(
        case.x, case.integers, case.terms, case.tables, case.step, case.problem.geometry, **options
    )


def compare(
    actual: Array, wanted: Array, problem: Problem, tile: Tile, *, allowed: Array | None = None
) -> None:
    """Raise unless an output equals the reference's, value by value.

    Args:
        actual: output of the kernels, `[B, N, P, Q]`.
        wanted: output of the reference.
        problem: sizes of the call.
        tile: tile of the product, from which block, warp and lane are derived.
        allowed: largest allowed difference of each value; None: none.

    Raises:
        WrongValueError: a value differs; the message names the first one.
    """
    if allowed is None:
        wrong = actual != wanted  # NaN differs, too.
    else:
        difference = np.abs(actual.astype(np.float32) - wanted.astype(np.float32))
        wrong = ~(difference <= allowed)
    if not wrong.any():
        return
    index = tuple(map(int, np.argwhere(wrong)[0]))
    raise WrongValueError(
        f"{int(wrong.sum())} of {wrong.size} values are wrong, first at "
        f"{place(index, problem, tile)}: {actual[index]!s} in place of {wanted[index]!s}"
    )


def place(index: tuple[int, ...], problem: Problem, tile: Tile) -> str:
    """Where an output value lies: its index, and block, warp and lane of its product.

    Args:
        index: image, channel, row and column.
        problem: sizes of the call.
        tile: tile of the product.
    """
    image, channel, y, x = index
    height, width = problem.out_size
    row = (image * height + y) * width + x
    group, column = divmod(channel, problem.out_channels // problem.geometry.groups)
    inside_m, inside_n = row % tile.m, column % tile.n
    warp_m, warp_n = tile.m // tile.warps_m, tile.n // tile.warps_n
    warp = inside_m // warp_m * tile.warps_n + inside_n // warp_n
    # A thread holds two neighbouring columns of one row of eight.
    lane = inside_m % 8 * 4 + inside_n % 8 // 2
    return (
        f"image {image}, channel {channel}, row {y}, column {x} (block {column // tile.n}, "
        f"{row // tile.m}, {group}, warp {warp}, lane {lane})"
    )
