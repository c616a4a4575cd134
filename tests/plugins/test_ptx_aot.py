"""Kernels inside engines of full TensorRT: its arguments, in its order, for the PTX that it gets."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.conftest import shared
from tests.plugins.emulator import Memory
from tests.plugins.ptx import Builder, Program, needs_ptx
from tests.plugins.test_tensorrt_aot import Plugins, TensorDesc, TensorRt
from trtq.plugins.compile import ptx
from trtq.plugins.low_bit import reference
from trtq.plugins.low_bit.attributes import fields_of
from trtq.plugins.low_bit.tensorrt_aot import register_all
from trtq.plugins.spec import Geometry, LayerSpec
from trtq.selftest.layers import draw

pytestmark = needs_ptx

SAME = Geometry((3, 3), padding=(1, 1))


@pytest.mark.parametrize(
    ("architecture", "geometry", "bits"),
    [
        ("sm90", SAME, 8),
        *(
            pytest.param(architecture, geometry, bits, marks=pytest.mark.slow)
            for architecture in ("sm75", "sm80", "sm120")
            for geometry, bits in ((None, 4), (SAME, 8))
        ),
    ],
)
def test_the_ptx_of_an_engine_computes_the_layer(tmp_path_factory, architecture, geometry, bits):
    plugins = Plugins()
    register_all(TensorRt, plugins, lambda variant: ptx(variant, architecture))
    linear = geometry is None
    case = draw(
        21,
        geometry=geometry,
        bits=bits,
        activation_bits=8,
        width=1 if linear else 4,
        channels_last=linear,
    )
    problem = case.problem
    layer = LayerSpec(problem.channels, problem.out_channels, problem.steps, bits, 8, geometry)
    name = "trtq::LowBitLinear" if linear else "trtq::LowBitConv2d"
    x = np.ascontiguousarray(case.x.transpose(0, 2, 3, 1)[:, :, 0]) if linear else case.x
    description = [TensorDesc(x.shape, "half"), *[TensorDesc((1,), "float")] * 4]
    description += [np.array(values, np.int32) for values in fields_of(layer).values()]
    out = plugins.described[name](*description)
    _, code, launch, extra = plugins.implemented[name](*description, (out,), 0)
    memory = Memory()
    arrays = (x, case.packed, case.terms, case.tables, case.step)
    inputs = [memory.put(array, f"input {place}") for place, array in enumerate(arrays)]
    result = memory.put(np.full(problem.out_shape, np.nan, np.float16), "output", writable=True)
    program = Program(
        Builder(shared(tmp_path_factory, "ptx", lambda _: None)).library(code.decode())
    )
    # TensorRT passes the inputs, the integers, and the outputs.
    program.run(
        (
            *(ctypes.c_void_p(array.ctypes.data) for array in inputs),
            *map(ctypes.c_int, extra),
            ctypes.c_void_p(result.ctypes.data),
        ),
        memory,
        grid=(launch.grid_x, launch.grid_y, launch.grid_z),
        threads=launch.block_x,
        shared_bytes=launch.shared_mem,
    )
    actual = result.transpose(0, 3, 1, 2) if linear else result
    wanted = reference.low_bit(
        case.x, case.integers, case.terms, case.tables, case.step, problem.geometry
    )
    assert np.array_equal(actual, wanted)
