"""Fusing plugin nodes: where it fires, where it must not, and that results stay equal."""

import numpy as np
import onnx_ir as ir
import pytest

from tests.graph.plugin_evaluator import evaluate
from tests.graph.test_low_bit_layers import PER_CALL, TABLE, low_bit
from tests.graph.text import operators, parse
from trtq.graph.passes import DecomposeGroupNorm, DecomposeSilu, LowBitToPlugins
from trtq.graph.passes.plugin_nodes import TIMESTEPS_KEY
from trtq.graph.runtimes.float64_to_float32 import CastFloat64ToFloat32
from trtq.graph.runtimes.fuse_group_norm import FuseGroupNorm
from trtq.graph.runtimes.fuse_plugins import FUSIONS, FuseEpilogues, FusePrologues, FuseTransposes
from trtq.graph.runtimes.fused_nodes import plugin_nodes
from trtq.graph.runtimes.merge_layers import MergeLayers
from trtq.graph.runtimes.prepare import prepare

RNG = np.random.default_rng(7)
CONSTANTS = {
    "factor": RNG.uniform(0.5, 2, 8).astype(np.float32),
    "factor4": RNG.uniform(0.5, 2, (1, 8, 1, 1)).astype(np.float32),
    "scale": RNG.uniform(0.5, 2, 8).astype(np.float32),
    "shift": RNG.standard_normal(8).astype(np.float32),
    "axes": np.array([2, 3]),
    "joined": np.array([0, 0, 8]),
}
ROWS, IMAGES = "float[2,3,8]", "float[2,8,4,4]"
SAME = "strides = [1, 1], pads = [1, 1, 1, 1], dilations = [1, 1], group = 1"


def linear(out, source, name="a"):
    return f'{out} = trtq.LowBitLinear <name = "{name}"> ({source})'


def conv(out, source, name="c"):
    return f'{out} = trtq.LowBitConv2d <name = "{name}", {SAME}> ({source})'


LAYERS = {
    "a": low_bit((8, 8)),
    "b": low_bit((6, 8)),
    "other": low_bit((8, 8), seed=1),
    "c": low_bit((8, 8, 3, 3)),
    "w8": low_bit((8, 8), bits=8),
}


def graph(inputs, outputs, body):
    """A plugin graph in the form that a builder gets, before anything is fused.

    The values h, g and q have the shape of the first output; a tracer knows all shapes.
    """
    kind = outputs.partition("]")[0] + "]"
    kind = IMAGES if "LowBitConv2d" in body else kind
    inner = [name for name in "hgq" if f"{name} = trtq" in body or f" {name} = Add" in body]
    inside = f"<{', '.join(f'{kind} {name}' for name in inner if f' {name}' not in outputs)}>"
    inside = "" if inside == "<>" else inside
    text = f"g ({inputs}, float[1] t) => ({outputs}) {inside} {{ {body} }}"
    used = {name: data for name, data in CONSTANTS.items() if name in body}
    model = parse(text, **used)
    DecomposeGroupNorm()(model)
    DecomposeSilu()(model)
    LowBitToPlugins(LAYERS, TABLE, PER_CALL)(model)
    model.metadata_props[TIMESTEPS_KEY] = "[1.0, 501.0, 901.0]"
    FuseGroupNorm()(model)
    CastFloat64ToFloat32()(model)
    return model


def feeds(model):
    rng = np.random.default_rng(3)
    values = {
        value.name: rng.standard_normal([int(size) for size in value.shape]).astype(np.float32)
        for value in model.graph.inputs
    }
    return values | {"t": np.array([700], np.float32)}


def outputs_before_and_after(model, *fusions):
    """Results, and whether each pass changed the graph."""
    given = feeds(model)
    before = evaluate(model, given)
    modified = [bool(fusion()(model).modified) for fusion in fusions]
    return before, evaluate(model, given), modified


def only_fusion(model):
    (plugin,) = plugin_nodes(model.graph)
    return plugin.fusion


def test_layers_with_one_input_and_equal_tables_become_one():
    body = "; ".join([linear("y", "x"), linear("z", "x", "b"), linear("w", "x", "other")])
    model = graph(f"{ROWS} x", f"{ROWS} y, float[2,3,6] z, {ROWS} w", body.replace(";", ""))
    before, after, modified = outputs_before_and_after(model, MergeLayers)
    assert modified == [True]
    names = [plugin.node.name for plugin in plugin_nodes(model.graph)]
    assert sorted(names) == ["a+b/plugin", "other/plugin"], "other tables stay apart"
    assert operators(model).count("Split") == 1
    assert all(np.array_equal(first, second) for first, second in zip(before, after, strict=True))


def test_layers_of_other_widths_or_inputs_are_not_merged():
    body = " ".join([linear("y", "x"), linear("z", "x", "w8"), linear("w", "v", "b")])
    model = graph(f"{ROWS} x, {ROWS} v", f"{ROWS} y, {ROWS} z, float[2,3,6] w", body)
    assert not MergeLayers()(model).modified


def test_names_of_merged_layers_stay_within_the_builders_limit(monkeypatch):
    monkeypatch.setattr("trtq.graph.runtimes.merge_layers._MAX_NAME", 4)
    body = " ".join([linear("y", "x"), linear("z", "x", "b"), linear("w", "x")])
    model = graph(f"{ROWS} x", f"{ROWS} y, float[2,3,6] z, {ROWS} w", body)
    assert MergeLayers()(model).modified
    assert [plugin.node.name for plugin in plugin_nodes(model.graph)] == [
        "a+b/plugin",
        "a/call_2/plugin",
    ]


EPILOGUES = {
    "residual": f"{linear('h', 'x')} y = Add(h, r)",
    "residual first": f"{linear('h', 'x')} y = Add(r, h)",
    "SiLU": f"{linear('h', 'x')} s = Sigmoid(h) y = Mul(h, s)",
    "both": f"{linear('h', 'x')} g = Add(h, r) s = Sigmoid(g) y = Mul(g, s)",
}


@pytest.mark.parametrize("name", EPILOGUES)
def test_what_follows_a_layer_goes_into_it(name):
    model = graph(f"{ROWS} x, {ROWS} r", f"{ROWS} y", EPILOGUES[name])
    before, after, modified = outputs_before_and_after(model, FuseEpilogues)
    fusion = only_fusion(model)
    assert modified == [True]
    assert (fusion.residual, fusion.silu) == ("SiLU" not in name, name in ("SiLU", "both"))
    assert not {"Add", "Div", "Exp", "Mul", "Sigmoid"} & set(operators(model))
    # The exponential differs in its last bits.
    np.testing.assert_allclose(after[0], before[0], rtol=0 if "residual" in name else 1e-6)


NO_EPILOGUES = {
    "another reader": (f"{linear('h', 'x')} y = Add(h, r) z = Neg(h)", f"{ROWS} y, {ROWS} z"),
    "an output": (f"{linear('h', 'x')} y = Add(h, r)", f"{ROWS} y, {ROWS} h"),
    "a broadcast": (f"{linear('h', 'x')} y = Add(h, row)", f"{ROWS} y"),
    "itself": (f"{linear('h', 'x')} y = Add(h, h)", f"{ROWS} y"),
    "a reader within SiLU": (
        f"{linear('h', 'x')} s = Sigmoid(h) y = Mul(h, s) z = Neg(s)",
        f"{ROWS} y, {ROWS} z",
    ),
}


@pytest.mark.parametrize("name", NO_EPILOGUES)
def test_what_others_need_stays(name):
    body, outputs = NO_EPILOGUES[name]
    model = graph(f"{ROWS} x, {ROWS} r, float[1,1,8] row", outputs, body)
    assert not FuseEpilogues()(model).modified


def test_of_two_layers_that_are_added_the_later_adds_the_other():
    body = f"{linear('h', 'x')} {linear('g', 'r', 'other')} y = Add(h, g)"
    model = graph(f"{ROWS} x, {ROWS} r", f"{ROWS} y", body)
    before, after, _ = outputs_before_and_after(model, FuseEpilogues)
    first, second = plugin_nodes(model.graph)
    assert (first.fusion.residual, second.fusion.residual) == (False, True)
    assert second.operands["residual"] is first.out
    assert np.array_equal(before[0], after[0])


def test_transposes_around_a_convolution_go():
    body = f"""f = Transpose <perm = [0, 3, 1, 2]> (x) m = Mul(f, factor4) {conv("h", "m")}
        y = Transpose <perm = [0, 2, 3, 1]> (h)"""
    model = graph("float[2,4,4,8] x", "float[2,4,4,8] y", body)
    before, after, modified = outputs_before_and_after(model, FuseTransposes)
    fusion = only_fusion(model)
    assert modified == [True]
    assert (fusion.x_last, fusion.out_last, fusion.affine) == (True, True, True)
    assert not {"Transpose", "Mul"} & set(operators(model))
    assert np.array_equal(before[0], after[0])


def test_other_transposes_stay():
    body = f"f = Transpose <perm = [0, 1, 3, 2]> (x) {conv('y', 'f')}"
    model = graph(f"{IMAGES} x", f"{IMAGES} y", body)
    assert not FuseTransposes()(model).modified


NORM = "LayerNormalization <axis = -1, epsilon = 1e-5>"
PROLOGUES = {
    "layer norm": f"n = {NORM} (x, scale, shift) {linear('y', 'n')}",
    "layer norm, factor": f"n = {NORM} (x, scale, shift) m = Mul(n, factor) {linear('y', 'm')}",
    "layer norm, SiLU": f"n = {NORM} (x, scale, shift) s = Sigmoid(n) m = Mul(n, s) {linear('y', 'm')}",
    "factor": f"m = Mul(x, factor) {linear('y', 'm')}",
    "SiLU": f"s = Sigmoid(x) m = Mul(x, s) {linear('y', 'm')}",
}


@pytest.mark.parametrize("name", PROLOGUES)
def test_what_precedes_a_linear_layer_goes_into_it(name):
    model = graph(f"{ROWS} x", f"{ROWS} y", PROLOGUES[name])
    before, after, modified = outputs_before_and_after(model, FusePrologues)
    assert modified == [True]
    fusion = only_fusion(model)
    assert (fusion.norm == "layer", fusion.activated) == ("norm" in name, "SiLU" in name)
    assert not {"LayerNormalization", "Mul", "Div", "Exp"} & set(operators(model))
    # No value of this draw lies within its last bits of a tie, and the product is one of integers.
    np.testing.assert_array_equal(after[0], before[0])


def test_a_gated_value_goes_into_its_layer():
    body = f"v, g = Split <axis = -1, num_outputs = 2> (x) e = Gelu(g) m = Mul(v, e) {linear('y', 'm')}"
    model = graph("float[2,3,16] x", f"{ROWS} y", body)
    before, after, modified = outputs_before_and_after(model, FusePrologues)
    assert modified == [True]
    assert only_fusion(model).norm == "gated"
    assert not {"Split", "Gelu", "Mul"} & set(operators(model))
    np.testing.assert_array_equal(after[0], before[0])


def test_joined_heads_go_into_their_layer():
    body = f"j = Transpose <perm = [0, 2, 1, 3]> (x) f = Reshape(j, joined) {linear('y', 'f')}"
    model = graph("float[2,4,3,2] x", f"{ROWS} y", body)
    before, after, modified = outputs_before_and_after(model, FusePrologues)
    assert modified == [True]
    assert only_fusion(model).heads == 4
    assert np.array_equal(before[0], after[0])


GROUP = "GroupNormalization <num_groups = 2, epsilon = 1e-5>"


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("activated", [False, True])
def test_a_group_norm_goes_into_its_convolution(shifted, activated):
    body = "u = Unsqueeze(e, axes) k = Add(x, u) " if shifted else "k = Identity(x) "
    body += f"n = {GROUP} (k, scale, shift) "
    body += "s = Sigmoid(n) m = Mul(n, s) " if activated else "m = Identity(n) "
    model = graph(f"{IMAGES} x, float[2,8] e", f"{IMAGES} y", body + conv("y", "m"))
    for node in [node for node in model.graph if node.op_type == "Identity"]:
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [], node.outputs, [node.inputs[0]]
        )
    before, after, modified = outputs_before_and_after(model, FusePrologues)
    assert modified == [True]
    fusion = only_fusion(model)
    assert (fusion.norm, fusion.norm_groups) == ("group", 2)
    assert (fusion.image_shift, fusion.activated) == (shifted, activated)
    assert not {"InstanceNormalization", "Unsqueeze", "Exp"} & set(operators(model))
    np.testing.assert_array_equal(after[0], before[0])


NO_PROLOGUES = {
    "another reader": (f"n = {NORM} (x, scale, shift) {linear('y', 'n')} z = Neg(n)", ROWS),
    "another axis": (
        f"n = LayerNormalization <axis = 1> (x, all) {linear('y', 'n')} z = Neg(x)",
        ROWS,
    ),
    "a scale that is computed": (f"n = {NORM} (x, e) {linear('y', 'n')} z = Neg(x)", ROWS),
}


@pytest.mark.parametrize("name", NO_PROLOGUES)
def test_norms_that_others_need_or_no_kernel_has_stay(name):
    body, kind = NO_PROLOGUES[name]
    model = graph(f"{kind} x, float[8] e, float[3,8] all", f"{kind} y, {kind} z", body)
    assert not FusePrologues()(model).modified
    assert "LayerNormalization" in operators(model)


def test_only_tensorrt_rtx_gets_fused_nodes():
    body = f"n = {NORM} (x, scale, shift) {linear('h', 'n')} y = Add(h, x)"
    fused = prepare(graph(f"{ROWS} x", f"{ROWS} y", body), "tensorrt-rtx")
    assert operators(fused).count("FusedLinear") == 1
    assert {"Add", "LayerNormalization"}.isdisjoint(operators(fused))
    for runtime, options in (("tensorrt", {}), ("tensorrt-rtx", {"fuse": False})):
        plain = prepare(graph(f"{ROWS} x", f"{ROWS} y", body), runtime, **options)
        assert {"LowBitLinear", "Add", "LayerNormalization"} <= set(operators(plain))
    pairs = prepare(graph(f"{ROWS} x", f"{ROWS} y", body), "onnxruntime")
    assert {"QuantizeLinear", "LayerNormalization"} <= set(operators(pairs))


def test_all_fusions_together_keep_the_results():
    body = f"""n = {NORM} (x, scale, shift) {linear("q", "n")} {linear("k", "n", "b")}
        {linear("h", "q", "other")} y = Add(h, x)"""
    model = graph(f"{ROWS} x", f"{ROWS} y, float[2,3,6] k", body)
    before, after, modified = outputs_before_and_after(model, *FUSIONS)
    assert modified == [True, False, True, True]
    for first, second in zip(before, after, strict=True):
        np.testing.assert_array_equal(first, second)
