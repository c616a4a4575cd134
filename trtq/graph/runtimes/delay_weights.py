"""Delays the unpacking of weights until the layer's input is there, for a limited memory.

Nothing but a weight's constants is needed to unpack it, so a runtime may unpack all weights before the
first layer. After this rewrite they need the layer's input, too:

    MatMul | Conv (x, Cast -> Sub -> DequantizeLinear of constants)
      -> MatMul | Conv (x, If(Size(x) >= 0) {Cast -> Sub -> DequantizeLinear of the same constants})

1. Fires on a node with an input that depends on the graph's inputs, and another that is computed from
   initialisers alone, at least one of them large.
2. The nodes in the branch are those of the graph, so the result is the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["DelayWeights"]

_LARGE = 1 << 14
"""Size of an initialiser, in bytes, from which its unpacking is delayed."""


class DelayWeights(ir.passes.InPlacePass):
    """Move the nodes that unpack a weight into a branch, as the module docstring describes."""

    def __init__(self) -> None:
        super().__init__()
        self._conditions: dict[int, ir.Value] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every node with a large weight that is unpacked in the graph."""
        constant: set[int] = set()
        modified = False
        for node in list(model.graph):
            inputs = [value for value in node.inputs if value is not None]
            if inputs and all(_is_constant(value, constant) for value in inputs):
                constant.add(id(node))
                continue
            given = [value for value in inputs if not _is_constant(value, constant)]
            for index, value in enumerate(node.inputs):
                dtype = None if value is None else _type(value.producer())
                if value is None or dtype is None or not _is_constant(value, constant):
                    continue
                nodes = list(_ancestors(value))
                if any(_is_large(source) for each in nodes for source in each.inputs):
                    value.type = ir.TensorType(dtype)
                    self._delay(model.graph, node, index, value, nodes, given[0])
                    modified = True
        if modified:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=modified)

    def _delay(
        self,
        graph: ir.Graph,
        user: ir.Node,
        index: int,
        value: ir.Value,
        nodes: list[ir.Node],
        given: ir.Value,
    ) -> None:
        """Compute `value`, the input `index` of a node, in a branch that needs the input `given`."""
        name = f"{user.name}/delayed_{index}"
        copies: dict[int, ir.Value] = {}
        branch = []
        for node in nodes:
            inputs = [v if v is None else copies.get(id(v), v) for v in node.inputs]
            attributes = list(node.attributes.values())
            copy = ir.Node(
                node.domain, node.op_type, inputs, attributes, name=f"{name}/{node.name}"
            )
            (old,), (new,) = node.outputs, copy.outputs
            new.name, new.type, new.shape = f"{name}/{old.name}", old.type, old.shape
            copies[id(old)] = new
            branch.append(copy)
        zero = np.zeros((), value.dtype.numpy())  # type: ignore[union-attr]
        empty = ir.node("Constant", [], {"value": ir.tensor(zero)}, name=f"{name}/empty")
        empty.outputs[0].name, empty.outputs[0].type = f"{name}/empty", value.type
        branches = {
            "then_branch": ir.Graph([], [copies[id(value)]], nodes=branch, name=f"{name}/then"),
            "else_branch": ir.Graph([], list(empty.outputs), nodes=[empty], name=f"{name}/else"),
        }
        choice = ir.node("If", [self._condition(graph, user, given)], branches, name=name)
        choice.outputs[0].name, choice.outputs[0].type = name, value.type
        graph.insert_before(user, choice)
        user.replace_input_with(index, choice.outputs[0])

    def _condition(self, graph: ir.Graph, user: ir.Node, given: ir.Value) -> ir.Value:
        """A value that is true, and is known as soon as `given` is."""
        if id(given) not in self._conditions:
            zero = ir.node("Constant", [], {"value_int": 0}, name=f"{given.name}/zero")
            size = ir.node("Size", [given], name=f"{given.name}/size")
            known = ir.node(
                "GreaterOrEqual", [size.outputs[0], zero.outputs[0]], name=f"{given.name}/known"
            )
            for node in (zero, size, known):
                node.outputs[0].name = node.name
            graph.insert_before(user, [zero, size, known])
            self._conditions[id(given)] = known.outputs[0]
        return self._conditions[id(given)]


def _type(node: ir.Node | None) -> ir.DataType | None:
    """The type of the last value that unpacks a weight; None: the node does not unpack one."""
    if node is None or node.op_type not in ("Cast", "DequantizeLinear"):
        return None
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    scale = node.inputs[1]
    return None if scale is None or scale.const_value is None else scale.const_value.dtype


def _is_constant(value: ir.Value, constant: set[int]) -> bool:
    producer = value.producer()
    return value.is_initializer() if producer is None else id(producer) in constant


def _is_large(value: ir.Value | None) -> bool:
    return (
        value is not None and value.const_value is not None and value.const_value.nbytes >= _LARGE
    )


def _ancestors(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that compute a value, in the order of computation."""
    seen: set[int] = set()
    stack = [(value.producer(), False)]
    while stack:
        node, ready = stack.pop()
        if node is None or (id(node) in seen and not ready):
            continue
        if ready:
            yield node
            continue
        seen.add(id(node))
        stack.append((node, True))
        stack += [(source.producer(), False) for source in node.inputs if source is not None]
