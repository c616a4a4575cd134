"""Count the kernels that an engine launches for one call of a graph, from the graph.

The graph is one that `trtq.graph.runtimes.prepare.prepare` rewrote for TensorRT. The rules:

1. A plugin node has one for its codes, one for its product, and one for the statistics of a group norm.
2. Arithmetic on shapes and constants is none.
3. A view (Reshape, Squeeze, Unsqueeze, Flatten, Expand, Identity) is none. A Split or a Slice is none
   where pointwise nodes read it, and one copy per output that others read.
4. A connected part of pointwise nodes and Transposes is one, unless another launch between them needs
   its first and gives its last values.
5. A Cast next to a norm belongs to the norm.
6. Every other node (MatMul, Softmax, a norm, Resize, Concat, a reduction) is one.
7. With `fused_attention`, a MatMul, pointwise nodes, a Softmax and a MatMul are one, and so are
   pointwise nodes and Transposes that only these read. TensorRT has such a kernel in half precision.

This is a model of a builder, not a measurement: builders fuse more and less, by GPU and version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from trtq.graph.nodes import DOMAIN
from trtq.plugins.fused.attributes import NORMS

__all__ = ["count_launches"]

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Identity")
_PARTS = ("Split", "Slice")
_NORMS = ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization")
_SHAPES = ("Shape", "Size")
_POINTWISE = (
    *("Add", "Sub", "Mul", "Div", "Neg", "Exp", "Log", "Sqrt", "Reciprocal", "Pow", "Abs", "Round"),
    *("Sigmoid", "Tanh", "Erf", "Gelu", "Relu", "Swish", "Max", "Min", "Clip", "Where", "Cast"),
    *(
        "CastLike",
        "Floor",
        "Ceil",
        "Mod",
        "Sin",
        "Cos",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "Equal",
    ),
    *("LessOrEqual", "And", "Or", "Not", "QuantizeLinear", "DequantizeLinear", "Transpose"),
)
_OTHERS = {"MatMul": "matmul", "Softmax": "softmax"} | dict.fromkeys(_NORMS, "norm")


def count_launches(model: ir.Model, *, fused_attention: bool = False) -> Counter[str]:
    """Count the launches of one call of a graph.

    Args:
        model: the graph, rewritten for TensorRT.
        fused_attention: whether rule 7 of the module docstring applies.

    Returns:
        The number of launches by kind.
    """
    parts = _Parts(model.graph)
    counts: Counter[str] = Counter()
    skipped = _attention(parts) if fused_attention else set()
    counts["attention"] = len([node for node in skipped if node.op_type == "Softmax"])
    counts["pointwise"] = len({parts.part(node) for node in parts.pointwise if node not in skipped})
    for node in parts.others:
        if node in skipped:
            continue
        if node.domain == DOMAIN:
            counts.update(_plugin_launches(node))
        else:
            counts[_OTHERS.get(node.op_type, "other")] += 1
    counts["copy"] = sum(1 for value in parts.part_values if parts.is_copied(value))
    return +counts


def _plugin_launches(node: ir.Node) -> dict[str, int]:
    launches = {"quantise": 1, "product": 1}
    norm = node.attributes.get("norm")
    if norm is not None and NORMS[norm.as_ints()[0]] == "group":
        launches["statistics"] = 1
    return launches


class _Parts:
    """The nodes of a graph by kind, and the connected parts of pointwise nodes.

    Args:
        graph: the graph.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._host: set[ir.Value] = set()
        self.pointwise: list[ir.Node] = []
        self.others: list[ir.Node] = []
        self.part_values: list[ir.Value] = []
        self._leader: dict[ir.Node, ir.Node] = {}
        self._before: dict[ir.Node, set[ir.Node]] = {}
        """Launches on which each launch depends directly, by the launch's first node."""
        for node in graph:
            self._place(node)

    def _place(self, node: ir.Node) -> None:
        inputs = [value for value in node.inputs if value is not None]
        # CastLike casts a constant to the type of a tensor, which is known.
        needed = inputs[:1] if node.op_type == "CastLike" else inputs
        if node.op_type in _SHAPES or all(self._is_host(value) for value in needed):
            self._host.update(node.outputs)
        elif node.op_type in _PARTS and node.domain != DOMAIN:
            self.part_values += node.outputs
        elif node.op_type in _VIEWS or self._is_cast_of_norm(node):
            return
        else:
            self._launch(node)

    def _launch(self, node: ir.Node) -> None:
        sources = [source for value in node.inputs for source in self.sources(value)]
        self._leader[node] = node
        self._before[node] = {self.part(source) for source in sources}
        if node.op_type not in _POINTWISE:
            self.others.append(node)
            return
        self.pointwise.append(node)
        for source in sources:
            if source.op_type in _POINTWISE:
                self._join(self.part(source), self.part(node))

    def _join(self, first: ir.Node, second: ir.Node) -> None:
        """Make two pointwise launches one, unless a launch between them depends on the first."""
        if first is second:
            return
        between = self._before[second] - {first}
        if any(self._depends(launch, first) for launch in between):
            return
        self._leader[second] = first
        self._before[first] |= between

    def _depends(self, launch: ir.Node, on: ir.Node) -> bool:
        waiting, seen = [self.part(launch)], set()
        while waiting:
            current = self.part(waiting.pop())
            if current is on:
                return True
            if current not in seen:
                seen.add(current)
                waiting += self._before[current]
        return False

    def part(self, node: ir.Node) -> ir.Node:
        """The first node of the launch to which a node belongs."""
        while self._leader[node] is not node:
            node = self._leader[node]
        return node

    def _is_host(self, value: ir.Value) -> bool:
        return value.const_value is not None or value in self._host

    def sources(self, value: ir.Value | None) -> Iterator[ir.Node]:
        """The node that launches a kernel for a value, beyond views; none for inputs and constants."""
        node = value.producer() if value is not None else None
        while node is not None and node not in self._leader:
            if value is None or self._is_host(value):
                return
            value = node.inputs[0]
            node = value.producer() if value is not None else None
        if node is not None:
            yield node

    @staticmethod
    def _is_cast_of_norm(node: ir.Node) -> bool:
        if node.op_type != "Cast":
            return False
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        if producer is not None and producer.op_type in _NORMS:
            return True
        readers = list(_beyond_views(node.outputs[0]))
        return bool(readers) and all(reader.op_type in _NORMS for reader in readers)

    def readers(self, value: ir.Value) -> list[ir.Node]:
        """The launched nodes that read a value, directly or through views."""
        return [node for node in _beyond_views(value) if node in self._leader]

    def is_copied(self, value: ir.Value) -> bool:
        """Whether a part of a tensor is copied, because nodes read it that need whole tensors."""
        return value.is_graph_output() or any(
            reader.op_type not in _POINTWISE for reader in self.readers(value)
        )


def _beyond_views(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that read a value, directly or through views."""
    for use in value.uses():
        if use.node.op_type in _VIEWS and use.idx == 0:
            yield from _beyond_views(use.node.outputs[0])
        elif use.node.op_type not in _SHAPES:
            yield use.node


def _attention(parts: _Parts) -> set[ir.Node]:
    """The nodes of attention that one kernel computes."""
    fused: set[ir.Node] = set()
    for node in parts.others:
        if node.op_type != "Softmax":
            continue
        scores, values = list(_upwards(node, parts)), list(_downwards(node, parts))
        ends = scores[-1:] + values[-1:]
        if [end.op_type for end in ends] == ["MatMul", "MatMul"]:
            fused |= {node, *scores, *values}
    changed = bool(fused)
    while changed:
        changed = False
        for node in parts.pointwise:
            readers = parts.readers(node.outputs[0])
            if node not in fused and readers and all(reader in fused for reader in readers):
                fused.add(node)
                changed = True
    return fused


def _upwards(node: ir.Node, parts: _Parts) -> Iterator[ir.Node]:
    """The nodes in front of a node along first inputs, up to the first that is not pointwise."""
    for source in parts.sources(node.inputs[0]):
        yield source
        if source.op_type in _POINTWISE:
            yield from _upwards(source, parts)


def _downwards(node: ir.Node, parts: _Parts) -> Iterator[ir.Node]:
    """The nodes behind a node while there is one only, up to the first that is not pointwise."""
    readers = parts.readers(node.outputs[0])
    if len(readers) == 1:
        yield readers[0]
        if readers[0].op_type in _POINTWISE:
            yield from _downwards(readers[0], parts)
