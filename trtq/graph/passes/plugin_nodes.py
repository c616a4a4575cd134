"""Rewrites low-bit nodes to plugin nodes, whose inputs are the tensors of the layer, and back.

1. `LowBitToPlugins`: a low-bit layer becomes

       trtq::LowBitLinear(x, weight, terms, tables, step) -> y
       trtq::LowBitConv2d(x, weight, terms, tables, step) -> y

   `trtq.plugins.spec` describes the layouts, `trtq.plugins.low_bit.attributes` the attributes. x and y
   have the float type of the graph. The step is looked up once per graph. Products of activations use
   the quantise-dequantise form.
2. `ExpandPlugins`: for runtimes without the plugins, these nodes are rewritten to quantise-dequantise
   form, from the tensors in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from trtq.artefact.graph_metadata import TIMESTEPS_KEY, graph_timesteps
from trtq.errors import ArtefactError, LegalityError
from trtq.graph.nodes import DOMAIN, call_names
from trtq.graph.passes.builder import GraphBuilder
from trtq.graph.passes.low_bit_to_qdq import ExpandLowBitToQdq
from trtq.graph.passes.step_lookup import StepInput, look_up_step
from trtq.graph.passes.transform_nodes import TransformNodes
from trtq.plugins.low_bit.attributes import NAMESPACE, PLUGINS, VERSION, fields_of, spec_of
from trtq.plugins.spec import LayerSpec
from trtq.quant.geometry import ConvGeometry
from trtq.quant.kernel_form import layer_tensors, packed_operands
from trtq.quant.plan import LowBitTensors
from trtq.quant.tensors import LayerTensors
from trtq.quant.timestep import TimestepTable

__all__ = [
    "TIMESTEPS_KEY",
    "ExpandPlugins",
    "LowBitToPlugins",
]

_RESTORED = "restored_steps"
_TIMESTEP = StepInput()
_OPERANDS = ("weight", "terms", "tables")


class LowBitToPlugins(ir.passes.InPlacePass):
    """Add the operands of the plugins to every `trtq::LowBitLinear` and `trtq::LowBitConv2d`.

    Args:
        layers: tensors of the layers by the nodes' attribute `name`.
        table: the calibrated timesteps.
        timestep: the graph input that determines the step.
    """

    def __init__(
        self,
        layers: Mapping[str, LowBitTensors],
        table: TimestepTable,
        timestep: StepInput = _TIMESTEP,
    ) -> None:
        super().__init__()
        self.timestep = timestep
        self.layers = layers
        self.table = table
        self._transforms = TransformNodes()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every LowBitLinear and LowBitConv2d.

        Raises:
            LegalityError: a node names a layer without tensors.
        """
        graph = model.graph
        nodes = [n for n in graph if n.domain == DOMAIN and n.op_type in PLUGINS]
        nodes = [node for node in nodes if self._has_plugin(node)]
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        step = look_up_step(graph, self.table, self.timestep)
        for node, (name, call) in zip(nodes, call_names(nodes), strict=True):
            layer = self.layers.get(name)
            if not isinstance(layer, LayerTensors):
                raise LegalityError(f"the graph has a low-bit node {name!r} without its tensors")
            self._give_operands(GraphBuilder(graph, call, shared=name), node, layer, step)
        return ir.passes.PassResult(model, modified=True)

    def _has_plugin(self, node: ir.Node) -> bool:
        """Whether a plugin computes a layer; layers with a scale per row use the QDQ form."""
        layer = self.layers.get(node.attributes["name"].as_string())
        return not isinstance(layer, LayerTensors) or layer.activation.policy == "step"

    def _give_operands(
        self, builder: GraphBuilder, node: ir.Node, layer: LayerTensors, step: ir.Value
    ) -> None:
        geometry = None
        if node.op_type == "LowBitConv2d":
            stride, pads, dilation = (
                tuple(node.attributes[key].as_ints()[:2])
                for key in ("strides", "pads", "dilations")
            )
            group = node.attributes["group"].as_int()
            geometry = ConvGeometry(stride, pads, dilation, group)
        spec, operands = packed_operands(layer, geometry)
        if not self.timestep.per_item:
            batch = builder.op("Shape", [node.inputs[0]], "rows", {"start": 0, "end": 1})
            step = builder.op("Expand", [step, batch], "steps")
        x = node.inputs[0]
        assert x is not None
        if layer.transform is not None:
            conv = geometry is not None
            x = self._transforms.transformed(builder, x, layer.transform, channels_first=conv)
        # Not "weight": the rewrite to quantise-dequantise form has a constant of that name.
        weight = builder.weight(
            "plugin_weight",
            lambda: packed_operands(layer, geometry)[1]["weight"],
            operands["weight"].shape,
            ir.DataType.INT8,
        )
        others = [builder.constant(f"plugin_{key}", operands[key]) for key in _OPERANDS[1:]]
        attributes: dict[str, Any] = {"name": builder.shared}
        attributes |= {"plugin_namespace": NAMESPACE, "plugin_version": VERSION}
        (out,) = node.outputs
        plugin = ir.node(
            node.op_type,
            [x, weight, *others, step],
            attributes | fields_of(spec),
            domain=DOMAIN,
            name=f"{builder.prefix}/plugin",
        )
        plugin.outputs[0].shape, plugin.outputs[0].type = out.shape, out.type
        ir.convenience.replace_nodes_and_values(
            builder.graph, node, [node], [*builder.nodes, plugin], [out], plugin.outputs
        )


class ExpandPlugins(ir.passes.InPlacePass):
    """Rewrite plugin nodes to quantise-dequantise form, from the tensors in the graph."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every plugin node.

        Raises:
            ArtefactError: a node's operands are not the expected constants, or the timesteps are
                missing.
        """
        nodes = [node for node in model.graph if node.domain == DOMAIN]
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        timesteps = model.metadata_props.get(TIMESTEPS_KEY)
        if timesteps is None:
            raise ArtefactError("the graph does not specify the timesteps of its calibration")
        layers = {}
        for node in nodes:
            spec, operands = _read(node)
            layers[node.attributes["name"].as_string()] = layer_tensors(spec, operands)
            _strip(node, spec)
        table = TimestepTable(graph_timesteps(timesteps))
        return ExpandLowBitToQdq(layers, table, PLUGINS, prefix=_RESTORED)(model)


def _read(node: ir.Node) -> tuple[LayerSpec, dict[str, np.ndarray]]:
    fields = {
        key: list(attribute.as_ints())
        for key, attribute in node.attributes.items()
        if attribute.type == ir.AttributeType.INTS
    }
    spec = spec_of(node.op_type, fields)
    stored = [value.const_value if value is not None else None for value in node.inputs[1:4]]
    if len(stored) != len(_OPERANDS) or any(tensor is None for tensor in stored):
        raise ArtefactError(f"the plugin node {node.name!r} has operands that are not constants")
    operands = {
        key: tensor.numpy()  # type: ignore[union-attr]
        for key, tensor in zip(_OPERANDS, stored, strict=True)
    }
    if operands["weight"].shape != spec.weight_shape():
        raise ArtefactError(
            f"the weight of {node.name!r} has the shape {list(operands['weight'].shape)}, its "
            f"attributes say {list(spec.weight_shape())}"
        )
    return spec, operands


def _strip(node: ir.Node, spec: LayerSpec) -> None:
    """Restore the traced node, which has only the input x and the attributes of a convolution."""
    node.resize_inputs(1)
    name = node.attributes["name"]
    node.attributes.clear()
    node.attributes["name"] = name
    if spec.geometry is not None:
        g = spec.geometry
        node.attributes["strides"] = ir.AttrInt64s("strides", g.stride)
        node.attributes["pads"] = ir.AttrInt64s("pads", [*g.padding, *g.padding])
        node.attributes["dilations"] = ir.AttrInt64s("dilations", g.dilation)
        node.attributes["group"] = ir.AttrInt64("group", g.groups)
