"""Each graph rewrite fires where it should and nowhere else, and does not change the numbers."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers.models.embeddings import Timesteps

from trtq.errors import LegalityError
from trtq.exporter.trace import trace_module
from trtq.graph.passes import (
    BreakUniformScales,
    BroadcastTimestep,
    CastFloat64ToFloat32,
    CastLayerNormToFloat64,
    CastsToQdq,
    DecomposeGroupNorm,
    DecomposeSilu,
    DecomposeTimestepEmbedding,
    DropNoopSqueeze,
    ExpandLowBitToQdq,
    FuseGroupNorm,
    MatMulToConv,
    WideProductsToFloat,
    WideWeightsToFloat,
)
from trtq.quant import TimestepTable
from trtq.quant.deployed import ActivationTensors, LayerTensors
from trtq.quant.exact import DeployedLayerNorm, DeployedTimesteps
from trtq.quant.packing import PackedWeight

HEAD = '<ir_version: 10, opset_import: ["" : 21, "trtq" : 1]>'


def parse(body, **initializers):
    proto = onnx.parser.parse_model(f"{HEAD}\n{body}")
    for name, array in initializers.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model, **feeds):
    """Without onnxruntime's own rewrites: those of version 1.24 turn transposed int8 weights into
    zeros."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def operators(model):
    return [node.op_type for node in model.graph]


X = np.linspace(-9, 9, 2 * 6 * 4, dtype=np.float32).reshape(2, 6, 2, 2)


@pytest.mark.parametrize("order", ["x, gate", "gate, x"])
def test_silu_is_decomposed(order):
    body = f"g (float[2,6,2,2] x) => (float[2,6,2,2] y) {{ gate = Sigmoid(x) y = Mul({order}) }}"
    model = parse(body)
    before = run(model, x=X)
    assert DecomposeSilu()(model).modified
    assert "Sigmoid" not in operators(model)
    np.testing.assert_allclose(run(model, x=X)[0], before[0], rtol=1e-6, atol=1e-6)
    assert not DecomposeSilu()(model).modified


@pytest.mark.parametrize(
    "body",
    [
        "g (float[2,6,2,2] x, float[2,6,2,2] z) => (float[2,6,2,2] y) { gate = Sigmoid(z) "
        "y = Mul(x, gate) }",
        "g (float16[2] x) => (float16[2] y) { gate = Sigmoid(x) y = Mul(x, gate) }",
        "g (float[2] x) => (float[2] y) { y = Mul(x, x) }",
    ],
    ids=["gate of another value", "half precision", "square"],
)
def test_other_products_than_silu_stay(body):
    model = parse(body)
    before = operators(model)
    assert not DecomposeSilu()(model).modified
    assert operators(model) == before


def test_a_sigmoid_that_others_use_stays():
    body = (
        "g (float[2] x) => (float[2] y, float[2] z) { gate = Sigmoid(x) y = Mul(x, gate) "
        "z = Neg(gate) }"
    )
    model = parse(body)
    assert DecomposeSilu()(model).modified
    assert operators(model).count("Sigmoid") == 1


GROUP_NORM = (
    "g (float[2,6,2,2] x) => (float[2,6,2,2] y) "
    "{ y = GroupNormalization <num_groups = 3, epsilon = 0.001> (x, scale, shift) }"
)
AFFINE = {
    "scale": np.arange(6, dtype=np.float32) / 3,
    "shift": np.arange(6, dtype=np.float32) - 2,
}


def test_group_norm_is_decomposed_in_float64():
    model = parse(GROUP_NORM, **AFFINE)
    before = run(model, x=X)
    assert DecomposeGroupNorm()(model).modified
    assert "GroupNormalization" not in operators(model)
    np.testing.assert_allclose(run(model, x=X)[0], before[0], rtol=1e-4, atol=1e-5)
    assert not DecomposeGroupNorm()(model).modified


def test_a_decomposed_group_norm_is_one_operator_again():
    model = parse(GROUP_NORM, **AFFINE)
    DecomposeGroupNorm()(model)
    before = run(model, x=X)
    assert FuseGroupNorm()(model).modified
    kept = {"Reshape", "InstanceNormalization", "Shape", "Mul", "Add"}
    assert set(operators(model)) == kept
    np.testing.assert_allclose(run(model, x=X)[0], before[0], rtol=1e-4, atol=1e-5)
    assert not FuseGroupNorm()(model).modified


def test_other_statistics_than_group_norm_stay():
    body = (
        "g (float[2,3] x) => (float[2,3] y) { mean = ReduceMean(x, axis) moved = Sub(x, mean) "
        "spread = Sqrt(guard) inverse = Reciprocal(spread) y = Mul(moved, inverse) }"
    )
    model = parse(body, axis=np.array([1], np.int64), guard=np.array([2], np.float32))
    assert not FuseGroupNorm()(model).modified


LAYER_NORM = (
    "g (float[B,7,96] x) => (float[B,7,96] y) "
    "{{ y = LayerNormalization <axis = -1, epsilon = 0.00001> ({}) }}"
)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norms_are_the_same_bits_in_torch_and_in_the_graph(affine):
    source = torch.nn.LayerNorm(96, elementwise_affine=affine)
    scale, inputs = {"scale": np.ones(96, np.float32)}, "x, scale"
    if affine:
        with torch.no_grad():
            source.weight.copy_(torch.linspace(-2, 3, 96))
            source.bias.copy_(torch.linspace(5, -1, 96))
        scale, inputs = {k: v.numpy() for k, v in source.state_dict().items()}, "x, weight, bias"
    model = parse(LAYER_NORM.format(inputs), **scale)
    assert CastLayerNormToFloat64()(model).modified
    assert operators(model) == ["Cast", "LayerNormalization", "Cast"]
    assert not CastLayerNormToFloat64()(model).modified
    x = torch.randn(50, 7, 96, generator=torch.Generator().manual_seed(0)) * 3 + 1
    with torch.no_grad():
        deployed = DeployedLayerNorm(source)(x).numpy()
        plain = source(x).numpy()
    np.testing.assert_array_equal(run(model, x=x.numpy())[0], deployed)
    np.testing.assert_allclose(deployed, plain, rtol=1e-4, atol=1e-5)
    assert CastFloat64ToFloat32()(model).modified
    np.testing.assert_allclose(run(model, x=x.numpy())[0], plain, rtol=1e-4, atol=1e-5)


def test_doubles_are_cast_to_float():
    model = parse(GROUP_NORM, **AFFINE)
    DecomposeGroupNorm()(model)
    before = run(model, x=X)
    assert CastFloat64ToFloat32()(model).modified
    types = {value.dtype for node in model.graph for value in node.outputs}
    types |= {value.dtype for value in model.graph.initializers.values()}
    assert ir.DataType.DOUBLE not in types
    np.testing.assert_allclose(run(model, x=X)[0], before[0], rtol=1e-4, atol=1e-5)
    assert not CastFloat64ToFloat32()(model).modified


def test_one_timestep_serves_the_batch():
    body = "g (float[batch,3] sample, float[batch] timestep) => (float[batch,3] y) {{ {} }}"
    shaped = "column = Unsqueeze(timestep, axis) y = Add(sample, column)"
    model = parse(body.format(shaped), axis=np.array([1], np.int64))
    assert BroadcastTimestep()(model).modified
    sample = np.zeros((4, 3), np.float32)
    for timestep in (np.array([7], np.float32), np.full(4, 7, np.float32)):
        assert (run(model, sample=sample, timestep=timestep)[0] == 7).all()
    assert not BroadcastTimestep()(model).modified


WEIGHT = (
    "g (float[2,3] x) => (float[2,4] y) {{ w = DequantizeLinear <axis = 1> ({}) y = MatMul(x, w) }}"
)


def integers(largest):
    return np.array([[largest, -5, 3, 1]] * 3, np.int8)


def test_weights_beyond_pair_safe_become_float_and_others_stay():
    ones, x = np.ones(4, np.float32), np.ones((2, 3), np.float32)
    model = parse(WEIGHT.format("q, unit"), q=integers(100), unit=ones)
    before = run(model, x=x)
    assert WideWeightsToFloat()(model).modified
    assert operators(model) == ["Cast", "MatMul"]
    np.testing.assert_array_equal(run(model, x=x)[0], before[0])
    model = parse(WEIGHT.format("q, unit"), q=integers(64), unit=ones)
    assert not WideWeightsToFloat()(model).modified
    assert operators(model) == ["DequantizeLinear", "MatMul"]


def test_weights_beyond_pair_safe_with_their_own_scale_are_refused():
    model = parse(WEIGHT.format("q, half"), q=integers(100), half=np.full(4, 0.5, np.float32))
    with pytest.raises(LegalityError, match="scaled before its product"):
        WideWeightsToFloat()(model)


SEQUENCE = """g (int8[2,5,3] k) => (float[2,5,4] y) {{
    x = DequantizeLinear(k, unit) {codes} w = DequantizeLinear <axis = 1> ({weight}, one)
    y = MatMul(x, w) }}"""


@pytest.mark.parametrize(
    "codes", ["", "wide = Cast <to = 3> (q) shifted = Sub(wide, zero)"], ids=["int8", "int4"]
)
def test_products_of_sequences_become_convolutions_of_the_same_numbers(codes):
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
def test_unequal_scales_change_no_digit(sequence):
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


def test_products_without_a_sequence_or_of_two_activations_stay():
    model = parse(WEIGHT.format("q, unit"), q=integers(64), unit=np.ones(4, np.float32))
    assert not MatMulToConv()(model).modified
    model = parse(PRODUCT.format(**PAIRS), **UNIT)
    assert not MatMulToConv()(model).modified


def test_a_low_bit_node_without_numbers_is_refused_and_a_graph_without_nodes_stays():
    body = (
        "g (float[2,3] sample, float[2] timestep) => (float[2,4] y) "
        '{ y = trtq.LowBitLinear <name = "a"> (sample) }'
    )
    with pytest.raises(LegalityError, match="'a' without its numbers"):
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


def test_pairs_and_constant_weights_stay_integer():
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


def test_casts_of_values_that_are_not_codes_stay():
    body = """g (int8[2,3] a) => (float[2,4] y) {
        x = Cast <to = 1> (a) w = Cast <to = 1> (q) y = MatMul(x, w) }"""
    model = parse(body, q=integers(100))
    assert not CastsToQdq()(model).modified
    assert operators(model) == ["Cast", "Cast", "MatMul"]


def low_bit(bits, shape=(4, 3), largest=None):
    """Tensors of a layer; `largest` is its largest integer."""
    middle = 2 ** (bits - 1)
    codes = (middle + torch.arange(int(np.prod(shape))).reshape(shape) % 7 - 3).to(torch.uint8)
    if largest is not None:
        codes[0] = middle + largest
    each = (shape[0], *[1] * (len(shape) - 1))
    weight = PackedWeight(codes, torch.full(each, 0.5), torch.full(each, float(middle)), bits)
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
def test_products_that_could_saturate_cast_their_codes_and_so_do_all_that_share_them(a, b, casts):
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


@pytest.mark.parametrize("operator", ["Sin", "Cos"])
@pytest.mark.parametrize("kind", ["float", "double"])
def test_angles_are_right_after_a_thousand_turns(operator, kind):
    model = parse(f"g ({kind}[4000] x) => ({kind}[4000] y) {{ y = {operator}(x) }}")
    assert DecomposeTimestepEmbedding()(model).modified
    dtype = np.float32 if kind == "float" else np.float64
    angles = np.linspace(-7000, 7000, 4000).astype(dtype)
    exact = np.sin(angles.astype(np.float64)) if operator == "Sin" else np.cos(angles.astype(float))
    result = run(model, x=angles)[0]
    # Multiples of 2 pi lose 1e-16 of 7000, the series 1e-13; rounded to float32 the result is exact.
    np.testing.assert_allclose(
        result, exact.astype(dtype), rtol=0, atol=0 if kind == "float" else 3e-12
    )
    assert not DecomposeTimestepEmbedding()(model).modified


def test_angles_in_half_precision_stay():
    model = parse("g (float16[4] x) => (float16[4] y) { y = Cos(x) }")
    assert not DecomposeTimestepEmbedding()(model).modified


@pytest.mark.parametrize(("shape", "exact"), [("2,6,2,2", False), ("8,6", True)])
def test_silu_of_an_embedding_is_rounded_from_double(shape, exact):
    body = f"g (float[{shape}] x) => (float[{shape}] y) {{ gate = Sigmoid(x) y = Mul(x, gate) }}"
    model = parse(body)
    assert DecomposeSilu()(model).modified
    assert ("Cast" in operators(model)) is exact
    x = X.reshape([int(size) for size in shape.split(",")])
    wide = x.astype(np.float64)
    if exact:
        np.testing.assert_array_equal(
            run(model, x=x)[0], (wide / (1 + np.exp(-wide))).astype(np.float32)
        )


@pytest.mark.parametrize(
    ("shape", "modified"), [("2,3,4", True), ("2,1,4", False), ("2,n,4", False)]
)
def test_a_squeeze_of_a_long_axis_is_dropped(shape, modified):
    body = f"g (float[{shape}] x) => (y) <int64[1] axis = {{1}}> {{ y = Squeeze(x, axis) }}"
    model = ir.from_proto(onnx.parser.parse_model(f"{HEAD}\n{body}"))
    assert DropNoopSqueeze()(model).modified == modified
    assert ("Squeeze" not in operators(model)) == modified


@pytest.mark.parametrize(
    ("channels", "flip", "shift"), [(66, True, 0), (66, False, 1), (67, True, 1)]
)
def test_time_embeddings_are_the_same_bits_in_torch_and_in_the_graph(channels, flip, shift):
    """One value on a rounding tie would change all images of a step."""
    source = Timesteps(channels, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    module = DeployedTimesteps(source)
    model = trace_module(module, {"timestep": torch.zeros(2)}, ["embedding"])
    assert DecomposeTimestepEmbedding()(model).modified
    timesteps = torch.arange(1000, dtype=torch.float32)
    result = run(model, timestep=timesteps.numpy())[0]
    np.testing.assert_array_equal(result, module(timesteps).numpy())
    # diffusers' own frequencies differ by a last bit or two, multiplied by a thousand radians.
    np.testing.assert_allclose(result, source(timesteps).numpy(), rtol=0, atol=1000 * 2.0**-22)
