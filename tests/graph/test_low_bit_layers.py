"""Low-bit layers of every rank in the graph equal the deployed layers in torch, bit for bit."""

import numpy as np
import pytest
import torch

from tests.graph.text import operators, parse, run
from trtq.errors import LegalityError
from trtq.graph.passes import ExpandLowBitToQdq, LowBitToPlugins, StepInput
from trtq.graph.passes.plugin_nodes import TIMESTEPS_KEY, ExpandPlugins
from trtq.quant import TimestepTable
from trtq.quant.deployed import DeployedLayer
from trtq.quant.geometry import ConvGeometry
from trtq.quant.packing import PackedWeight
from trtq.quant.tensors import ActivationTensors, LayerTensors

TABLE = TimestepTable([1, 501, 901])
PER_CALL = StepInput("t", per_item=False)


def low_bit(shape, bits=4, seed=0):
    """Tensors of a layer with a weight `[N, K, *kernel]`; every step has its own scale."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, shape, generator=rng).to(torch.uint8)
    each = (shape[0], *[1] * (len(shape) - 1))
    scale = torch.rand(each, generator=rng) + 0.1
    weight = PackedWeight.of(codes, scale, torch.full(each, 2.0 ** (bits - 1)), bits)
    steps = torch.tensor([0.031, 0.017, 0.023]) * (seed + 1)
    low, high = torch.full((3,), -100), torch.tensor([100, 90, 80])
    activation = ActivationTensors(steps, 1 / steps, low, high, 8)
    return LayerTensors(weight, activation, torch.randn(shape[0], generator=rng))


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sizes(*shape):
    return ",".join(map(str, shape))


def linear_graph(shape, timestep="float[]"):
    out = sizes(*shape[:-1], 5)
    body = f"""g (float[{sizes(*shape)}] x, {timestep} t) => (float[{out}] y) {{
        y = trtq.LowBitLinear <name = "a"> (x) }}"""
    return parse(body)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6), (2, 5, 3, 6), (2, 5, 3, 2, 6)])
@pytest.mark.parametrize("timestep", [1.0, 700.0, 1000.0])
def test_linear_layers_of_every_rank_scale_their_last_axis(shape, timestep):
    """Axis 1 of `[2, 5, 3, 6]` is as long as the output has channels: scales there do not fail."""
    layer = low_bit((5, 6))
    model = linear_graph(shape)
    ExpandLowBitToQdq({"a": layer}, TABLE, timestep=PER_CALL)(model)
    x = values(*shape)
    expected = DeployedLayer(layer, None)(x, TABLE.index(timestep))
    result = run(model, x=x.numpy(), t=np.array(timestep, np.float32))[0]
    np.testing.assert_array_equal(result, expected.numpy())


def test_each_item_has_its_own_scales_in_a_linear_layer_of_rank_4():
    layer = low_bit((5, 6))
    body = """g (float[2,5,3,6] x, float[2] timestep) => (float[2,5,3,5] y) {
        y = trtq.LowBitLinear <name = "a"> (x) }"""
    model = parse(body)
    ExpandLowBitToQdq({"a": layer}, TABLE)(model)
    x, timestep = values(2, 5, 3, 6), torch.tensor([901.0, 3.0])
    expected = DeployedLayer(layer, None)(x, TABLE.index(timestep))
    result = run(model, x=x.numpy(), timestep=timestep.numpy())[0]
    np.testing.assert_array_equal(result, expected.numpy())


def test_the_first_axis_of_the_named_input_is_the_batch():
    layer = low_bit((5, 6))
    body = """g (float[7] other, float[2,6] x, float[1] t) => (float[2,5] y) {
        y = trtq.LowBitLinear <name = "a"> (x) }"""
    model = parse(body)
    ExpandLowBitToQdq({"a": layer}, TABLE, timestep=StepInput("t", rows="x"))(model)
    x = values(2, 6)
    expected = DeployedLayer(layer, None)(x, TABLE.index(400.0))
    feeds = {"other": np.zeros(7, np.float32), "t": np.array([400], np.float32)}
    np.testing.assert_array_equal(run(model, x=x.numpy(), **feeds)[0], expected.numpy())


CONVOLUTIONS = {
    "1 axis": (torch.nn.Conv1d, (2, 4, 9), {"stride": 2, "padding": 1}),
    "2 axes": (torch.nn.Conv2d, (2, 4, 7, 6), {"padding": (1, 0), "groups": 2}),
    "3 axes": (torch.nn.Conv3d, (2, 4, 3, 6, 5), {"padding": (0, 1, 1), "dilation": (1, 2, 1)}),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_over_one_to_three_axes_scale_their_second_axis(case, bits):
    kind, shape, options = CONVOLUTIONS[case]
    conv = kind(4, 6, 3, **options)
    geometry = ConvGeometry.of(conv)
    layer = low_bit(tuple(conv.weight.shape), bits)
    x = values(*shape)
    expected = DeployedLayer(layer, geometry)(x, TABLE.index(501.0))
    operator = "LowBitConv2d" if case == "2 axes" else "LowBitConv"
    g = geometry
    body = f"""g (float[{sizes(*shape)}] x, float[1] t) => (float[{sizes(*expected.shape)}] y) {{
        y = trtq.{operator} <name = "a", strides = {list(g.stride)}, group = {g.groups},
            pads = {[*g.padding, *g.padding]}, dilations = {list(g.dilation)}> (x) }}"""
    model = parse(body)
    ExpandLowBitToQdq({"a": layer}, TABLE, timestep=PER_CALL)(model)
    result = run(model, x=x.numpy(), t=np.array([501], np.float32))[0]
    np.testing.assert_array_equal(result, expected.numpy())


TIMESTEPS = {
    "scalar int64": ("int64[]", np.array(501)),
    "per image float64": ("double[2]", np.array([501.0, 501.0])),
    "per token float32": ("float[2,3]", np.array([[0, 501, 0], [501, 0, 3]], np.float32)),
    "half precision": ("float16[1]", np.array([501], np.float16)),
}


@pytest.mark.parametrize("case", TIMESTEPS)
def test_the_noisiest_timestep_of_a_call_determines_the_step(case):
    kind, timestep = TIMESTEPS[case]
    layer = low_bit((5, 6))
    model = linear_graph((2, 6), kind)
    ExpandLowBitToQdq({"a": layer}, TABLE, timestep=PER_CALL)(model)
    x = values(2, 6)
    expected = DeployedLayer(layer, None)(x, TABLE.index(501.0))
    np.testing.assert_array_equal(run(model, x=x.numpy(), t=timestep)[0], expected.numpy())


def test_a_timestep_that_is_no_input_is_refused():
    model = linear_graph((2, 6))
    with pytest.raises(
        LegalityError, match="no input 'sigma' for the timestep; its inputs are 'x'"
    ):
        ExpandLowBitToQdq({"a": low_bit((5, 6))}, TABLE, timestep=StepInput("sigma", False))(model)


TWICE = """g (float[2,6] x, float[2,3,6] z, float[2,4,6] w, float[] t)
    => (float[2,5] a, float[2,3,5] b, float[2,4,5] c) {
    a = trtq.LowBitLinear <name = "l"> (x) b = trtq.LowBitLinear <name = "l"> (z)
    c = trtq.LowBitLinear <name = "l"> (w) }"""


@pytest.mark.parametrize("plugins", [False, True])
def test_calls_of_one_layer_share_its_weight_and_are_exact(plugins):
    layer = low_bit((5, 6))
    model = parse(TWICE)
    if plugins:
        assert LowBitToPlugins({"l": layer}, TABLE, PER_CALL)(model).modified
        assert operators(model).count("LowBitLinear") == 3
        model.metadata_props[TIMESTEPS_KEY] = "[1.0, 501.0, 901.0]"
        ExpandPlugins()(model)
    else:
        ExpandLowBitToQdq({"l": layer}, TABLE, timestep=PER_CALL)(model)
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    weights = [name for name in model.graph.initializers if name.endswith("l/weight")]
    assert weights == ["l/weight"]
    tables = [v for k, v in model.graph.initializers.items() if k.endswith("/table")]
    # Three columns and the layer's scale for each rank; the two calls of rank 3 use the same ones.
    assert [table.shape[1] for table in tables] == [6]
    inputs = values(2, 6), values(2, 3, 6, seed=1), values(2, 4, 6, seed=2)
    feeds = dict(zip("xzw", (x.numpy() for x in inputs), strict=True))
    deployed = DeployedLayer(layer, None)
    results = run(model, t=np.array(901, np.float32), **feeds)
    for x, result in zip(inputs, results, strict=True):
        np.testing.assert_array_equal(result, deployed(x, TABLE.index(901.0)).numpy())
