"""Fuses the operators before and after low-bit layers into their plugin nodes.

1. `FuseTransposes`: a Transpose between channels first and last, before or after a convolution, goes:
   the kernels read and write both layouts. A Mul by constants per channel may follow the Transpose.
2. `FuseEpilogues`: an Add of a tensor of the output's shape, then SiLU, behind a layer.
3. `FusePrologues`: group norm, layer norm, GELU times a value, SiLU, a Mul by constants per channel, and
   the Transpose that joins heads, in front of a layer. In front of a group norm, also an Add of one
   value per image and channel.

A part goes into a layer only if nothing else reads its values. Everything that is fused is computed in
float32 and rounded to the graph's type once, where the graph rounds after each operator, so that in half
precision a value on a rounding tie may become the other code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from trtq.graph.runtimes.fused_nodes import (
    Part,
    PluginNode,
    constant,
    plugin_nodes,
    replace_plugin,
    same_shape,
)
from trtq.graph.runtimes.merge_layers import MergeLayers
from trtq.graph.runtimes.prologues import match_prologue, step_factor, step_silu

__all__ = ["FUSIONS", "FuseEpilogues", "FusePrologues", "FuseTransposes"]

_TO_FIRST, _TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


class FuseTransposes(ir.passes.InPlacePass):
    """Remove Transposes around convolutions, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on a Transpose in front of a convolution to channels first, or behind it to last."""
        modified = False
        for fuse in (_transpose_before, _transpose_behind):
            for plugin in plugin_nodes(model.graph):
                if plugin.layer.geometry is not None:
                    modified |= fuse(model.graph, plugin)
        return ir.passes.PassResult(model, modified=modified)


def _transpose_before(graph: ir.Graph, plugin: PluginNode) -> bool:
    part = Part(plugin.x)
    factor = step_factor(part, plugin.layer.channels, axis=1)
    if part.step("Transpose", perm=_TO_FIRST) is None or not part.is_private(plugin.node):
        return False
    operands: dict[str, ir.Value] = {"x": part.value}
    changes: dict[str, Any] = {"x_last": True}
    if factor is not None:
        if plugin.grouped:
            return False
        operands["affine"] = _affine(graph, plugin, factor=factor)
        changes["affine"] = True
    part.release()
    replace_plugin(graph, plugin, plugin.node, operands=operands, **changes)
    return True


def _transpose_behind(graph: ir.Graph, plugin: PluginNode) -> bool:
    node = _only_reader(plugin.out)
    if node is None or node.op_type != "Transpose":
        return False
    if list(node.attributes["perm"].as_ints()) != _TO_LAST:
        return False
    replace_plugin(graph, plugin, node, out_last=True)
    return True


class FuseEpilogues(ir.passes.InPlacePass):
    """Add residuals and SiLU to layers, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on an Add of a tensor of the same shape, and on SiLU, behind a layer."""
        modified = False
        # From the end: of two layers that are added, the later one adds the other.
        for plugin in plugin_nodes(model.graph, backwards=True):
            modified |= _residual_behind(model.graph, plugin)
        for plugin in plugin_nodes(model.graph):
            modified |= _silu_behind(model.graph, plugin)
        return ir.passes.PassResult(model, modified=modified)


def _residual_behind(graph: ir.Graph, plugin: PluginNode) -> bool:
    node = _only_reader(plugin.out)
    if node is None or node.op_type != "Add" or plugin.fusion.residual:
        return False
    left, right = node.inputs
    other = right if left is plugin.out else left
    if other is None or other is plugin.out or not same_shape(other, plugin.out):
        return False
    replace_plugin(graph, plugin, node, operands={"residual": other}, residual=True)
    return True


def _silu_behind(graph: ir.Graph, plugin: PluginNode) -> bool:
    for reader in _behind(plugin.out):
        part = Part(reader.outputs[0])
        if step_silu(part) and part.value is plugin.out:
            readers = {use.node for use in plugin.out.uses()}
            inner = part.nodes - {reader}
            private = all(
                use.node in part.nodes for node in inner for use in node.outputs[0].uses()
            )
            if readers <= part.nodes and private and not plugin.fusion.silu:
                replace_plugin(graph, plugin, reader, silu=True)
                return True
    return False


def _behind(value: ir.Value) -> list[ir.Node]:
    """The nodes that follow a value within the length of SiLU, the last first."""
    nodes: dict[ir.Node, None] = {}
    values = [value]
    for _ in range(6):
        readers = [use.node for current in values for use in current.uses()]
        nodes |= dict.fromkeys(node for node in readers if len(node.outputs) == 1)
        values = [out for node in readers for out in node.outputs[:1]]
        if len(values) > 4 * len(nodes):
            break
    return list(reversed(nodes))


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return None if len(uses) != 1 or value.is_graph_output() else uses[0].node


class FusePrologues(ir.passes.InPlacePass):
    """Fuse norms and activation functions in front of layers, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on a norm, GELU, SiLU, a factor, or joined heads in front of a layer."""
        modified = False
        for plugin in plugin_nodes(model.graph):
            if plugin.grouped or plugin.fusion.norm != "none" or plugin.fusion.activated:
                continue
            modified |= _fuse_prologue(model.graph, plugin)
        return ir.passes.PassResult(model, modified=modified)


def _fuse_prologue(graph: ir.Graph, plugin: PluginNode) -> bool:
    prologue = match_prologue(plugin)
    if prologue is None:
        return False
    changes: dict[str, Any] = dict(prologue.changes)
    operands = {"x": prologue.part.value}
    operands["affine"] = _affine(
        graph, plugin, prologue.scale, prologue.shift, prologue.factor, prologue.epsilon
    )
    if prologue.image_shift is not None:
        operands["image_shift"] = prologue.image_shift
        changes["image_shift"] = True
    prologue.part.release()
    replace_plugin(graph, plugin, plugin.node, operands=operands, affine=True, **changes)
    return True


def _affine(
    graph: ir.Graph,
    plugin: PluginNode,
    scale: np.ndarray | float = 1.0,
    shift: np.ndarray | float = 0.0,
    factor: np.ndarray | float = 1.0,
    epsilon: float = 0.0,
) -> ir.Value:
    """The input `affine`, float32[4, C]; an earlier factor of the node is kept."""
    numbers = np.empty((4, plugin.layer.channels), np.float32)
    numbers[0], numbers[1], numbers[2], numbers[3] = scale, shift, factor, epsilon
    earlier = plugin.operands.get("affine")
    if earlier is not None and earlier.const_value is not None:
        numbers[2] *= earlier.const_value.numpy()[2]
    name = (plugin.node.name or "").rpartition("/")[0].partition("+")[0]
    place = f"{name}/affine"
    while place in graph.initializers:
        place += "_2"
    return constant(graph, place, numbers)


FUSIONS: tuple[type[ir.passes.InPlacePass], ...] = (
    MergeLayers,
    FuseTransposes,
    FuseEpilogues,
    FusePrologues,
)
"""The passes that make fewer launches of plugin nodes, in order."""
