"""Plugin nodes with the operators next to their layer, and the parts of a graph that become these.

A part ends at the input of a plugin node. It is taken only if nothing else reads its values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from trtq.graph.nodes import DOMAIN
from trtq.plugins.fused.attributes import (
    FUSED_FIELDS,
    FUSED_PLUGINS,
    Fusion,
    fused_fields,
    fusion_of,
    input_names,
)
from trtq.plugins.low_bit.attributes import NAMESPACE, PLUGINS, VERSION, fields_of, spec_of
from trtq.plugins.spec import LayerSpec

__all__ = [
    "Part",
    "PluginNode",
    "constant",
    "plugin_nodes",
    "remove_unread",
    "replace_plugin",
    "same_shape",
    "shape_ends",
]

_FUSED_NAMES = {plain: fused for fused, plain in FUSED_PLUGINS.items()}


@dataclass(frozen=True)
class PluginNode:
    """A plugin node.

    Attributes:
        node: the node.
        layer: its layer.
        fusion: what it computes in addition to the layer.
        operands: its inputs by name, see `trtq.plugins.fused.attributes`.
    """

    node: ir.Node
    layer: LayerSpec
    fusion: Fusion
    operands: Mapping[str, ir.Value]

    @property
    def x(self) -> ir.Value:
        """The input of the layer."""
        return self.operands["x"]

    @property
    def out(self) -> ir.Value:
        """The output."""
        return self.node.outputs[0]

    @property
    def rows(self) -> bool:
        """Whether the input has channels last."""
        return self.layer.geometry is None or self.fusion.x_last

    @property
    def grouped(self) -> bool:
        """Whether the layer has several groups of channels, in front of which nothing is fused."""
        return self.layer.geometry is not None and self.layer.geometry.groups > 1


def plugin_nodes(graph: ir.Graph, *, backwards: bool = False) -> Iterator[PluginNode]:
    """The plugin nodes of a graph, each read when it is reached, so that a caller may replace it.

    Args:
        graph: the graph.
        backwards: whether the last node comes first.
    """
    nodes = [
        node
        for node in graph
        if node.domain == DOMAIN and node.op_type in (*PLUGINS, *FUSED_PLUGINS)
    ]
    for node in reversed(nodes) if backwards else nodes:
        if node.graph is graph:
            yield _read(node)


def _read(node: ir.Node) -> PluginNode:
    fields = {
        key: list(attribute.as_ints())
        for key, attribute in node.attributes.items()
        if key in FUSED_FIELDS
    }
    if node.op_type in PLUGINS:
        layer, fusion = spec_of(node.op_type, fields), Fusion()
    else:
        layer, fusion = fusion_of(node.op_type, fields)
    operands: dict[str, Any] = dict(zip(input_names(fusion), node.inputs, strict=True))
    return PluginNode(node, layer, fusion, operands)


def replace_plugin(
    graph: ir.Graph,
    plugin: PluginNode,
    at: ir.Node,
    *,
    layer: LayerSpec | None = None,
    operands: Mapping[str, ir.Value] | None = None,
    name: str | None = None,
    **changes: Any,
) -> None:
    """Replace a plugin node and the nodes behind it up to `at` by one plugin node.

    Args:
        graph: the graph.
        plugin: the node to replace.
        at: the node whose output the new node computes; the plugin node itself for a part before it.
        layer: the new node's layer; None: the same.
        operands: inputs that change, by name.
        name: the new node's name; None: the same.
        changes: fields of `Fusion` that change.
    """
    layer = layer or plugin.layer
    fusion = replace(plugin.fusion, **changes)
    inputs = {**plugin.operands, **(operands or {})}
    plain = plugin.node.op_type if plugin.node.op_type in PLUGINS else None
    plain = plain or FUSED_PLUGINS[plugin.node.op_type]
    fused = fusion != Fusion()
    attributes: dict[str, Any] = {"name": plugin.node.attributes["name"].as_string()}
    attributes |= {"plugin_namespace": NAMESPACE, "plugin_version": VERSION}
    attributes |= fused_fields(layer, fusion) if fused else fields_of(layer)
    node = ir.node(
        _FUSED_NAMES[plain] if fused else plain,
        [inputs[key] for key in input_names(fusion)],
        attributes,
        domain=DOMAIN,
        name=name or plugin.node.name,
    )
    (out,) = at.outputs
    former = [*at.inputs, *plugin.node.inputs]
    node.outputs[0].shape, node.outputs[0].type = out.shape, out.type
    ir.convenience.replace_nodes_and_values(graph, at, [at], [node], [out], [node.outputs[0]])
    for value in [plugin.out, *former]:
        remove_unread(graph, value)


def remove_unread(graph: ir.Graph, value: ir.Value | None) -> None:
    """Remove the nodes that only compute a value that nothing reads."""
    node = value.producer() if value is not None else None
    if node is None or node.graph is not graph:
        return
    if any(out.uses() or out.is_graph_output() for out in node.outputs):
        return
    inputs = list(dict.fromkeys(node.inputs))
    graph.remove(node, safe=True)
    for source in inputs:
        remove_unread(graph, source)


def constant(graph: ir.Graph, name: str, data: np.ndarray) -> ir.Value:
    """Add an initialiser."""
    tensor = ir.tensor(data, name=name)
    shape = ir.Shape(list(data.shape))
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def same_shape(first: ir.Value, second: ir.Value) -> bool:
    """Whether the shapes of two values are known and equal, and their types are."""
    shapes = first.shape, second.shape
    if shapes[0] is None or shapes[1] is None or first.dtype != second.dtype:
        return False
    known = [size if isinstance(size, int) else size.value for size in shapes[0]]
    return None not in known and list(shapes[0]) == list(shapes[1])


@dataclass
class Part:
    """Nodes in front of a value, matched backwards from it.

    Attributes:
        value: the value that is reached; the input of the part.
        nodes: the matched nodes.
    """

    value: ir.Value
    nodes: set[ir.Node] = field(default_factory=set)

    def step(self, operator: str, index: int = 0, **attributes: Any) -> ir.Node | None:
        """Step to an input of the node that computes the value, if this has an operator.

        Args:
            operator: the operator.
            index: the input to which to step.
            attributes: attributes that the node must have.

        Returns:
            The node; None: the value has another producer, and nothing changes.
        """
        node = self.value.producer()
        if node is None or node.op_type != operator or node.domain not in ("", "ai.onnx"):
            return None
        for key, wanted in attributes.items():
            attribute = node.attributes.get(key)
            if attribute is None or _plain(attribute.value) != wanted:
                return None
        source = node.inputs[index]
        if source is None or source.const_value is not None:
            return None
        self.nodes.add(node)
        self.value = source
        return node

    def with_constant(self, operator: str) -> np.ndarray | None:
        """Step over a node with a constant as one of two inputs, and return the constant."""
        node = self.value.producer()
        if node is None or node.op_type != operator or len(node.inputs) != 2:
            return None
        for index in (0, 1):
            other = node.inputs[1 - index]
            data = other.const_value if other is not None else None
            if data is not None and self.step(operator, index) is not None:
                return np.asarray(data.numpy())
        return None

    def copy(self) -> Part:
        """A part that can step further without a change of this one."""
        return Part(self.value, set(self.nodes))

    def is_private(self, reader: ir.Node, also: Iterable[ir.Node] = ()) -> bool:
        """Whether only matched nodes, `reader` and `also` read the values of matched nodes.

        Other nodes may read the batch size, which `release` gives them from the part's input.
        """
        readers = {*self.nodes, reader, *also, *self._batch_sizes()}
        return not any(
            value.is_graph_output() or any(use.node not in readers for use in value.uses())
            for node in self.nodes
            for value in node.outputs
        )

    def _batch_sizes(self) -> list[ir.Node]:
        """The nodes that read only the size of the first axis of a matched node's value."""
        sizes = [
            use.node
            for node in self.nodes
            for value in node.outputs
            for use in value.uses()
            if use.node not in self.nodes and use.node.op_type == "Shape"
        ]
        return [node for node in sizes if shape_ends(node) == (0, 1)]

    def release(self) -> None:
        """Give nodes that read the batch size of matched values that of the part's input."""
        for node in self._batch_sizes():
            node.replace_input_with(0, self.value)


def shape_ends(shape: ir.Node) -> tuple[int, ...]:
    """The attributes `start` and `end` of a Shape, those that it has."""
    keys = [key for key in ("start", "end") if key in shape.attributes]
    return tuple(shape.attributes[key].as_int() for key in keys)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
