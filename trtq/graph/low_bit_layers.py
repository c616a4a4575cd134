"""The low-bit layers of an exported graph: their outputs, and their replacement by float layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from trtq.errors import ArtefactError
from trtq.quant.structure import Product

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["layers_to_float", "mark_inputs", "mark_layers"]

_CORES = ("Conv", "MatMul")
_CALL = "/call_"


@dataclass(frozen=True)
class _Call:
    """The nodes of one call of a layer.

    Attributes:
        core: the product or convolution.
        out: the layer's output.
    """

    core: ir.Node
    out: ir.Value


def _calls(model: ir.Model, layers: Collection[str]) -> dict[str, list[_Call]]:
    """The calls of each layer in order; nodes are named `LAYER/...` or `LAYER/call_N/...`.

    Raises:
        ArtefactError: the graph does not have one of the layers.
    """
    cores: dict[str, ir.Node] = {}
    outs: dict[str, ir.Value] = {}
    for node in model.graph:
        call, part = _split_name(node)
        if call.partition(_CALL)[0] not in layers:
            continue
        if node.op_type in _CORES and part in ("conv", "matmul"):
            cores[call] = node
        outs[call] = node.outputs[0]
    calls_of: dict[str, list[_Call]] = {name: [] for name in layers}
    for call, core in cores.items():
        calls_of[call.partition(_CALL)[0]].append(_Call(core, outs[call]))
    missing = [name for name, calls in calls_of.items() if not calls]
    if missing:
        raise ArtefactError(f"the graph {model.graph.name!r} has no layer {missing[0]!r}")
    return calls_of


def _split_name(node: ir.Node) -> tuple[str, str]:
    """The call of a layer that a node belongs to, and the node's part in it."""
    call, _, part = (node.name or "").rpartition("/")
    # The nodes of a product in NVFP4 have one more level.
    return call.removesuffix("/product"), part


def mark_layers(model: ir.Model, layers: Collection[str]) -> None:
    """Make the output of each layer's last call an output of the graph, under the layer's name.

    Args:
        model: graph prepared for onnxruntime, see `trtq.graph.runtimes.prepare.prepare`; changed.
        layers: names of low-bit layers.

    Raises:
        ArtefactError: the graph does not have one of the layers.
    """
    import onnx_ir as ir

    graph = model.graph
    for name, calls in _calls(model, layers).items():
        out = calls[-1].out
        # A new name, since a rewrite for a runtime may replace the value, but not its uses.
        node = ir.node("Identity", [out], name=f"marked/{name}")
        node.outputs[0].name, node.outputs[0].type = name, out.type
        node.outputs[0].shape = out.shape
        graph.append(node)
        graph.outputs.append(node.outputs[0])


def mark_inputs(model: ir.Model, layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Make the inputs of float layers outputs of the graph.

    Args:
        model: graph after `layers_to_float`; changed.
        layers: the float layers by name.

    Returns:
        The names of the new outputs of each layer's last call: one, or two for a product.
    """
    import onnx_ir as ir

    marked: dict[str, list[str]] = {}
    cores = {
        (node.name or "").rpartition("/")[0].rpartition("/")[0].removeprefix("float/"): node
        for node in model.graph
        if (node.name or "").startswith("float/") and node.op_type in _CORES
    }
    for name, layer in layers.items():
        operands = cores[name].inputs if isinstance(layer, Product) else cores[name].inputs[:1]
        marked[name] = []
        for place, value in enumerate(operands):
            assert value is not None
            node = ir.node("Identity", [value], name=f"input_{place}/{name}")
            node.outputs[0].name, node.outputs[0].type = node.name, value.type
            node.outputs[0].shape = value.shape
            model.graph.append(node)
            model.graph.outputs.append(node.outputs[0])
            marked[name].append(str(node.name))
    return marked


def layers_to_float(model: ir.Model, layers: Mapping[str, nn.Module]) -> None:
    """Replace low-bit layers by float layers, in place.

    Args:
        model: graph prepared for onnxruntime, see `trtq.graph.runtimes.prepare.prepare`; changed.
        layers: the float layers by name: `nn.Linear`, a convolution, or a `Product`.

    Raises:
        ArtefactError: the graph does not have one of the layers.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    names = _low_bit_names(model)
    everything = _calls(model, names | set(layers))
    ends = {id(call.out) for calls in everything.values() for call in calls}
    for name, layer in layers.items():
        for number, call in enumerate(everything[name]):
            inputs = [_outside(value, names, ends) for value in call.core.inputs]
            operands = inputs if isinstance(layer, Product) else inputs[:1]
            nodes = _float_nodes(model, f"float/{name}/{number}", layer, call, operands)
            new = nodes[-1].outputs[0]
            new.shape, new.type = call.out.shape, call.out.type
            end = call.out.producer()
            assert end is not None
            model.graph.insert_after(end, nodes)
            if call.out in model.graph.outputs:
                call.out.name, new.name = f"{new.name}/replaced", call.out.name
            ir.convenience.replace_all_uses_with(call.out, new, replace_graph_outputs=True)
    RemoveUnusedNodesPass()(model)


def _low_bit_names(model: ir.Model) -> set[str]:
    """The layers whose nodes the graph has."""
    return {
        call.partition(_CALL)[0]
        for node in model.graph
        for call, part in [_split_name(node)]
        if node.op_type in _CORES and part in ("conv", "matmul")
    }


def _outside(value: ir.Value | None, names: Collection[str], ends: Collection[int]) -> ir.Value:
    """The value from which a layer's operand is computed: quantisers may be those of other layers."""
    while value is not None and id(value) not in ends:
        producer = value.producer()
        if producer is None:
            break
        layer = _split_name(producer)[0].partition(_CALL)[0]
        if layer not in names:
            break
        value = producer.inputs[0]
    assert value is not None
    return value


def _float_nodes(
    model: ir.Model, prefix: str, layer: nn.Module, call: _Call, inputs: list[ir.Value]
) -> list[ir.Node]:
    """Nodes that compute a float layer in float32, with a result of the type of the graph."""
    import onnx_ir as ir

    nodes: list[ir.Node] = []

    def add(
        kind: str, inputs: list[ir.Value], attributes: Mapping[str, ir.Attr] | None = None
    ) -> ir.Value:
        node = ir.Node("", kind, inputs, list((attributes or {}).values()))
        node.name = f"{prefix}/{kind.lower()}_{len(nodes)}"
        node.outputs[0].name = node.name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        nodes.append(node)
        return node.outputs[0]

    def cast(value: ir.Value, to: ir.DataType) -> ir.Value:
        if value.dtype == to:
            return value
        return add("Cast", [value], {"to": ir.AttrInt64("to", to.value)})

    def constant(name: str, array: np.ndarray) -> ir.Value:
        value = ir.val(f"{prefix}/{name}", const_value=ir.tensor(np.ascontiguousarray(array)))
        model.graph.register_initializer(value)
        return value

    kind = call.out.dtype or ir.DataType.FLOAT
    operands = [cast(value, ir.DataType.FLOAT) for value in inputs]
    if isinstance(layer, Product):
        y = add("MatMul", operands)
    else:
        weight = layer.get_parameter("weight").detach().float().numpy()
        conv = call.core.op_type == "Conv"
        stored = constant("weight", weight if conv else weight.T)
        attributes = dict(call.core.attributes) if conv else {}
        y = add(call.core.op_type, [*operands, stored], attributes)
        if getattr(layer, "bias", None) is not None:
            bias = layer.get_parameter("bias").detach().float().numpy()
            y = add("Add", [y, constant("bias", bias.reshape(-1, *(1,) * (weight.ndim - 2)))])
    cast(y, kind)
    return nodes
