"""Rewrites low-bit nodes to quantise-dequantise (QDQ) form, which engines run in integers.

1. In a float16 or float32 graph, a layer becomes

       Cast(float) -> Mul(1 / s[step]) -> Max(low[step]) -> Min(high[step]) -> QuantizeLinear(1, int8)
         -> DequantizeLinear(1) -> Conv | MatMul with DequantizeLinear(int8 W, 1) -> Mul(d * s[step])
         -> Add(bias) -> Cast

   Both operands of the product are whole numbers, and the weight's scale `d` is applied after the
   product; `trtq.quant.deployed` explains the reason. `d * s[step]` has one value per channel and item.
2. A product of two activations has such a quantiser on each input and no weight, and is rescaled by both
   scales:

       (... -> DequantizeLinear(1)) MatMul (... -> DequantizeLinear(1))
         -> Mul(s_a[step]) -> Mul(s_b[step])

3. If the second operand of a MatMul holds integers beyond `PAIR_SAFE`, this MatMul and all nodes that
   share its quantiser cast both operands to float instead of dequantising them, with the same result:
   `QuantizeLinear -> Cast -> MatMul with Cast(int8 W)`. For runtimes whose products do not saturate,
   `CastsToQdq` restores the pair when the graph is prepared.
4. Inputs with the same value and the same table share one quantiser, e.g. queries, keys and values.
5. The clip is left out if int8 saturates to the same codes.
6. Weights of up to 4 bits are stored as INT4 (`q - 8`), with Cast and Sub (`z - 8`) in front of their
   DequantizeLinear.
7. Values that depend on the step come from one table, see `trtq.graph.passes.step_values`.
8. The scale of an input may be computed per row, see `trtq.graph.passes.row_scales`. The product is then
   multiplied by this scale and by the weight's scale one after the other.
9. An input with a transform is transformed first, see `trtq.graph.passes.transform_nodes`.
10. Layers in other formats than integers have forms of their own, see
    `trtq.graph.passes.weight_only_nodes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch

from trtq.errors import LegalityError
from trtq.graph.nodes import DOMAIN, LOW_BIT_OPERATORS, call_names
from trtq.graph.passes.builder import GraphBuilder
from trtq.graph.passes.fp8_nodes import Fp8Nodes
from trtq.graph.passes.integer_weights import integer_weight
from trtq.graph.passes.nvfp4_nodes import expand_nvfp4
from trtq.graph.passes.quantized_inputs import QuantizedInputs
from trtq.graph.passes.step_lookup import STEPS_PREFIX, StepInput
from trtq.graph.passes.step_values import StepTable, StepValues
from trtq.graph.passes.transform_nodes import TransformNodes
from trtq.graph.passes.weight_only_nodes import expand_weight_only
from trtq.quant.formats import FormatTensors
from trtq.quant.formats.fp8 import Fp8Tensors
from trtq.quant.formats.nvfp4 import Nvfp4Tensors
from trtq.quant.formats.weight_only import WeightOnlyTensors
from trtq.quant.plan import LowBitTensors, transform_key
from trtq.quant.tensors import LayerTensors, ProductTensors
from trtq.quant.timestep import TimestepTable

__all__ = ["PAIR_SAFE", "ExpandLowBitToQdq"]

_TIMESTEP = StepInput()
_CONVOLUTIONS = ("LowBitConv2d", "LowBitConv")
PAIR_SAFE = 64
"""Largest integer for which `255 w + 255 w` fits int16. onnxruntime rewrites a quantise pair of int8 to
uint8, and on x86 without VNNI its uint8 x int8 matrix product adds two neighbours in int16, which
saturates beyond this. Version 1.24 does not rewrite pairs without a zero point, 1.31 does; 1.31 also
quantises the activation of a MatMul again if only the weight is dequantised. Neither version rewrites a
Cast, nor a convolution whose output is not quantised."""


def _exceeds_pair_safe(layer: LayerTensors | ProductTensors) -> bool:
    """Whether the second operand of a product has integers beyond `PAIR_SAFE`."""
    if isinstance(layer, ProductTensors):
        return int(torch.maximum(-layer.right.low, layer.right.high).max()) > PAIR_SAFE
    if 2**layer.weight.bits - 1 <= PAIR_SAFE:
        return False
    return int(layer.weight.integers().short().abs().max()) > PAIR_SAFE


class ExpandLowBitToQdq(ir.passes.InPlacePass):
    """Replace every `trtq::LowBit*` node as the module docstring describes.

    Args:
        layers: tensors of the layers by the nodes' attribute `name`.
        table: the calibrated timesteps.
        operators: types of the nodes to replace. Layers with scales per row, which no plugin computes,
            are replaced, too; other nodes do not change.
        prefix: prefix of the names that all layers share; each use of this pass on a graph needs a
            different prefix.
        timestep: the graph input that determines the step.
    """

    def __init__(
        self,
        layers: Mapping[str, LowBitTensors],
        table: TimestepTable,
        operators: Sequence[str] = LOW_BIT_OPERATORS,
        *,
        prefix: str = STEPS_PREFIX,
        timestep: StepInput = _TIMESTEP,
    ) -> None:
        super().__init__()
        self.timestep = timestep
        self.prefix = prefix
        self.layers = layers
        self.table = table
        self.operators = operators
        self._inputs = QuantizedInputs()
        self._transforms = TransformNodes()
        self._fp8 = Fp8Nodes()
        self._exceeding: set[str] = set()
        """Quantisers whose codes are cast, see rule 3 of the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on a node of the domain `trtq`.

        Raises:
            LegalityError: a node names a layer without tensors, or the shape of an input is unknown.
        """
        graph = model.graph
        nodes = [n for n in graph if n.domain == DOMAIN and self._replaces(n)]
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        table = StepTable(graph, self.table, self.prefix, self.timestep)
        names = call_names(nodes)
        for node, (name, call) in zip(nodes, names, strict=True):
            if not isinstance(self.layers.get(name), WeightOnlyTensors):
                self._add_inputs(node, name, call, table)
        values = table.insert()
        for node, (name, call) in zip(nodes, names, strict=True):
            layer = self.layers[name]
            inputs = [values[f"{call}/{operand}"] for operand in layer.operands]
            builder = GraphBuilder(graph, call, shared=name)
            if isinstance(layer, ProductTensors):
                self._expand_product(builder, node, layer, inputs)
            elif isinstance(layer, Fp8Tensors | Nvfp4Tensors):
                self._expand_float(builder, node, layer, inputs[0])
            elif isinstance(layer, WeightOnlyTensors):
                x = self._transformed(builder, node, layer)
                self._finish(builder, node, expand_weight_only(builder, node, layer, x), cast=False)
            else:
                self._expand_layer(builder, node, layer, inputs[0])
        if all(node.domain != DOMAIN for node in graph):
            model.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, modified=True)

    def _replaces(self, node: ir.Node) -> bool:
        """Whether this pass replaces a node; the plugins compute integers with scales per step."""
        if node.op_type in self.operators:
            return True
        layer = self.layers.get(node.attributes["name"].as_string())
        if isinstance(layer, LayerTensors):
            return layer.activation.policy != "step"
        return node.op_type in LOW_BIT_OPERATORS and isinstance(layer, FormatTensors)

    def _add_inputs(self, node: ir.Node, name: str, call: str, table: StepTable) -> None:
        layer = self.layers.get(name)
        if layer is None or len(layer.operands) != len(node.inputs):
            raise LegalityError(f"the graph has a low-bit node {name!r} without its tensors")
        conv = node.op_type in _CONVOLUTIONS
        exceeds = not conv and not isinstance(layer, FormatTensors) and _exceeds_pair_safe(layer)
        weight_scale = None
        if not isinstance(layer, ProductTensors):
            weight_scale = layer.weight.scale.numpy().reshape(-1)
        for (operand, tensors), value in zip(layer.operands.items(), node.inputs, strict=True):
            if value is None or value.shape is None:
                raise LegalityError(f"the shape of an input of {name!r} is not known")
            quantizer = table.add(
                f"{call}/{operand}",
                value,
                tensors,
                weight_scale,
                channel=1 if conv else None,
                repeats=f"{name}/{operand}" if call != name else None,
                key=transform_key(layer),
                codes=layer.precision if isinstance(layer, FormatTensors) else "int8",
            )
            if exceeds:
                self._exceeding.add(quantizer)

    def _transformed(
        self, builder: GraphBuilder, node: ir.Node, layer: LayerTensors | FormatTensors
    ) -> ir.Value:
        """The input of a layer, transformed if the layer has a transform."""
        (x,) = node.inputs
        assert x is not None
        if layer.transform is None:
            return x
        conv = node.op_type in _CONVOLUTIONS
        return self._transforms.transformed(builder, x, layer.transform, channels_first=conv)

    def _expand_layer(
        self, builder: GraphBuilder, node: ir.Node, layer: LayerTensors, values: StepValues
    ) -> None:
        x = self._transformed(builder, node, layer)
        assert x.shape is not None
        conv, rank = node.op_type in _CONVOLUTIONS, len(x.shape)
        paired = conv or values.quantizer not in self._exceeding
        y = self._inputs.operand(
            builder, x, values, layer.activation, "activation", paired=paired, conv=conv
        )
        weight = integer_weight(builder, layer, transposed=not conv, paired=paired)
        if conv:
            attributes = {
                key: node.attributes[key].value for key in ("strides", "pads", "dilations", "group")
            }
            y = builder.op("Conv", [y, weight], "conv", attributes)
        else:
            y = builder.op("MatMul", [y, weight], "matmul")
        channel = (-1, *(1,) * (rank - 2)) if conv else (-1,)
        if layer.activation.policy == "step":
            y = builder.op("Mul", [y, values.scale], "rescaled")
        else:
            y = builder.op("Mul", [y, self._inputs.scale(values)], "rescaled_rows")
            scale = layer.weight.scale.numpy().reshape(channel)
            y = builder.op("Mul", [y, builder.constant("weight_scale", scale)], "rescaled")
        if layer.bias is not None:
            bias = layer.bias.numpy().reshape(channel)
            y = builder.op("Add", [y, builder.constant("bias", bias)], "biased")
        self._finish(builder, node, y)

    def _expand_float(
        self,
        builder: GraphBuilder,
        node: ir.Node,
        layer: Fp8Tensors | Nvfp4Tensors,
        values: StepValues,
    ) -> None:
        x = self._transformed(builder, node, layer)
        scaled = self._inputs.scaled(builder, x, values, layer.activation)
        if isinstance(layer, Fp8Tensors):
            y = self._fp8.expand(builder, node, layer, values, scaled)
        else:
            y = expand_nvfp4(builder, node, layer, values, scaled)
        self._finish(builder, node, y)

    def _expand_product(
        self,
        builder: GraphBuilder,
        node: ir.Node,
        layer: ProductTensors,
        inputs: Sequence[StepValues],
    ) -> None:
        paired = not any(values.quantizer in self._exceeding for values in inputs)
        left, right = (
            self._inputs.operand(builder, x, values, tensors, operand, paired=paired)  # type: ignore[arg-type]
            for x, values, (operand, tensors) in zip(
                node.inputs, inputs, layer.operands.items(), strict=True
            )
        )
        y = builder.op("MatMul", [left, right], "matmul")
        for values, operand in zip(inputs, layer.operands, strict=True):
            y = builder.op("Mul", [y, self._inputs.scale(values)], f"{operand}_rescaled")
        self._finish(builder, node, y)

    @staticmethod
    def _finish(builder: GraphBuilder, node: ir.Node, y: ir.Value, *, cast: bool = True) -> None:
        """Cast to the type of the graph if necessary, and replace the node."""
        (out,) = node.outputs
        dtype = node.inputs[0].dtype  # type: ignore[union-attr]
        if cast and dtype != ir.DataType.FLOAT:
            y = builder.op("Cast", [y], "narrow", {"to": dtype.value})  # type: ignore[union-attr]
        y.shape, y.type = out.shape, out.type
        ir.convenience.replace_nodes_and_values(
            builder.graph, node, [node], builder.nodes, [out], [y]
        )
