"""Launches of a graph, counted by the rules of `trtq.graph.launches`."""

import json

import onnx_ir as ir
import pytest

from tests.vocabulary import ROOT
from trtq.graph.launches import count_launches
from trtq.graph.runtimes.fuse_plugins import FUSIONS

HEADER = '<ir_version: 10, opset_import: ["" : 20, "trtq" : 1]> g '


def count(signature, body, **options):
    model = ir.from_onnx_text(f"{HEADER}({signature}) => (float[B, 4, 4] y) {{ {body} }}")
    return dict(count_launches(model, **options))


@pytest.mark.parametrize(
    ("body", "launches"),
    [
        ("a = Neg(x) b = Exp(a) y = Add(a, b)", {"pointwise": 1}),
        ("a = Neg(x) b = Flatten(a) c = Exp(b) y = Transpose(c)", {"pointwise": 1}),
        # Neg cannot wait for the Softmax that needs it.
        ("a = Neg(x) b = Softmax(a) y = Add(a, b)", {"pointwise": 2, "softmax": 1}),
        # Nothing between the first and the last pointwise node needs the first.
        ("a = Neg(x) b = Softmax(x) y = Add(a, b)", {"pointwise": 1, "softmax": 1}),
        ("s = Shape(x) t = Cast <to = 7> (s) y = Reshape(x, t)", {}),
        ("y = MatMul(x, x)", {"matmul": 1}),
        ("y = trtq.LowBitLinear(x, x, x, x, x)", {"quantise": 1, "product": 1}),
        (
            "y = trtq.FusedConv2d <norm = [3]> (x, x, x, x, x, x)",
            {"statistics": 1, "quantise": 1, "product": 1},
        ),
        ("y = trtq.FusedLinear <norm = [1]> (x, x, x, x, x, x)", {"quantise": 1, "product": 1}),
        # A part is read in place by pointwise nodes, and copied for others.
        ("a, b = Split <num_outputs = 2> (x) c = Exp(b) y = Mul(a, c)", {"pointwise": 1}),
        (
            "a, b = Split <num_outputs = 2> (x) c = Softmax(b) y = Mul(a, c)",
            {"copy": 1, "pointwise": 1, "softmax": 1},
        ),
        ("a = Cast <to = 1> (x) b = LayerNormalization(a, a) y = Cast <to = 1> (b)", {"norm": 1}),
    ],
)
def test_a_graph_has_the_launches_of_its_parts(body, launches):
    assert count("float[B, 4, 4] x", body) == launches


def test_attention_is_one_launch_if_the_builder_fuses_it():
    body = """q = Transpose(x) k = Neg(x) s = MatMul(q, k) m = Add(s, x) p = Softmax(m)
        v = Exp(x) o = MatMul(p, v) y = Neg(o)"""
    plain = {"pointwise": 5, "matmul": 2, "softmax": 1}
    assert count("float[B, 4, 4] x", body) == plain
    fused = count("float[B, 4, 4] x", body, fused_attention=True)
    assert fused == {"attention": 1, "pointwise": 1}


def test_the_rewrites_remove_two_fifths_of_the_recorded_launches():
    record = json.loads((ROOT / "benchmarks/results/launches.json").read_text())
    first, *others = record["rows"]
    assert [row["rewrite"] for row in others] == [fusion.__name__ for fusion in FUSIONS]
    for key in ("launches", "launches_fused_attention"):
        assert others[-1][key] <= 0.6 * first[key]
    assert all(sum(row["kinds"].values()) == row["launches"] for row in record["rows"])
