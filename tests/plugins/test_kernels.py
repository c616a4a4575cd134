"""Compare the CUDA kernels, run on the CPU thread by thread, with the reference."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest

from tests.plugins.emulator import Emulator, needs_compiler
from trtq.selftest.cases import group

pytestmark = needs_compiler


SLOW = (
    *("tiles/*-128x128-[012]", "fused/float-*", "fused/half-w8a8-*-nchw", "two stages/*-2"),
    *("two stages/w8a8-3", "splits/*-3", "splits/native-*", "splits/w4a8-groups-*"),
    *("two launches/w4a8-1x1-nchw", "two launches/native-1x1-nchw", "residual/single *"),
    *("residual/float-*", "residual/* stores-native-*", "residual/* stores-w4a8-*"),
    *(
        "residual/whole stores-w8a8-nhwc",
        "norms/float-*",
        "norms/half-w8a8-*",
        "norms/half-native-*",
    ),
)
"""Cases of `make test-slow`: each compiles variants of which `make test` compiles neighbours."""


def cases(name):
    for check in group(name):
        slow = any(fnmatch(f"{name}/{check}", pattern) for pattern in SLOW)
        marks = (pytest.mark.slow,) if slow else ()
        yield pytest.param(check, id=str(check), marks=marks)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("check", [*cases("two launches")])
def test_two_launches_equal_the_reference_bit_for_bit(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", [*cases("tiles")])
def test_every_tile_equals_the_reference_in_any_order_of_threads(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", [*cases("fused")])
def test_the_fused_kernel_equals_the_reference(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", [*cases("two stages")])
def test_the_fused_kernel_with_two_stages_equals_the_reference(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", [*cases("splits")])
def test_blocks_that_divide_k_equal_the_reference(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", [*cases("residual")])
def test_residual_is_added_before_silu(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", [*cases("tokens")])
def test_a_linear_layer_of_tokens_equals_the_reference(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", [*cases("outside")])
def test_a_step_outside_the_table_gives_nan(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", [*cases("not finite")])
def test_nan_and_infinity_become_the_extreme_codes(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", [*cases("extreme")])
def test_extreme_codes_do_not_overflow(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", [*cases("norms")])
def test_norms_and_activations_before_a_layer_equal_the_reference(emulator, check):
    check.call(emulator)
