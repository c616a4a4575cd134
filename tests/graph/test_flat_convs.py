"""One-dimensional low-bit convolutions get a second axis for TensorRT, with the same integers."""

import numpy as np
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tests.graph.text import operators, parse, run
from trtq.graph.runtimes.flat_convs import FlatConvs

BODY = """g (float[B, {c}, L] x) => (float[B, {o}, M] y) {{
  k = QuantizeLinear(x, unit, zero)
  a = DequantizeLinear(k, unit, zero)
  f = DequantizeLinear<axis = 0>(w, ones)
  y = {conv}(a, f{bias})
}}"""


def model(conv, shape, bias=False, groups=1):
    channels = shape[1] * groups
    codes = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    initializers = {
        "unit": np.array(1, np.float32),
        "zero": np.array(0, np.int8),
        "ones": np.linspace(0.5, 2, shape[0]).astype(np.float32),
        "w": codes,
    }
    if bias:
        initializers["b"] = np.arange(shape[0], dtype=np.float32)
    body = BODY.format(c=channels, o=shape[0], conv=conv, bias=", b" if bias else "")
    made = parse(body, **initializers)
    next(node for node in made.graph if node.op_type == "Conv").name = "layer/conv"
    return made


@pytest.mark.parametrize(
    ("conv", "shape", "bias", "groups"),
    [
        ("Conv", (4, 3, 1), False, 1),
        ("Conv<kernel_shape = [3], pads = [2, 1], strides = [2]>", (4, 3, 3), True, 1),
        ("Conv<dilations = [2], group = 2>", (4, 3, 3), False, 2),
    ],
    ids=["1 x 1 without attributes", "padded, with a bias", "dilated, in groups"],
)
def test_the_result_is_the_same_and_the_pair_stands_before_the_convolution(
    conv, shape, bias, groups
):
    made = model(conv, shape, bias, groups)
    x = np.random.default_rng(1).normal(0, 4, (2, shape[1] * groups, 9)).astype(np.float32)
    (expected,) = run(made, x=x)
    assert FlatConvs()(made).modified
    RemoveUnusedNodesPass()(made)
    (given,) = run(made, x=x)
    assert np.array_equal(given, expected)
    assert sorted(operators(made)) == sorted(
        ["QuantizeLinear", "Unsqueeze", "DequantizeLinear", "DequantizeLinear", "Conv", "Squeeze"]
    )
    (layer,) = [node for node in made.graph if node.op_type == "Conv"]
    assert layer.name == "layer/conv"
    assert {value.producer().op_type for value in layer.inputs[:2]} == {"DequantizeLinear"}
    assert not FlatConvs()(made).modified


def test_images_and_float_convolutions_stay():
    images = parse(
        """g (float[B, 3, H, W] x) => (float[B, 2, M, N] y) {
          k = QuantizeLinear(x, unit, zero)
          a = DequantizeLinear(k, unit, zero)
          f = DequantizeLinear<axis = 0>(w, ones)
          y = Conv(a, f)
        }""",
        unit=np.array(1, np.float32),
        zero=np.array(0, np.int8),
        ones=np.ones(2, np.float32),
        w=np.ones((2, 3, 1, 1), np.int8),
    )
    floats = parse(
        "g (float[B, 3, L] x) => (float[B, 2, M] y) { y = Conv(x, w) }",
        w=np.ones((2, 3, 1), np.float32),
    )
    for made in (images, floats):
        before = operators(made)
        assert not FlatConvs()(made).modified
        assert operators(made) == before
