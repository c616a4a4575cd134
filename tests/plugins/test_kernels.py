"""Compare the CUDA kernels, run on the CPU thread by thread, with the reference."""

from __future__ import annotations

import pytest

from tests.plugins.emulator import Emulator, needs_compiler
from tests.plugins.kernel_suite import group

pytestmark = needs_compiler


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("check", group("two launches"), ids=str)
def test_two_launches_equal_the_reference_bit_for_bit(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", group("tiles"), ids=str)
def test_every_tile_equals_the_reference_in_any_order_of_threads(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", group("fused"), ids=str)
def test_the_fused_kernel_equals_the_reference(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", group("two stages"), ids=str)
def test_the_fused_kernel_with_two_stages_equals_the_reference(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", group("splits"), ids=str)
def test_blocks_that_divide_k_equal_the_reference(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", group("residual"), ids=str)
def test_residual_is_added_before_silu(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", group("tokens"), ids=str)
def test_a_linear_layer_of_tokens_equals_the_reference(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", group("outside"), ids=str)
def test_a_step_outside_the_table_gives_nan(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", group("not finite"), ids=str)
def test_nan_and_infinity_become_the_extreme_codes(emulator, check):
    check.call(emulator)


@pytest.mark.parametrize("check", group("extreme"), ids=str)
def test_extreme_codes_do_not_overflow(emulator, check):
    check.call(emulator)
