"""Merges linear layers that quantise one input with equal tables, e.g. queries, keys and values.

1. Nodes `LowBitLinear(x, ...)` with the same x and step, equal tables and equal widths become one node
   with the output channels of all of them, and a Split. Each output has the same integers and terms as
   before.
2. The name of the node is that of all layers, `A+B/plugin`.

One layer so quantises the input once, and computes one product of all columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder
from trtq.graph.runtimes.fused_nodes import PluginNode, plugin_nodes, shape_ends

__all__ = ["MergeLayers"]

_MAX_NAME = 3000
"""Maximum length of a merged node's name; TensorRT cuts names at 4,096 characters."""


class MergeLayers(ir.passes.InPlacePass):
    """Merge linear layers with one input, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on two or more plugin nodes of linear layers with one input and equal tables."""
        alike: dict[object, list[PluginNode]] = defaultdict(list)
        for plugin in plugin_nodes(model.graph):
            if plugin.node.op_type == "LowBitLinear":
                alike[_key(plugin)].append(plugin)
        modified = False
        for plugins in alike.values():
            for group in _groups(plugins):
                _merge(model.graph, group)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _key(plugin: PluginNode) -> object:
    tables = plugin.operands["tables"].const_value
    layer = plugin.layer
    numbers = plugin.node if tables is None else tables.numpy().tobytes()
    widths = layer.weight_bits, layer.activation_bits, layer.steps
    return plugin.x, _step_key(plugin.operands["step"]), numbers, widths


def _step_key(step: ir.Value) -> object:
    """What is equal for equal steps; a graph with one step per call expands it for each layer."""
    expand = step.producer()
    if expand is None or expand.op_type != "Expand":
        return step
    shape = expand.inputs[1].producer() if expand.inputs[1] is not None else None
    if shape is None or shape.op_type != "Shape":
        return step
    return expand.inputs[0], shape.inputs[0], shape_ends(shape)


def _groups(plugins: Sequence[PluginNode]) -> list[list[PluginNode]]:
    """Groups of two or more nodes whose names together are not too long."""
    groups: list[list[PluginNode]] = [[]]
    for plugin in plugins:
        if sum(len(_layers(other)) + 1 for other in [*groups[-1], plugin]) > _MAX_NAME:
            groups.append([])
        groups[-1].append(plugin)
    return [group for group in groups if len(group) > 1]


def _layers(plugin: PluginNode) -> str:
    return (plugin.node.name or "").rpartition("/")[0]


def _merge(graph: ir.Graph, plugins: Sequence[PluginNode]) -> None:
    first = plugins[0]
    names = "+".join(map(_layers, plugins))
    sizes = [plugin.layer.out_channels for plugin in plugins]
    layer = replace(first.layer, out_channels=sum(sizes))
    build = GraphBuilder(graph, names, shared=f"{_layers(first)}/merged")

    def stacked(key: str, axis: int) -> np.ndarray:
        stored = [plugin.operands[key].const_value for plugin in plugins]
        return np.concatenate([tensor.numpy() for tensor in stored if tensor is not None], axis)

    weight = build.weight(
        "weight", lambda: stacked("weight", 0), layer.weight_shape(), ir.DataType.INT8
    )
    terms = build.constant("terms", stacked("terms", 1))
    split = build.constant("split", np.array(sizes, np.int64))
    operands = {**first.operands, "weight": weight, "terms": terms}
    attributes = dict(first.node.attributes)
    attributes["out_channels"] = ir.AttrInt64s("out_channels", [layer.out_channels])
    node = ir.node(
        first.node.op_type,
        list(operands.values()),
        domain=first.node.domain,
        name=f"{names}/plugin",
    )
    node.attributes.update(attributes)
    out = first.out
    if out.shape is not None:
        node.outputs[0].shape = ir.Shape([*out.shape[:-1], layer.out_channels])
    node.outputs[0].type = out.type
    node.outputs[0].name = f"{_layers(first)}/merged"
    parts = build.op("Split", [node.outputs[0], split], "parts", {"axis": -1}, len(plugins))
    for part, plugin in zip(parts, plugins, strict=True):
        part.shape, part.type = plugin.out.shape, plugin.out.type
    ir.convenience.replace_nodes_and_values(
        graph,
        first.node,
        [plugin.node for plugin in plugins],
        [node, *build.nodes],
        [plugin.out for plugin in plugins],
        parts,
    )
