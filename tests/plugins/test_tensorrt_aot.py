"""Kernels inside engines of full TensorRT, with a fake `tensorrt.plugin`.

The definitions were also accepted by the Python bindings of TensorRT 10.16 and 11.4, in a manual test:
they need libraries that no Python package index offers.
"""

import copy
import inspect

import numpy as np
import pytest

from trtq.plugins.arguments import shape_arguments
from trtq.plugins.compile import ptx
from trtq.plugins.low_bit.attributes import PLUGINS, fields_of
from trtq.plugins.low_bit.tensorrt_aot import register_all
from trtq.plugins.spec import Geometry, LayerSpec
from trtq.plugins.variants import ONE_LAUNCH_TILES, TILES, Variant


class TensorDesc:
    def __init__(self, shape, dtype):
        self.shape_expr, self.dtype = list(shape), dtype

    def like(self):
        return copy.deepcopy(self)


class Plugins:
    """A fake `tensorrt.plugin` with integers as sizes, where TensorRT has expressions."""

    TensorDesc = TensorDesc
    KernelLaunchParams = type("KernelLaunchParams", (), {"grid_x": 1, "grid_y": 1, "grid_z": 1})
    SymIntExprs = staticmethod(lambda length: [None] * length)
    SymInt32 = staticmethod(int)

    def __init__(self):
        self.described, self.implemented = {}, {}

    def register(self, name):
        return lambda function: self.described.setdefault(name, function)

    def aot_impl(self, name):
        return lambda function: self.implemented.setdefault(name, function)


class TensorRt:
    class DataType:
        HALF, FLOAT = "half", "float"


@pytest.fixture
def plugins():
    registry = Plugins()
    register_all(TensorRt, registry, lambda variant: str(variant).encode())
    return registry


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("LowBitLinear", LayerSpec(40, 320, 20, 4, 8), (2, 77, 40)),
        ("LowBitLinear", LayerSpec(40, 64, 20, 8, 8), (3, 40)),
        (
            "LowBitConv2d",
            LayerSpec(40, 64, 20, 4, 4, Geometry((3, 3), (2, 2), (1, 1))),
            (2, 40, 9, 8),
        ),
        (
            "LowBitConv2d",
            LayerSpec(8, 512, 1, 8, 8, Geometry((1, 3), (1, 1), (0, 2), (1, 2), 2)),
            (1, 8, 5, 5),
        ),
    ],
)
def test_the_launch_is_that_of_the_fused_kernel(plugins, name, layer, shape):
    x = TensorDesc(shape, "half")
    others = [TensorDesc((1,), "float")] * 4
    fields = [np.array(values, np.int32) for values in fields_of(layer).values()]
    out = plugins.described[f"trtq::{name}"](x, *others, *fields)
    problem = layer.problem(shape)
    expected = problem.out_shape if layer.geometry else (*shape[:-1], layer.out_channels)
    assert tuple(out.shape_expr) == tuple(expected)
    kernel, code, launch, extra = plugins.implemented[f"trtq::{name}"](
        x, *others, *fields, (out,), 0
    )
    groups = layer.geometry.groups if layer.geometry else 1
    tile = ONE_LAUNCH_TILES[layer.out_channels // groups >= 128]
    variant = Variant(
        "low_bit",
        True,
        False,
        layer.weight_bits,
        fused=True,
        tile=tile,
        channels_last=layer.geometry is None,
    )
    assert (kernel, code) == ("low_bit", str(variant).encode())
    assert tuple(extra) == shape_arguments(problem)
    blocks = -(-layer.out_channels // groups // tile.n), -(-problem.rows // tile.m), groups
    assert (launch.grid_x, launch.grid_y, launch.grid_z) == blocks
    assert (launch.block_x, launch.shared_mem) == (tile.threads, variant.shared_bytes)
    # The system reserves 1 KiB of TensorRT's default shared memory on sm90 and later.
    assert launch.shared_mem <= 47 << 10


def test_the_signatures_are_those_that_tensorrt_inspects(plugins):
    for name in PLUGINS:
        described = inspect.signature(plugins.described[f"trtq::{name}"])
        implemented = inspect.signature(plugins.implemented[f"trtq::{name}"])
        names = ["x", "weight", "terms", "tables", "step", *fields_of(LayerSpec(1, 1, 1, 8, 8))]
        assert list(described.parameters) == names
        assert list(implemented.parameters) == [*names, "outputs", "tactic"]
        assert described.return_annotation is TensorDesc
        kinds = [parameter.annotation for parameter in described.parameters.values()]
        assert kinds[:5] == [TensorDesc] * 5


def test_the_code_is_ptx_for_later_gpus():
    code = ptx(Variant("low_bit", True, False, 4, fused=True, tile=TILES[0]), "sm80")
    assert b".target sm_80" in code
    assert b".visible .entry low_bit" in code
