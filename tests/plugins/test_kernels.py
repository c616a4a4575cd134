"""Compare the CUDA kernels, run on the CPU thread by thread, with the reference."""

from __future__ import annotations

import numpy as np
import pytest

from tests.plugins.emulator import Emulator, Memory, needs_compiler
from tests.plugins.layers import draw
from trtq.plugins.launch import Pointers, layer_launches
from trtq.plugins.low_bit import reference
from trtq.plugins.spec import Geometry
from trtq.plugins.variants import ONE_LAUNCH_TILES, TILES

pytestmark = needs_compiler

LINEAR = Geometry()
SAME = Geometry((3, 3), padding=(1, 1))
DOWN = Geometry((3, 3), stride=(2, 2), padding=(1, 1))
ODD = Geometry((2, 3), stride=(1, 2), padding=(0, 2), dilation=(2, 1))
GROUPED = Geometry((3, 1), padding=(1, 0), groups=4)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("kernels"))


def address(array):
    return 0 if array is None else array.ctypes.data


def run(
    emulator, case, *, tile=TILES[0], native_4=False, fused=False, residual=None, silu=False, seed=0
):
    """Run the kernels on a case and return the output, `[B, N, P, Q]`."""
    problem, memory = case.problem, Memory()

    def laid_out(values):
        return (
            np.ascontiguousarray(values.transpose(0, 2, 3, 1)) if problem.channels_last else values
        )

    out = memory.put(np.full(problem.out_shape, np.nan, case.x.dtype))
    rubbish = np.full(problem.code_bytes(native_4=native_4), 0x5A, np.uint8)
    arrays = {
        "x": laid_out(case.x),
        "weight": case.packed,
        "terms": case.terms,
        "tables": case.tables,
        "step": case.step,
        "codes": rubbish,
        "sums": np.full(problem.sum_bytes // 4, -9, np.int32),
        "residual": None if residual is None else laid_out(residual),
    }
    placed = {name: None if a is None else memory.put(a) for name, a in arrays.items()}
    at = Pointers(out=address(out), **{name: address(array) for name, array in placed.items()})
    launches = layer_launches(
        problem,
        at,
        tile,
        half=case.x.dtype == np.float16,
        weight_bits=case.bits,
        native_4=native_4,
        silu=silu,
        fused=fused,
    )
    for launch in launches:
        emulator.run(launch, seed)
    return np.array(out.transpose(0, 3, 1, 2) if problem.channels_last else out)


def expected(case, **options):
    return reference.low_bit(
        case.x, case.integers, case.terms, case.tables, case.step, case.problem.geometry, **options
    )


FORMS = {
    "w8a8": (8, 8, False),
    "w4a8": (4, 8, False),
    "w4a4": (4, 4, False),
    "native": (4, 4, True),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "geometry", [LINEAR, SAME, DOWN, ODD, GROUPED], ids=["1x1", "3x3", "down", "odd", "groups"]
)
@pytest.mark.parametrize("form", FORMS)
def test_two_launches_equal_the_reference_bit_for_bit(emulator, form, geometry, channels_last):
    bits, activation_bits, native = FORMS[form]
    case = draw(
        1,
        geometry=geometry,
        bits=bits,
        activation_bits=activation_bits,
        channels_last=channels_last,
    )
    assert np.array_equal(run(emulator, case, native_4=native), expected(case))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.m}x{tile.n}")
@pytest.mark.parametrize("form", ["w8a8", "w4a8", "native"])
def test_every_tile_equals_the_reference_in_any_order_of_threads(emulator, form, tile, seed):
    """Use more tiles along k than stages, several blocks, and images that end within a block."""
    bits, activation_bits, native = FORMS[form]
    case = draw(
        seed,
        batch=3,
        height=7,
        width=7,
        channels=72,
        out=264 if tile.n == 256 else 80,
        geometry=SAME if seed % 2 else LINEAR,
        bits=bits,
        activation_bits=activation_bits,
        channels_last=seed > 1,
    )
    assert np.array_equal(
        run(emulator, case, tile=tile, native_4=native, seed=seed), expected(case)
    )


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("geometry", [LINEAR, ODD, GROUPED], ids=["1x1", "odd", "groups"])
@pytest.mark.parametrize("form", ["w8a8", "w4a8"])
@pytest.mark.parametrize("half", [True, False], ids=["half", "float"])
def test_the_fused_kernel_equals_the_reference(emulator, half, form, geometry, channels_last):
    bits, activation_bits, _ = FORMS[form]
    case = draw(
        2,
        geometry=geometry,
        bits=bits,
        activation_bits=activation_bits,
        half=half,
        channels_last=channels_last,
    )
    assert np.array_equal(run(emulator, case, fused=True), expected(case))


@pytest.mark.parametrize("form", ["w8a8", "w4a8"])
def test_the_fused_kernel_with_two_stages_equals_the_reference(emulator, form):
    """Use the larger tile of TensorRT engines: fewer stages than tiles along k, several blocks."""
    bits, activation_bits, _ = FORMS[form]
    for seed, geometry in ((2, LINEAR), (3, SAME)):
        case = draw(
            seed,
            batch=3,
            height=7,
            width=7,
            channels=232,
            out=136,
            geometry=geometry,
            bits=bits,
            activation_bits=activation_bits,
            channels_last=geometry is LINEAR,
        )
        actual = run(emulator, case, tile=ONE_LAUNCH_TILES[1], fused=True, seed=seed)
        assert np.array_equal(actual, expected(case))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("form", ["w8a8", "native"])
@pytest.mark.parametrize("width", [4, 5], ids=["whole stores", "single stores"])
def test_residual_is_added_before_silu(emulator, width, form, channels_last):
    bits, activation_bits, native = FORMS[form]
    case = draw(
        4,
        width=width,
        height=4,
        out=24 if width == 4 else 21,
        bits=bits,
        activation_bits=activation_bits,
        channels_last=channels_last,
    )
    residual = draw(5, width=width, height=4, channels=case.problem.out_channels).x
    actual = run(emulator, case, native_4=native, residual=residual, silu=True)
    wanted = expected(case, residual=residual, silu=True)
    # The exponential may differ in the last bit of float32, and the result in the last bit of half
    # precision.
    spacing = np.spacing(np.abs(wanted).astype(np.float16)).astype(np.float32)
    assert (np.abs(actual.astype(np.float32) - wanted.astype(np.float32)) <= spacing).all()
    exact = run(emulator, case, native_4=native, residual=residual)
    assert np.array_equal(exact, expected(case, residual=residual))


@pytest.mark.parametrize("form", FORMS)
def test_a_linear_layer_of_tokens_equals_the_reference(emulator, form):
    """Use rows with an odd number of channels, and a single row."""
    bits, activation_bits, native = FORMS[form]
    for tokens, channels, out in ((1, 33, 1), (77, 40, 9), (3, 1, 64)):
        case = draw(
            6,
            batch=2,
            height=tokens,
            width=1,
            channels=channels,
            out=out,
            bits=bits,
            activation_bits=activation_bits,
            channels_last=True,
        )
        assert np.array_equal(run(emulator, case, native_4=native), expected(case))


@pytest.mark.parametrize("form", FORMS)
def test_a_step_outside_the_table_gives_nan(emulator, form):
    bits, activation_bits, native = FORMS[form]
    case = draw(7, bits=bits, activation_bits=activation_bits)
    case.step = np.array([case.problem.steps, 1])
    actual = run(emulator, case, native_4=native)
    assert np.isnan(actual[0]).all()
    case.step = np.array([1, 1])
    assert np.array_equal(actual[1], expected(case)[1])


def test_nan_and_infinity_become_the_extreme_codes(emulator):
    case = draw(8, bits=8, activation_bits=8, channels=8, height=1, width=1, out=3)
    case.x.reshape(-1)[:6] = [np.nan, np.inf, -np.inf, 60000, -60000, 0]
    assert np.array_equal(run(emulator, case), expected(case))


def test_extreme_codes_do_not_overflow(emulator):
    case = draw(9, bits=8, activation_bits=8, channels=512, out=4, height=2, width=2)
    case.integers[...] = -128
    case.x[...] = -60000
    assert np.array_equal(run(emulator, case), expected(case))
