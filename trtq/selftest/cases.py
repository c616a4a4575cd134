"""The cases of the kernels' suite: every variant, odd sizes, mixed steps, edges; integers are exact."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from trtq.plugins.spec import Geometry
from trtq.plugins.variants import ONE_LAUNCH_TILES, TILES, Tile
from trtq.selftest.fused_cases import FUSED_CHECKS
from trtq.selftest.layers import Array, Case, draw
from trtq.selftest.suite import FORMS, Check, Machine, WrongValueError, compare, expected, run

__all__ = ["CHECKS", "LARGE", "checks_for", "group"]

GEOMETRIES = {
    "1x1": Geometry(),
    "3x3": Geometry((3, 3), padding=(1, 1)),
    "down": Geometry((3, 3), stride=(2, 2), padding=(1, 1)),
    "odd": Geometry((2, 3), stride=(1, 2), padding=(1, 2), dilation=(2, 1)),
    "groups": Geometry((3, 1), padding=(1, 0), groups=4),
}
LINEAR, SAME = GEOMETRIES["1x1"], GEOMETRIES["3x3"]
ORDERS = {"nchw": False, "nhwc": True}


def _drawn(seed: int, form: str, **options: Any) -> Case:
    bits, activation_bits, _ = FORMS[form]
    case: Case = draw(seed, bits=bits, activation_bits=activation_bits, **options)
    return case


def _exact(machine: Machine, case: Case, form: str, **options: Any) -> None:
    actual = run(machine, case, native_4=FORMS[form][2], **options)
    compare(actual, expected(case), case.problem, options.get("tile", TILES[0]))


def _two_launches(machine: Machine, form: str, geometry: str, order: str) -> None:
    case = _drawn(1, form, geometry=GEOMETRIES[geometry], channels_last=ORDERS[order])
    _exact(machine, case, form)


def _tile(machine: Machine, form: str, tile: Tile, seed: int, half: bool = True) -> None:
    """Use more tiles along k than stages, several blocks, and images that end within a block.

    In half precision outputs are stored as vectors, otherwise one by one.
    """
    out = 136 if tile.n == 128 else 80
    case = _drawn(
        seed,
        form,
        batch=3,
        height=8 if half else 7,
        width=7,
        channels=72,
        out=out if half else out + 1,
        geometry=SAME if seed % 2 else LINEAR,
        half=half,
        channels_last=seed > 1,
    )
    _exact(machine, case, form, tile=tile, seed=seed)


def _splits(machine: Machine, form: str, geometry: str, splits: int, tile: Tile) -> None:
    """Divide k unevenly: splits begin within kernel rows, and only the last has the end of k."""
    case = _drawn(
        splits,
        form,
        geometry=GEOMETRIES[geometry],
        channels=200,
        out=72,
        height=9,
        channels_last=splits % 2 == 0,
    )
    residual: Array | None = draw(5, height=9, width=4, channels=72).x
    if case.problem.out_size != (9, 4):
        residual = None
    actual = run(
        machine,
        case,
        native_4=FORMS[form][2],
        tile=tile,
        splits=splits,
        residual=residual,
        seed=splits,
    )
    compare(actual, expected(case, residual=residual), case.problem, tile)


def _fused(machine: Machine, form: str, geometry: str, order: str, half: bool) -> None:
    case = _drawn(2, form, geometry=GEOMETRIES[geometry], half=half, channels_last=ORDERS[order])
    _exact(machine, case, form, fused=True)


def _two_stages(machine: Machine, form: str, seed: int, half: bool = True) -> None:
    """Use the larger tile of TensorRT engines: fewer stages than tiles along k, several blocks."""
    geometry = SAME if seed % 2 else LINEAR
    case = _drawn(
        seed,
        form,
        batch=3,
        height=7,
        width=7,
        channels=232,
        out=136,
        geometry=geometry,
        half=half,
        channels_last=geometry is LINEAR,
    )
    _exact(machine, case, form, tile=ONE_LAUNCH_TILES[1], fused=True, seed=seed)


def _residual(machine: Machine, form: str, order: str, width: int, half: bool = True) -> None:
    native = FORMS[form][2]
    case = _drawn(
        4,
        form,
        width=width,
        height=4,
        out=24 if width == 4 else 21,
        channels_last=ORDERS[order],
        half=half,
    )
    residual = draw(5, width=width, height=4, channels=case.problem.out_channels, half=half).x
    for given in (residual, None):
        actual = run(machine, case, native_4=native, residual=given, silu=True)
        wanted = expected(case, residual=given, silu=True)
        # The exponential may differ in the last bit of float32, and the result in the last bit of half
        # precision.
        spacing = np.spacing(np.abs(wanted).astype(np.float16)).astype(np.float32)
        compare(actual, wanted, case.problem, TILES[0], allowed=spacing)
    exact = run(machine, case, native_4=native, residual=residual)
    compare(exact, expected(case, residual=residual), case.problem, TILES[0])


def _tokens(machine: Machine, form: str) -> None:
    """Use rows with an odd number of channels, a single row, and aligned ends of parts of a chunk."""
    for batch, tokens, channels, out in (
        (2, 1, 33, 1),
        (2, 77, 40, 9),
        (2, 3, 1, 64),
        (1, 3, 36, 9),
        (1, 3, 38, 9),
    ):
        case = _drawn(
            6,
            form,
            batch=batch,
            height=tokens,
            width=1,
            channels=channels,
            out=out,
            channels_last=True,
        )
        _exact(machine, case, form)


def _outside(machine: Machine, form: str) -> None:
    case = _drawn(7, form)
    case.step = np.array([case.problem.steps, 1])
    actual = run(machine, case, native_4=FORMS[form][2])
    if not np.isnan(actual[0]).all():
        raise WrongValueError("an image whose step is outside the table is not NaN everywhere")
    case.step = np.array([1, 1])
    wanted = expected(case)
    actual[0] = wanted[0]
    compare(actual, wanted, case.problem, TILES[0])


def _not_finite(machine: Machine) -> None:
    case = draw(8, bits=8, activation_bits=8, channels=8, height=1, width=1, out=3)
    case.x.reshape(-1)[:6] = [np.nan, np.inf, -np.inf, 60000, -60000, 0]
    _exact(machine, case, "w8a8")


def _extreme(machine: Machine) -> None:
    case = draw(9, bits=8, activation_bits=8, channels=512, out=4, height=2, width=2)
    case.integers[...] = -128
    case.x[...] = -60000
    _exact(machine, case, "w8a8")


def _layouts() -> Iterator[Check]:
    for form, g, order in product(FORMS, GEOMETRIES, ORDERS):
        call = partial(_two_launches, form=form, geometry=g, order=order)
        yield Check("two launches", f"{form}-{g}-{order}", form, TILES[0], call)
    for half, form, g, order in product(
        (True, False), ("w8a8", "w4a8"), ("1x1", "odd", "groups"), ORDERS
    ):
        name = f"{'half' if half else 'float'}-{form}-{g}-{order}"
        call = partial(_fused, form=form, geometry=g, order=order, half=half)
        yield Check("fused", name, form, TILES[0], call)


def _tiles() -> Iterator[Check]:
    for form, tile, seed in product(("w8a8", "w4a8", "native"), TILES, range(4)):
        call = partial(_tile, form=form, tile=tile, seed=seed)
        yield Check("tiles", f"{form}-{tile.m}x{tile.n}-{seed}", form, tile, call)
    for form, seed in product(("w8a8", "w4a8"), (2, 3)):
        call = partial(_two_stages, form=form, seed=seed)
        yield Check("two stages", f"{form}-{seed}", form, ONE_LAUNCH_TILES[1], call)


def _divided() -> Iterator[Check]:
    for form, geometry, splits, tile in (
        ("w8a8", "odd", 3, TILES[0]),
        ("w8a8", "1x1", 2, TILES[0]),
        ("w4a8", "1x1", 3, TILES[0]),
        ("w4a8", "groups", 2, TILES[0]),
        ("native", "3x3", 4, TILES[0]),
        ("w4a8", "3x3", 3, TILES[1]),
    ):
        call = partial(_splits, form=form, geometry=geometry, splits=splits, tile=tile)
        yield Check("splits", f"{form}-{geometry}-{tile.m}-{splits}", form, tile, call)


def _floats() -> Iterator[Check]:
    """One case for each variant with float values that no other case runs."""
    for form, tile, seed in product(("w8a8", "w4a8", "native"), TILES, range(4)):
        call = partial(_tile, form=form, tile=tile, seed=seed, half=False)
        yield Check("floats", f"{form}-{tile.m}x{tile.n}-{seed}", form, tile, call)
    for form, seed in product(("w8a8", "w4a8"), (2, 3)):
        call = partial(_two_stages, form=form, seed=seed, half=False)
        yield Check("floats", f"{form}-two stages-{seed}", form, ONE_LAUNCH_TILES[1], call)


def _edges() -> Iterator[Check]:
    small = TILES[0]
    for width, form, order in product((4, 5), FORMS, ORDERS):
        if form == "w4a4":
            continue
        name = f"{'whole' if width == 4 else 'single'} stores-{form}-{order}"
        call = partial(_residual, form=form, order=order, width=width)
        yield Check("residual", name, form, small, call)
    for width, order in product((4, 5), ORDERS):
        name = f"float-{'whole' if width == 4 else 'single'} stores-{order}"
        call = partial(_residual, form="w8a8", order=order, width=width, half=False)
        yield Check("residual", name, "w8a8", small, call)
    for form in FORMS:
        yield Check("tokens", form, form, small, partial(_tokens, form=form))
        yield Check("outside", form, form, small, partial(_outside, form=form))
    yield Check("not finite", "w8a8", "w8a8", small, _not_finite)
    yield Check("extreme", "w8a8", "w8a8", small, _extreme)


def _large() -> Iterator[Check]:
    """Sizes for a GPU only: the longest sums of Stable Diffusion, and many blocks along rows."""
    for form, tile in product(FORMS, TILES):
        call = partial(_long_sums, form=form, tile=tile)
        yield Check("large", f"{form}-{tile.m}x{tile.n}-k 23040", form, tile, call)
        call = partial(_many_rows, form=form, tile=tile)
        yield Check("large", f"{form}-{tile.m}x{tile.n}-rows 70000", form, tile, call)


def _long_sums(machine: Machine, form: str, tile: Tile) -> None:
    sizes: dict[str, int] = {"channels": 2560, "out": 136, "height": 9, "width": 8}
    case = _drawn(31, form, geometry=SAME, channels_last=True, **sizes)
    _exact(machine, case, form, tile=tile)


def _many_rows(machine: Machine, form: str, tile: Tile) -> None:
    sizes: dict[str, int] = {"channels": 72, "out": 40, "height": 35_000, "width": 1}
    case = _drawn(32, form, channels_last=True, **sizes)
    _exact(machine, case, form, tile=tile)


LARGE = [*_large()]
"""Cases that take a CPU minutes; a GPU runs them in addition to `CHECKS`."""
CHECKS = [*_layouts(), *_tiles(), *_divided(), *_floats(), *_edges(), *FUSED_CHECKS]
"""All cases that every machine runs."""


def group(name: str) -> list[Check]:
    """The cases of a group."""
    return [check for check in CHECKS if check.group == name]


def checks_for(architecture: str) -> list[Check]:
    """The cases that an architecture runs."""
    return [check for check in CHECKS if check.runs_on(architecture)]
