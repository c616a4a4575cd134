"""Transformed inputs and scales per row in the graph equal the deployed layers in torch, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.graph.test_low_bit_layers import PER_CALL, TABLE, low_bit, sizes
from tests.graph.text import operators, parse, run
from trtq.graph.passes import ExpandLowBitToQdq, LowBitToPlugins
from trtq.graph.passes.plugin_nodes import TIMESTEPS_KEY, ExpandPlugins
from trtq.quant.deployed import DeployedLayer, DeployedProduct
from trtq.quant.geometry import ConvGeometry
from trtq.quant.input_transform import TransformTensors
from trtq.quant.tensors import ActivationTensors, ProductTensors

CONV = ConvGeometry((1, 1), (1, 1), (1, 1), 1)
FACTORS = torch.tensor([1.0, 50.0, 0.3, 7.0] * 8)


def eighths(*shape, seed=0):
    """Multiples of 1/8: sums of 16 of them are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-40, 41, shape, generator=generator) / 8


def transformed(layer, rotation, *, smooth=False):
    channels = layer.weight.codes.shape[1]
    factors = FACTORS[:channels] if smooth else None
    return replace(layer, transform=TransformTensors.of_channels(factors, rotation))


def with_policy(layer, policy):
    """The layer with 4-bit symmetric codes and scales by a policy."""
    steps = torch.tensor([0.5, 0.25, 0.75])
    low, high = torch.full((3,), -8), torch.full((3,), 7)
    return replace(layer, activation=ActivationTensors(steps, 1 / steps, low, high, 4, policy))


def linear_model(shape, layer):
    out = sizes(*shape[:-1], len(layer.weight.codes))
    model = parse(
        f"""g (float[{sizes(*shape)}] x, float[] t) => (float[{out}] y) {{
        y = trtq.LowBitLinear <name = "a"> (x) }}"""
    )
    ExpandLowBitToQdq({"a": layer}, TABLE, timestep=PER_CALL)(model)
    return model


def conv_model(shape, layer, target="qdq"):
    out = sizes(shape[0], len(layer.weight.codes), *shape[2:])
    model = parse(
        f"""g (float[{sizes(*shape)}] x, float[{shape[0]}] timestep) => (float[{out}] y) {{
        y = trtq.LowBitConv2d <name = "a", strides = [1, 1], group = 1, pads = [1, 1, 1, 1],
            dilations = [1, 1]> (x) }}"""
    )
    if target == "plugin":
        ExpandLowBitToQdq({"a": layer}, TABLE, ["LowBitMatMul"])(model)
        LowBitToPlugins({"a": layer}, TABLE)(model)
        model.metadata_props[TIMESTEPS_KEY] = "[1, 501, 901]"
    else:
        ExpandLowBitToQdq({"a": layer}, TABLE)(model)
    return model


@pytest.mark.parametrize("shape", [(32,), (4, 32), (2, 4, 32), (2, 3, 2, 32)])
@pytest.mark.parametrize("rotation", [0, 16])
def test_linear_layers_smooth_and_rotate_their_last_axis(shape, rotation):
    layer = transformed(low_bit((5, 32)), rotation, smooth=rotation == 0)
    x = eighths(*shape)
    expected = DeployedLayer(layer, None)(x, TABLE.index(501.0))
    result = run(linear_model(shape, layer), x=x.numpy(), t=np.array(501, np.float32))[0]
    np.testing.assert_array_equal(result, expected.numpy())


@pytest.mark.parametrize("rotation", [0, 16])
def test_convolutions_smooth_and_rotate_their_input_channels(rotation):
    layer = transformed(low_bit((6, 32, 3, 3)), rotation, smooth=rotation == 0)
    x, timestep = eighths(2, 32, 5, 4), torch.tensor([1.0, 901.0])
    expected = DeployedLayer(layer, CONV)(x, TABLE.index(timestep))
    model = conv_model(tuple(x.shape), layer)
    result = run(model, x=x.numpy(), timestep=timestep.numpy())[0]
    np.testing.assert_array_equal(result, expected.numpy())


def test_a_plugin_node_gets_the_transformed_input():
    layer = transformed(low_bit((6, 32, 3, 3)), 16)
    x, timestep = eighths(2, 32, 5, 4), np.array([1, 901], np.float32)
    model = conv_model(tuple(x.shape), layer, "plugin")
    (plugin,) = [node for node in model.graph if node.domain == "trtq"]
    assert plugin.inputs[0].producer().op_type == "Conv"
    ExpandPlugins()(model)
    expected = DeployedLayer(layer, CONV)(x, TABLE.index(torch.from_numpy(timestep)))
    np.testing.assert_array_equal(run(model, x=x.numpy(), timestep=timestep)[0], expected.numpy())


def test_layers_with_one_input_and_one_transform_share_codes_and_others_do_not():
    first, second = low_bit((5, 32)), low_bit((4, 32))
    other = transformed(low_bit((4, 32)), 16)
    layers = {"a": transformed(first, 16), "b": transformed(second, 16), "c": second}
    for names, rotations, quantisers in (("ab", 1, 1), ("ac", 1, 2)):
        body = f"""g (float[2,32] x, float[] t) => (float[2,5] y, float[2,4] z) {{
            y = trtq.LowBitLinear <name = "{names[0]}"> (x)
            z = trtq.LowBitLinear <name = "{names[1]}"> (x) }}"""
        model = parse(body)
        ExpandLowBitToQdq(layers, TABLE, timestep=PER_CALL)(model)
        assert operators(model).count("QuantizeLinear") == quantisers
        reshaped = [n for n in model.graph if n.name.endswith("rotation_groups")]
        assert len(reshaped) == rotations
    assert other.transform.key == layers["a"].transform.key


@pytest.mark.parametrize("policy", ["row", "hybrid"])
@pytest.mark.parametrize("shape", [(32,), (4, 32), (2, 3, 32)])
def test_linear_layers_have_one_scale_per_row(policy, shape):
    layer = with_policy(low_bit((5, 32)), policy)
    x = eighths(*shape)
    x[..., 0] = 0 if len(shape) == 1 else torch.tensor([9.0, 0.5, 0, 3])[: shape[-2]]
    expected = DeployedLayer(layer, None)(x, TABLE.index(501.0))
    model = linear_model(shape, layer)
    assert ("Gather" in operators(model)) == (policy == "hybrid")
    result = run(model, x=x.numpy(), t=np.array(501, np.float32))[0]
    np.testing.assert_array_equal(result, expected.numpy())


def test_a_row_of_zeros_gives_the_bias():
    layer = with_policy(low_bit((5, 32)), "row")
    model = linear_model((2, 32), layer)
    result = run(model, x=np.zeros((2, 32), np.float32), t=np.array(1, np.float32))[0]
    np.testing.assert_array_equal(result, layer.bias.expand(2, 5).numpy())


@pytest.mark.parametrize("target", ["qdq", "plugin"])
@pytest.mark.parametrize("policy", ["row", "hybrid"])
def test_convolutions_have_one_scale_per_image_and_no_plugin(policy, target):
    layer = with_policy(low_bit((6, 32, 3, 3)), policy)
    x, timestep = eighths(2, 32, 5, 4), torch.tensor([1.0, 901.0])
    x[1] *= 3
    expected = DeployedLayer(layer, CONV)(x, TABLE.index(timestep))
    model = conv_model(tuple(x.shape), layer, target)
    assert all(node.domain != "trtq" for node in model.graph)
    result = run(model, x=x.numpy(), timestep=timestep.numpy())[0]
    np.testing.assert_array_equal(result, expected.numpy())


@pytest.mark.parametrize("policy", ["row", "hybrid"])
def test_products_have_one_scale_per_row_and_per_column(policy):
    steps = torch.tensor([0.5, 0.25, 0.75])
    low, high = torch.full((3,), -8), torch.full((3,), 7)
    operand = ActivationTensors(steps, 1 / steps, low, high, 4, policy)
    product = ProductTensors(operand, operand)
    a, b = eighths(2, 3, 4, 8), eighths(2, 3, 8, 5, seed=1)
    b[..., 2] *= 8
    timestep = torch.tensor([1.0, 901.0])
    expected = DeployedProduct(product)(a, b, TABLE.index(timestep))
    model = parse(
        """g (float[2,3,4,8] a, float[2,3,8,5] b, float[2] timestep) => (float[2,3,4,5] y) {
        y = trtq.LowBitMatMul <name = "p"> (a, b) }"""
    )
    ExpandLowBitToQdq({"p": product}, TABLE)(model)
    result = run(model, a=a.numpy(), b=b.numpy(), timestep=timestep.numpy())[0]
    np.testing.assert_array_equal(result, expected.numpy())
