"""Names of the nodes that represent low-bit layers, see `trtq.exporter.trace`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["DOMAIN", "LOW_BIT_OPERATORS", "WITHOUT_PLUGIN", "call_names"]

DOMAIN = "trtq"
LOW_BIT_OPERATORS = ("LowBitLinear", "LowBitConv2d", "LowBitConv", "LowBitMatMul")
WITHOUT_PLUGIN = ("LowBitConv", "LowBitMatMul")
"""Nodes that no plugin computes; in every graph they have quantise-dequantise form."""


def call_names(nodes: Iterable[ir.Node]) -> list[tuple[str, str]]:
    """The layer of each node and a unique name of the call.

    Args:
        nodes: low-bit nodes, in order.

    Returns:
        Name of the layer, and the same name for the layer's first node, `NAME/call_2` for the second.
    """
    counts: dict[str, int] = {}
    names = []
    for node in nodes:
        layer = node.attributes["name"].as_string()
        counts[layer] = counts.get(layer, 0) + 1
        names.append((layer, layer if counts[layer] == 1 else f"{layer}/call_{counts[layer]}"))
    return names
