"""Rewrites of integer products: each fires where it should, and does not change the results."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tests.graph.text import operators, parse, run
from trtq.errors import LegalityError
from trtq.graph.passes import ExpandLowBitToQdq
from trtq.graph.runtimes.break_uniform_scales import BreakUniformScales
from trtq.graph.runtimes.casts_to_qdq import CastsToQdq
from trtq.graph.runtimes.matmul_to_conv import MatMulToConv
from trtq.graph.runtimes.wide_products_to_float import WideProductsToFloat
from trtq.graph.runtimes.wide_weights_to_float import WideWeightsToFloat
from trtq.quant import TimestepTable
from trtq.quant.packing import PackedWeight
from trtq.quant.tensors import ActivationTensors, LayerTensors

WEIGHT = """g (int8[2,3] k) => (float[2,4] y) {{
    x = Cast <to = 1> (k) w = DequantizeLinear <axis = 1> ({}) y = MatMul(x, w) }}"""
WEIGHT_ONLY = (
    "g (float[2,3] x) => (float[2,4] y) {{ w = DequantizeLinear <axis = 1> ({}) y = MatMul(x, w) }}"
)


def integers(largest):
    return np.array([[largest, -5, 3, 1]] * 3, np.int8)


def test_only_weights_beyond_pair_safe_become_float():
    ones, k = np.ones(4, np.float32), np.ones((2, 3), np.int8)
    model = parse(WEIGHT.format("q, unit"), q=integers(100), unit=ones)
    before = run(model, k=k)
    assert WideWeightsToFloat()(model).modified
    assert operators(model) == ["Cast", "Cast", "MatMul"]
    np.testing.assert_array_equal(run(model, k=k)[0], before[0])
    model = parse(WEIGHT.format("q, unit"), q=integers(64), unit=ones)
    assert not WideWeightsToFloat()(model).modified
    assert operators(model) == ["Cast", "DequantizeLinear", "MatMul"]


def test_weights_of_float_activations_stay_as_they_are():
    """Weight-only layers have no integer product that could saturate."""
    ones = np.ones(4, np.float32)
    model = parse(WEIGHT_ONLY.format("q, unit"), q=integers(100), unit=ones)
    assert not WideWeightsToFloat()(model).modified


def test_weights_beyond_pair_safe_with_their_own_scale_are_refused():
    model = parse(WEIGHT.format("q, half"), q=integers(100), half=np.full(4, 0.5, np.float32))
    with pytest.raises(LegalityError, match="scaled before the product"):
        WideWeightsToFloat()(model)


SEQUENCE = """g (int8[2,5,3] k) => (float[2,5,4] y) {{
    x = DequantizeLinear(k, unit) {codes} w = DequantizeLinear <axis = 1> ({weight}, one)
    y = MatMul(x, w) }}"""


@pytest.mark.parametrize(
    "codes", ["", "wide = Cast <to = 3> (q) shifted = Sub(wide, zero)"], ids=["int8", "int4"]
)
def test_products_of_sequences_become_convolutions_with_the_same_result(codes):
    body = SEQUENCE.format(codes=codes, weight="shifted" if codes else "q")
    q = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    numbers = {"one": np.ones(4, np.float32), "unit": np.array(1, np.float32)}
    model = parse(body, q=q, zero=np.array([1, 0, 2, -1], np.int8), **numbers)
    k = np.arange(30, dtype=np.int8).reshape(2, 5, 3) - 15
    before = run(model, k=k)
    assert MatMulToConv()(model).modified
    assert "Conv" in operators(model)
    assert "MatMul" not in operators(model)
    np.testing.assert_array_equal(run(model, k=k)[0], before[0])
    assert not MatMulToConv()(model).modified


@pytest.mark.parametrize("sequence", [False, True])
def test_unequal_scales_do_not_change_the_result(sequence):
    numbers = {"one": np.ones(4, np.float32), "unit": np.array(1, np.float32)}
    q = np.arange(-6, 6, dtype=np.int8)
    if sequence:
        body = SEQUENCE.format(codes="", weight="q").replace(
            "y = MatMul(x, w)", "m = MatMul(x, w) y = Mul(m, s)"
        )
        model = parse(
            body, q=q.reshape(3, 4), s=np.array([0.3, 0.1, 7, 1e-3], np.float32), **numbers
        )
        assert MatMulToConv()(model).modified
        k = np.arange(30, dtype=np.int8).reshape(2, 5, 3)
    else:
        body = """g (int8[2,3,2,2] k) => (float[2,4,2,2] y) { x = DequantizeLinear(k, unit)
            w = DequantizeLinear <axis = 0> (q, one) c = Conv(x, w) y = Mul(c, s) }"""
        s = np.array([0.3, 0.1, 7, 1e-3], np.float32).reshape(4, 1, 1)
        model = parse(body, q=q.reshape(4, 3, 1, 1), s=s, **numbers)
        k = np.arange(24, dtype=np.int8).reshape(2, 3, 2, 2)
    before = run(model, k=k)
    assert BreakUniformScales()(model).modified
    np.testing.assert_array_equal(run(model, k=k)[0], before[0])
    assert not BreakUniformScales()(model).modified


def test_products_without_a_sequence_or_of_two_activations_do_not_change():
    model = parse(WEIGHT.format("q, unit"), q=integers(64), unit=np.ones(4, np.float32))
    assert not MatMulToConv()(model).modified
    model = parse(PRODUCT.format(**PAIRS), **UNIT)
    assert not MatMulToConv()(model).modified


def test_a_low_bit_node_without_tensors_is_refused_and_other_graphs_do_not_change():
    body = (
        "g (float[2,3] sample, float[2] timestep) => (float[2,4] y) "
        '{ y = trtq.LowBitLinear <name = "a"> (sample) }'
    )
    with pytest.raises(LegalityError, match="'a' without its tensors"):
        ExpandLowBitToQdq({}, TimestepTable([1, 2]))(parse(body))
    model = parse("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    assert not ExpandLowBitToQdq({}, TimestepTable([1]))(model).modified


PRODUCT = """g (float[2,3] a, float[3,4] b) => (float[2,4] y) {{
    ka = QuantizeLinear(a, one, zero) kb = QuantizeLinear(b, one, zero)
    da = {left} db = {right} y = MatMul(da, db) }}"""
PAIRS = {f: f"DequantizeLinear(k{o}, one, zero)" for f, o in (("left", "a"), ("right", "b"))}
CASTS = {"left": "Cast <to = 1> (ka)", "right": "Cast <to = 1> (kb)"}
UNIT = {"one": np.array(1, np.float32), "zero": np.array(0, np.int8)}
A = np.array([[200.0, -300.0, 0.5], [1.5, 2.5, -0.5]], np.float32)
B = np.array([[127.4, -129.0, 3.0, 1.0]] * 3, np.float32)


def test_products_beyond_pair_safe_are_rounded_in_float():
    model = parse(PRODUCT.format(**CASTS), **UNIT)
    before = run(model, a=A, b=B)
    assert WideProductsToFloat()(model).modified
    assert not {"QuantizeLinear", "Cast"} & set(operators(model))
    np.testing.assert_array_equal(run(model, a=A, b=B)[0], before[0])
    assert not WideProductsToFloat()(model).modified


def test_pairs_and_constant_weights_remain_integers():
    model = parse(PRODUCT.format(**PAIRS), **UNIT)
    assert not WideProductsToFloat()(model).modified
    model = parse(WEIGHT.format("q, unit"), q=integers(100), unit=np.ones(4, np.float32))
    assert not WideProductsToFloat()(model).modified


def test_cast_codes_of_two_activations_become_pairs():
    model = parse(PRODUCT.format(**CASTS), **UNIT)
    before = run(model, a=A, b=B)
    assert CastsToQdq()(model).modified
    assert Counter(operators(model)) == {"QuantizeLinear": 2, "DequantizeLinear": 2, "MatMul": 1}
    assert all(len(n.inputs) == 3 for n in model.graph if n.op_type == "DequantizeLinear")
    np.testing.assert_array_equal(run(model, a=A, b=B)[0], before[0])
    assert not CastsToQdq()(model).modified


def test_casts_of_other_values_than_codes_do_not_change():
    body = """g (int8[2,3] a) => (float[2,4] y) {
        x = Cast <to = 1> (a) w = Cast <to = 1> (q) y = MatMul(x, w) }"""
    model = parse(body, q=integers(100))
    assert not CastsToQdq()(model).modified
    assert operators(model) == ["Cast", "Cast", "MatMul"]


def low_bit(bits, shape=(4, 3), largest=None):
    """Tensors of a layer whose largest integer is `largest`."""
    middle = 2 ** (bits - 1)
    codes = (middle + torch.arange(int(np.prod(shape))).reshape(shape) % 7 - 3).to(torch.uint8)
    if largest is not None:
        codes[0] = middle + largest
    each = (shape[0], *[1] * (len(shape) - 1))
    weight = PackedWeight.of(codes, torch.full(each, 0.5), torch.full(each, float(middle)), bits)
    scale = torch.tensor([0.25, 0.5])
    low, high = torch.full((2,), -128), torch.full((2,), 127)
    return LayerTensors(weight, ActivationTensors(scale, 1 / scale, low, high, 8), None)


TWO_LAYERS = """g (float[2,3] sample, float[2] timestep) => (float[2,4] y, float[2,4] z) {
    y = trtq.LowBitLinear <name = "a"> (sample) z = trtq.LowBitLinear <name = "b"> (sample) }"""


@pytest.mark.parametrize(
    ("a", "b", "casts"),
    [
        (low_bit(8, largest=64), low_bit(4), False),
        (low_bit(8, largest=65), low_bit(8, largest=64), True),
        (low_bit(4), low_bit(8, largest=127), True),
    ],
    ids=["all safe", "one exceeds", "one exceeds next to 4 bits"],
)
def test_products_that_could_saturate_cast_their_codes_and_all_shared_codes(a, b, casts):
    model = parse(TWO_LAYERS)
    ExpandLowBitToQdq({"a": a, "b": b}, TimestepTable([1, 501]))(model)
    counts = Counter(operators(model))
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (1, 0 if casts else 3)
    feeds = {
        "sample": np.array([[40, -40, 3.1], [0.3, -7, 9]], np.float32),
        "timestep": np.array([1, 501], np.float32),
    }
    before = run(model, **feeds)
    plain = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for result, expected in zip(plain.run(None, feeds), before, strict=True):
        np.testing.assert_array_equal(result, expected)
    assert CastsToQdq()(model).modified is casts
    assert Counter(operators(model))["DequantizeLinear"] == 3
    for result, expected in zip(run(model, **feeds), before, strict=True):
        np.testing.assert_array_equal(result, expected)


def test_convolutions_are_always_pairs():
    body = """g (float[2,3,4,4] sample, float[2] timestep) => (float[2,4,4,4] y) {
        y = trtq.LowBitConv2d <name = "a", strides = [1, 1], pads = [0, 0, 0, 0],
            dilations = [1, 1], group = 1> (sample) }"""
    model = parse(body)
    layers = {"a": low_bit(8, (4, 3, 1, 1), largest=127)}
    ExpandLowBitToQdq(layers, TimestepTable([1, 501]))(model)
    pairs = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert [len(node.inputs) for node in pairs] == [3, 2]
