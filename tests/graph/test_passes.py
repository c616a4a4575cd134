"""Each graph rewrite fires where it should and nowhere else, and does not change the results."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from diffusers.models.embeddings import Timesteps

from tests.graph.text import HEAD, operators, parse, run
from trtq.exporter.trace import trace_module
from trtq.graph.passes import (
    BooleanWhere,
    BroadcastTimestep,
    CastIndicesToInt64,
    CastLayerNormToFloat64,
    DecomposeGroupNorm,
    DecomposeSilu,
    DecomposeTimestepEmbedding,
    DropNoopArithmetic,
    DropNoopSqueeze,
)
from trtq.graph.runtimes.float64_to_float32 import CastFloat64ToFloat32
from trtq.graph.runtimes.fuse_group_norm import FuseGroupNorm
from trtq.quant.exact import DeployedLayerNorm, DeployedTimesteps

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
def test_products_other_than_silu_do_not_change(body):
    model = parse(body)
    before = operators(model)
    assert not DecomposeSilu()(model).modified
    assert operators(model) == before


def test_a_sigmoid_with_other_uses_is_kept():
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


def test_a_group_norm_whose_scale_and_shift_are_computed_is_decomposed():
    body = """g (float[2,6,2,2] x, float[6] gate) => (float[2,6,2,2] y) {
        scale = Add(gate, gate) shift = Neg(gate)
        y = GroupNormalization <num_groups = 3, epsilon = 0.001> (x, scale, shift) }"""
    model = parse(body)
    feeds = {"x": X, "gate": np.arange(6, dtype=np.float32)}
    before = run(model, **feeds)
    assert DecomposeGroupNorm()(model).modified
    assert "GroupNormalization" not in operators(model)
    np.testing.assert_allclose(run(model, **feeds)[0], before[0], rtol=1e-4, atol=1e-5)


def test_where_of_booleans_becomes_logical_operators():
    body = "g (bool[8] c, bool[8] x, bool[8] y) => (bool[8] z) { z = Where(c, x, y) }"
    model = parse(body)
    assert BooleanWhere()(model).modified
    assert sorted(operators(model)) == ["And", "And", "Not", "Or"]
    c, x, y = ((np.arange(8) >> bit & 1).astype(bool) for bit in range(3))
    np.testing.assert_array_equal(run(model, c=c, x=x, y=y)[0], np.where(c, x, y))
    assert not BooleanWhere()(model).modified
    body = "g (bool[8] c, float[8] x, float[8] y) => (float[8] z) { z = Where(c, x, y) }"
    assert not BooleanWhere()(parse(body)).modified


def test_indices_of_other_types_are_cast_to_int64():
    body = """g (float[4,3] x, int32[2,1] rows) => (float[2,3] y) {
        y = GatherND(x, rows) }"""
    model = parse(body)
    assert CastIndicesToInt64()(model).modified
    x, rows = X.reshape(-1)[:12].reshape(4, 3), np.array([[3], [1]], np.int32)
    np.testing.assert_array_equal(run(model, x=x, rows=rows)[0], x[[3, 1]])
    assert not CastIndicesToInt64()(model).modified


def test_a_decomposed_group_norm_is_fused_to_one_operator():
    model = parse(GROUP_NORM, **AFFINE)
    DecomposeGroupNorm()(model)
    before = run(model, x=X)
    assert FuseGroupNorm()(model).modified
    kept = {"Reshape", "InstanceNormalization", "Shape", "Mul", "Add"}
    assert set(operators(model)) == kept
    np.testing.assert_allclose(run(model, x=X)[0], before[0], rtol=1e-4, atol=1e-5)
    assert not FuseGroupNorm()(model).modified


def test_statistics_other_than_group_norm_do_not_change():
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
def test_layer_norms_are_bit_identical_in_torch_and_in_the_graph(affine):
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


def test_float64_is_cast_to_float32():
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


@pytest.mark.parametrize("operator", ["Sin", "Cos"])
@pytest.mark.parametrize("kind", ["float", "double"])
def test_angles_are_exact_after_a_thousand_turns(operator, kind):
    model = parse(f"g ({kind}[4000] x) => ({kind}[4000] y) {{ y = {operator}(x) }}")
    assert DecomposeTimestepEmbedding()(model).modified
    dtype = np.float32 if kind == "float" else np.float64
    angles = np.linspace(-7000, 7000, 4000).astype(dtype)
    exact = np.sin(angles.astype(np.float64)) if operator == "Sin" else np.cos(angles.astype(float))
    result = run(model, x=angles)[0]
    # The error is 7000 x 1e-16 from whole turns and 1e-13 from the series, so float32 is exact.
    np.testing.assert_allclose(
        result, exact.astype(dtype), rtol=0, atol=0 if kind == "float" else 3e-12
    )
    assert not DecomposeTimestepEmbedding()(model).modified


def test_angles_in_half_precision_do_not_change():
    model = parse("g (float16[4] x) => (float16[4] y) { y = Cos(x) }")
    assert not DecomposeTimestepEmbedding()(model).modified


@pytest.mark.parametrize(("shape", "exact"), [("2,6,2,2", False), ("8,6", True)])
def test_silu_of_an_embedding_is_rounded_from_float64(shape, exact):
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
    ("body", "kept"),
    [
        ("g (float[2] x) => (float[2] y) <float c = {0}> { y = Add(x, c) }", False),
        ("g (float[2] x) => (float[2] y) <float c = {0}> { y = Add(c, x) }", False),
        ("g (float[2] x) => (float[2] y) <float[1] c = {0}> { y = Sub(x, c) }", False),
        ("g (float[2] x) => (float[2] y) <float c = {1}> { y = Div(x, c) }", False),
        ("g (float[2] x) => (float[2] y) <float c = {1}> { y = Mul(c, x) }", False),
        ("g (float[2] x) => (float[2] y) <float c = {1e-15}> { y = Add(x, c) }", True),
        ("g (float[2] x) => (float[2] y) <float c = {1.000001}> { y = Mul(x, c) }", True),
        ("g (float[2] x) => (float[2] y) <float c = {0}> { y = Sub(c, x) }", True),
        ("g (float[2] x) => (float[2] y) <float c = {1}> { y = Div(c, x) }", True),
        ("g (float[2] x) => (float[1,2] y) <float[1,1] c = {0}> { y = Add(x, c) }", True),
        ("g (float[2] x) => (float[2] y) <float[2] c = {0, 0}> { y = Add(x, c) }", True),
    ],
)
def test_only_arithmetic_that_changes_nothing_is_dropped(body, kept):
    model = parse(body)
    x = np.array([3e-16, -2], np.float32)
    before = run(model, x=x)[0]
    assert DropNoopArithmetic()(model).modified is not kept
    np.testing.assert_array_equal(run(model, x=x)[0], before)
    assert before.shape == run(model, x=x)[0].shape


def test_a_small_term_that_keeps_a_denominator_from_zero_stays_in_the_graph():
    class Normalised(torch.nn.Module):
        def forward(self, x):
            return x / (x.sum(-1, keepdim=True) + 1e-15)

    from trtq.exporter.to_onnx import program_to_onnx
    from trtq.exporter.trace import simplify

    zeros = torch.zeros(1, 4)
    model = program_to_onnx(torch.export.export(Normalised(), (zeros,)), ["x"], ["y"])
    simplify(model)
    np.testing.assert_array_equal(run(model, x=zeros.numpy())[0], zeros.numpy())


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
def test_time_embeddings_are_bit_identical_in_torch_and_in_the_graph(channels, flip, shift):
    """One value on a rounding tie would change all images of a step."""
    source = Timesteps(channels, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    module = DeployedTimesteps(source)
    model = trace_module(module, {"timestep": torch.zeros(2)}, ["embedding"])
    assert DecomposeTimestepEmbedding()(model).modified
    timesteps = torch.arange(1000, dtype=torch.float32)
    result = run(model, timestep=timesteps.numpy())[0]
    np.testing.assert_array_equal(result, module(timesteps).numpy())
    # diffusers' frequencies differ in the last one or two bits, multiplied by a thousand radians.
    np.testing.assert_allclose(result, source(timesteps).numpy(), rtol=0, atol=1000 * 2.0**-22)
