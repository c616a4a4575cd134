"""The places of wrong values, and the cases for a GPU only, on machines that compute nothing."""

from __future__ import annotations

import numpy as np
import pytest

from trtq.plugins.spec import Geometry, Problem
from trtq.plugins.variants import ARCHITECTURES, TILES
from trtq.selftest.cases import CHECKS, LARGE, checks_for
from trtq.selftest.suite import WrongValueError, compare, place

SMALL, LARGER = TILES


@pytest.mark.parametrize(
    ("index", "tile", "where"),
    [
        ((0, 0, 0, 0), SMALL, "(block 0, 0, 0, warp 0, lane 0)"),
        # Row 2 * 5 * 4 + 1 * 4 + 3 = 47 of 64: warp 1 along m; row 7 of eight.
        ((2, 10, 1, 3), SMALL, "(block 0, 0, 0, warp 2, lane 29)"),
        # Channel 100 is in the second block, 36 of its 64: warp 1 along n, column 4 of eight.
        ((0, 100, 0, 1), SMALL, "(block 1, 0, 0, warp 1, lane 6)"),
        # 128 x 128 with 2 x 4 warps: channel 100 is in the fourth along n.
        ((0, 100, 0, 1), LARGER, "(block 0, 0, 0, warp 3, lane 6)"),
        # Row 150 = 128 + 22.
        ((7, 0, 2, 2), LARGER, "(block 0, 1, 0, warp 0, lane 24)"),
    ],
)
def test_a_place_has_block_warp_and_lane(index, tile, where):
    problem = Problem(8, 5, 4, 32, 200, 3)
    text = place(index, problem, tile)
    assert text.startswith("image {}, channel {}, row {}, column {} ".format(*index))
    assert text.endswith(where)


def test_channels_of_a_group_count_from_its_first():
    problem = Problem(1, 1, 1, 64, 100, 3, Geometry(groups=4))
    assert place((0, 55, 0, 0), problem, SMALL).endswith("(block 0, 0, 2, warp 0, lane 2)")


def test_nan_is_a_wrong_value_and_differences_may_be_allowed():
    problem = Problem(1, 1, 2, 1, 1, 3)
    wanted = np.ones((1, 1, 1, 2), np.float16)
    compare(wanted.copy(), wanted, problem, SMALL)
    for wrong in (np.nan, 1.001):
        actual = wanted.copy()
        actual[0, 0, 0, 1] = wrong
        with pytest.raises(WrongValueError, match=r"1 of 2 values are wrong, .* column 1 "):
            compare(actual, wanted, problem, SMALL)
    compare(actual, wanted, problem, SMALL, allowed=np.full(wanted.shape, 0.01))
    actual[0, 0, 0, 1] = np.nan
    with pytest.raises(WrongValueError):
        compare(actual, wanted, problem, SMALL, allowed=np.full(wanted.shape, 0.01))


class Sizes:
    """A machine that notes sizes and launches, and returns the poisoned output."""

    def compute(self, operands, launches, seed):
        addresses = {name: 256 * (index + 1) for index, name in enumerate(operands)}
        self.grids = [launch.grid for launch in launches(addresses)]
        self.operands = operands
        return operands["out"].values


@pytest.mark.parametrize("check", LARGE, ids=str)
def test_large_cases_have_the_sizes_of_their_names(check):
    machine = Sizes()
    with pytest.raises(WrongValueError, match="values are wrong"):
        check.call(machine)
    x = machine.operands["x"].values
    if "rows" in check.name:
        assert x.shape[0] * x.shape[1] * x.shape[2] == 70_000
        assert machine.grids[-1][1] == -(-70_000 // check.tile.m)
    else:
        assert 9 * x.shape[3] == 23_040
    assert not np.isfinite(machine.operands["out"].values).any()


def test_every_architecture_has_cases_with_unique_names():
    names = [check.full_name for check in (*CHECKS, *LARGE)]
    assert len(set(names)) == len(names)
    counts = {architecture: len(checks_for(architecture)) for architecture in ARCHITECTURES}
    assert min(counts.values()) > 80
    assert counts["sm89"] > counts["sm90"], "products of nibbles"
