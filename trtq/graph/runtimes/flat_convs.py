"""Gives one-dimensional low-bit convolutions a second spatial axis, for TensorRT.

1. `Conv(DequantizeLinear(codes[B, C, L]), DequantizeLinear(W[O, C, K]))` becomes a Conv of `codes[B, C,
   1, L]` with `W[O, C, 1, K]`, followed by a Squeeze.

TensorRT's parser adds this axis itself, but behind the DequantizeLinear, where it separates the pair
from the convolution. The integers and hence the result are the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["FlatConvs"]

_AXIS = 2
_DEFAULTS = {"strides": 1, "dilations": 1}


class FlatConvs(ir.passes.InPlacePass):
    """Replace one-dimensional convolutions, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every Conv of quantised inputs of rank 3 with a quantised weight."""
        graph = model.graph
        modified = False
        for node in [n for n in graph if n.op_type == "Conv" and n.domain == ""]:
            pairs = [_pair(value) for value in node.inputs[:2]]
            if None in pairs or _rank(pairs[1]) != 3:
                continue
            build = GraphBuilder(graph, f"{node.name}/flat")
            axis = build.constant("axis", np.array([_AXIS], np.int64))
            operands = [
                _flat(build, pair, axis, what) for pair, what in zip(pairs, "xw", strict=True)
            ]
            conv = build.op("Conv", [*operands, *node.inputs[2:]], "image", _attributes(node))
            # The convolution keeps its name, by which builders report it.
            conv.producer().name, node.name = node.name, f"{node.name}/replaced"
            y = build.op("Squeeze", [conv, axis], "sequence")
            (out,) = node.outputs
            y.shape, y.type = out.shape, out.type
            ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, [out], [y])
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _pair(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes a value; None if another operator makes it."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _rank(pair: ir.Node | None) -> int | None:
    """Number of axes of a DequantizeLinear's codes; None if it is unknown."""
    codes = None if pair is None else pair.inputs[0]
    return None if codes is None or codes.shape is None else len(codes.shape)


def _flat(build: GraphBuilder, pair: ir.Node | None, axis: ir.Value, what: str) -> ir.Value:
    """The output of a DequantizeLinear whose codes have one more axis."""
    assert pair is not None
    codes, *scales = pair.inputs
    assert codes is not None
    if codes.const_value is None:
        flat = build.op("Unsqueeze", [codes, axis], f"{what}_codes")
    else:
        values = np.expand_dims(codes.const_value.numpy(), _AXIS)
        flat = build.constant(f"{what}_codes", values)
    attributes = {name: each.value for name, each in pair.attributes.items()}
    out: ir.Value = build.op("DequantizeLinear", [flat, *scales], what, attributes)
    return out


def _attributes(node: ir.Node) -> dict[str, object]:
    """The attributes of a convolution with one more spatial axis before the others."""
    attributes: dict[str, object] = {name: each.value for name, each in node.attributes.items()}
    for name, default in _DEFAULTS.items():
        if name in node.attributes:
            attributes[name] = [default, *node.attributes[name].as_ints()]
    if "kernel_shape" in node.attributes:
        attributes["kernel_shape"] = [1, *node.attributes["kernel_shape"].as_ints()]
    if "pads" in node.attributes:
        before, after = node.attributes["pads"].as_ints()
        attributes["pads"] = [0, before, 0, after]
    return attributes
