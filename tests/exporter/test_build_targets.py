"""The planned precision of a build's layers follows from the graph that the builder gets."""

from tests.graph.text import parse
from trtq.artefact.manifest_rows import LayerRow
from trtq.exporter.build_targets import planned_precisions


def row(name, **changes):
    bits = {"weight_bits": 4, "activation_bits": 8}
    return LayerRow(name=name, kind="linear", reason="r", **bits | changes)


def test_layers_whose_result_the_model_does_not_use_are_not_planned():
    model = parse("g (float[B] x) => (float[B] z) { y = Abs(x) z = Neg(y) }")
    for node, name in zip(model.graph, ("used/matmul", "twice/call_2/matmul"), strict=True):
        node.name = name
    rows = [
        row("used"),
        row("twice"),
        row("unused"),
        row("float", weight_bits=None, activation_bits=None),
    ]
    assert planned_precisions(rows, model, []) == {"used": "INT8", "twice": "INT8"}
