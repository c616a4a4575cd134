"""A layer that breaks a rule of a runtime, and what rules read in a graph."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

__all__ = [
    "Finding",
    "constant_of",
    "dequantized_by",
    "input_of",
    "layer_of",
    "operands_of",
    "producer_of",
]


@dataclass(frozen=True)
class Finding:
    """A layer that breaks a rule.

    Attributes:
        layer: name of the layer, or of a node that belongs to no layer.
        rule: operation of the layer that the runtime does not support, and the reason.
        fix: remedy.
        fatal: whether the layer is refused or computed wrongly; otherwise it only runs slower.
    """

    layer: str
    rule: str
    fix: str
    fatal: bool = True


def layer_of(node: ir.Node) -> str:
    """Name of the layer of a node, or of a node that belongs to no layer."""
    return (node.name or node.op_type).rpartition("/")[0] or (node.name or node.op_type)


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant of a value; None if there is none."""
    return None if value is None else value.const_value


def producer_of(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value; None for an input or constant."""
    return None if value is None else value.producer()


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node; None if the node has fewer inputs."""
    return node.inputs[index] if index < len(node.inputs) else None


def dequantized_by(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that computes a value, else None."""
    node = producer_of(value)
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def operands_of(
    node: ir.Node,
) -> tuple[ir.Node | None, ir.Node | None, ir.TensorProtocol | None]:
    """The DequantizeLinear nodes of activation and weight, and the weight's constant codes."""
    activation, weight = (dequantized_by(input_of(node, index)) for index in (0, 1))
    return activation, weight, constant_of(weight.inputs[0]) if weight is not None else None
