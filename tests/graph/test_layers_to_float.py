"""Low-bit layers of a graph turned back to float equal the float forms of deployed layers in torch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.graph.test_input_transforms import eighths
from tests.graph.test_low_bit_layers import (
    CONVOLUTIONS,
    PER_CALL,
    TABLE,
    TWICE,
    low_bit,
    sizes,
    values,
)
from tests.graph.test_nvfp4_nodes import OUT
from tests.graph.test_transformed_formats import FACTORS, LAYERS
from tests.graph.test_weight_only_nodes import linear_graph
from tests.graph.text import operators, parse, run
from trtq.errors import ArtefactError
from trtq.graph.low_bit_layers import layers_to_float, mark_layers
from trtq.graph.passes import ExpandLowBitToQdq
from trtq.graph.runtimes.prepare import prepare
from trtq.quant.deployed import DeployedLayer, DeployedProduct
from trtq.quant.float_form import float_form
from trtq.quant.formats import deployed_form
from trtq.quant.geometry import ConvGeometry
from trtq.quant.input_transform import TransformTensors
from trtq.quant.structure import Product
from trtq.snr import snr_db

FORMATS = {**LAYERS, "int": lambda: low_bit((OUT, 64), 8)}
MIN_DB = {"fp8": 20, "nvfp4": 10, "weight_only": 100}


def deployed(name, layer):
    return DeployedLayer(layer, None) if name == "int" else deployed_form(layer, None)


def graph_of(layer, shape, out, kind="float"):
    model = linear_graph(shape, out, kind)
    ExpandLowBitToQdq({"a": layer}, TABLE, timestep=PER_CALL)(model)
    return prepare(model, "onnxruntime")


@pytest.mark.parametrize("rotation", [None, 0, 16])
@pytest.mark.parametrize("name", FORMATS)
def test_a_linear_layer_of_any_format_and_transform(name, rotation):
    layer = FORMATS[name]()
    if rotation is not None:
        transform = TransformTensors.of_channels(None if rotation else FACTORS, rotation)
        layer = replace(layer, transform=transform)
    low = deployed(name, layer)
    twin = float_form(low)
    assert isinstance(twin, nn.Linear)
    x = eighths(2, 5, 64)
    if name in MIN_DB:
        small = x / 100  # Inside the range of the layer's scale, behind a smoothing, too.
        assert snr_db(low(small, TABLE.index(501.0)), twin(small)) > MIN_DB[name]
    model = graph_of(layer, (2, 5, 64), OUT)
    layers_to_float(model, {"a": twin})
    assert operators(model) == ["MatMul", "Add"]
    (result,) = run(model, x=x.numpy(), t=np.array([501], np.float32))
    torch.testing.assert_close(torch.from_numpy(result), twin(x), rtol=1e-5, atol=1e-4)


def test_the_result_keeps_the_type_of_a_graph_in_half_precision():
    twin = float_form(deployed("int", low_bit((OUT, 64), 8)))
    model = graph_of(low_bit((OUT, 64), 8), (2, 64), OUT, "float16")
    layers_to_float(model, {"a": twin})
    assert operators(model) == ["Cast", "MatMul", "Add", "Cast"]
    x = eighths(2, 64)
    (result,) = run(model, x=x.half().numpy(), t=np.array([501], np.float32))
    assert result.dtype == np.float16
    assert snr_db(twin(x), torch.from_numpy(result).float()) > 60


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_over_any_number_of_axes(case):
    kind, shape, options = CONVOLUTIONS[case]
    conv = kind(4, 6, 3, **options)
    geometry = ConvGeometry.of(conv)
    layer = low_bit(tuple(conv.weight.shape), 8)
    factors = torch.tensor([0.5, 2.0, 4.0, 0.25])
    layer = replace(layer, transform=TransformTensors.of_channels(factors, 0))
    low = DeployedLayer(layer, geometry)
    twin = float_form(low)
    assert type(twin) is kind
    x = values(*shape)
    expected = twin(x)
    operator = "LowBitConv2d" if case == "2 axes" else "LowBitConv"
    g = geometry
    model = parse(f"""g (float[{sizes(*shape)}] x, float[1] t)
        => (float[{sizes(*expected.shape)}] y) {{
        y = trtq.{operator} <name = "a", strides = {list(g.stride)}, group = {g.groups},
            pads = {[*g.padding, *g.padding]}, dilations = {list(g.dilation)}> (x) }}""")
    ExpandLowBitToQdq({"a": layer}, TABLE, timestep=PER_CALL)(model)
    layers_to_float(model, {"a": twin})
    (result,) = run(model, x=x.numpy(), t=np.array([501], np.float32))
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-4, atol=1e-4)


def test_every_call_of_a_layer_is_replaced_and_the_last_one_marked():
    layer = low_bit((5, 6))
    twin = float_form(DeployedLayer(layer, None))
    model = parse(TWICE)
    ExpandLowBitToQdq({"l": layer}, TABLE, timestep=PER_CALL)(model)
    mark_layers(model, ["l"])
    inputs = values(2, 6), values(2, 3, 6, seed=1), values(2, 4, 6, seed=2)
    feeds = dict(zip("xzw", (x.numpy() for x in inputs), strict=True))
    *_, third, marked = run(model, t=np.array(901, np.float32), **feeds)
    np.testing.assert_array_equal(third, marked)
    layers_to_float(model, {"l": twin})
    results = run(model, t=np.array(901, np.float32), **feeds)
    for x, result in zip(inputs, results[:3], strict=True):
        torch.testing.assert_close(torch.from_numpy(result), twin(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(results[2], results[3])


def test_products_and_float_layers_have_a_float_form():
    source = nn.Linear(3, 2)
    assert float_form(source) is source
    assert isinstance(float_form(DeployedProduct.__new__(DeployedProduct)), Product)


def test_a_layer_that_the_graph_does_not_have_is_named():
    model = graph_of(low_bit((OUT, 64), 8), (2, 64), OUT)
    with pytest.raises(ArtefactError, match="has no layer 'b'"):
        mark_layers(model, ["b"])
    with pytest.raises(ArtefactError, match="has no layer 'b'"):
        layers_to_float(model, {"b": nn.Linear(64, OUT)})
