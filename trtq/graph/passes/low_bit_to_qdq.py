"""Low-bit nodes to quantise-dequantise form: the one that engines run in integers.

Per layer, in a float16 or float32 graph:

    Cast(float) -> Mul(inv_s[step]) -> Max(lo[step]) -> Min(hi[step]) -> QuantizeLinear(1, int8)
      -> DequantizeLinear(1) -> Conv | MatMul with DequantizeLinear(int8 W, 1) -> Mul(d * s[step])
      -> Add(bias) -> Cast

Both operands of the product are whole numbers and the weight's scale `d` follows it: see
`trtq.quant.deployed` for why. `d * s[step]` has one value per channel and batch item.

A product of two activations has the same front on both inputs, no weight, and both steps' scales behind
it:

    (... -> DequantizeLinear(1)) MatMul (... -> DequantizeLinear(1)) -> Mul(s_a[step]) -> Mul(s_b[step])

Where the second operand of a MatMul has integers beyond `PAIR_SAFE`, it and all that share its front
cast both operands to float instead of dequantising them, to the same numbers: `QuantizeLinear -> Cast ->
MatMul with Cast(int8 W)`. Runtimes whose products do not saturate get the pair back when the graph is
prepared for them, see `CastsToQdq`.

Layers that get the same value and have the same table share the front, e.g. queries, keys and values.
The clip is left out where int8 saturates to the same codes. Weights of up to 4 bits lie in the file
as INT4 (`q - 8`), with Cast and Sub (`z - 8`) in front of their DequantizeLinear.

The step of each batch item is found once per graph from `timestep`, and one Gather fetches the
values of all layers. Values that are the same at every step are constants instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from trtq.errors import LegalityError
from trtq.graph.nodes import DOMAIN, LOW_BIT_OPERATORS
from trtq.graph.passes.builder import GraphBuilder
from trtq.graph.passes.step_lookup import STEPS_PREFIX, look_up_step
from trtq.quant.plan import LowBitTensors
from trtq.quant.tensors import ActivationTensors, LayerTensors, ProductTensors
from trtq.quant.timestep import TimestepTable

__all__ = ["PAIR_SAFE", "ExpandLowBitToQdq"]

_INT8 = (-128, 127)
_INT4_OFFSET = 8
_FLOAT = {"to": ir.DataType.FLOAT.value}
PAIR_SAFE = 64
"""Largest integer for which `255 w + 255 w` fits int16. onnxruntime rewrites a quantise pair of int8 to
uint8, and on x86 without VNNI its uint8 x int8 product of matrices adds two neighbours in int16, which
saturates beyond this. Version 1.24 leaves pairs without a zero point alone, 1.31 does not; it also
quantises the activation of a MatMul again if only the weight is dequantised. A Cast is left alone by
both. Convolutions without a quantised output are not rewritten to integers."""


@dataclass(frozen=True)
class _StepValues:
    """Values of one input at the step of each batch item, shaped to broadcast over it.

    `front` names the input that is quantised for this one. `scale` of a layer is multiplied by its
    weight's scales, and broadcasts over the output.
    """

    front: str
    inv_scale: ir.Value
    scale: ir.Value
    low: ir.Value | None
    high: ir.Value | None


def _wide(layer: LowBitTensors) -> bool:
    """Whether the second operand of a product has integers beyond `PAIR_SAFE`."""
    if isinstance(layer, ProductTensors):
        return int(torch.maximum(-layer.right.low, layer.right.high).max()) > PAIR_SAFE
    if 2**layer.weight.bits - 1 <= PAIR_SAFE:
        return False
    return int(layer.weight.integers().short().abs().max()) > PAIR_SAFE


def _columns(operand: ActivationTensors) -> dict[str, np.ndarray]:
    """The per-step values that the graph needs of an input, float32 `[T]` each."""
    columns = {
        "inv_scale": operand.inv_scale.numpy(),
        "scale": operand.scale.numpy(),
    }
    low, high = operand.low.numpy(), operand.high.numpy()
    # Where both limits are int8's own, QuantizeLinear's saturation is the clip.
    if not ((low == _INT8[0]).all() and (high == _INT8[1]).all()):
        columns |= {"low": low.astype(np.float32), "high": high.astype(np.float32)}
    return columns


class ExpandLowBitToQdq(ir.passes.InPlacePass):
    """Replace every `trtq::LowBit*` node by the form in the module docstring.

    Args:
        layers: the numbers of the layers, by the nodes' attribute `name`.
        table: the calibrated timesteps.
        operators: those of the nodes that are replaced; the others stay.
        prefix: of the names of what all layers share, one per use of this pass in a graph.
    """

    def __init__(
        self,
        layers: Mapping[str, LowBitTensors],
        table: TimestepTable,
        operators: Sequence[str] = LOW_BIT_OPERATORS,
        *,
        prefix: str = STEPS_PREFIX,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.layers = layers
        self.table = table
        self.operators = operators
        self._channels: dict[str, np.ndarray] = {}
        self._fronts: dict[str, str] = {}
        self._codes: dict[str, ir.Value] = {}
        self._floats: dict[tuple[str, bool], ir.Value] = {}
        self._wide: set[str] = set()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires when there is a node of the domain `trtq`.

        Raises:
            LegalityError: a node names a layer that has no numbers.
        """
        graph = model.graph
        nodes = [n for n in graph if n.domain == DOMAIN and n.op_type in self.operators]
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        ranks: dict[str, int] = {}
        columns: dict[str, dict[str, np.ndarray]] = {}
        fronts: dict[tuple[int, bytes], str] = {}
        for node in nodes:
            name = node.attributes["name"].as_string()
            layer = self.layers.get(name)
            if layer is None or len(layer.operands) != len(node.inputs):
                raise LegalityError(f"the graph has a low-bit node {name!r} without its numbers")
            wide = node.op_type != "LowBitConv2d" and _wide(layer)
            for (operand, tensors), value in zip(layer.operands.items(), node.inputs, strict=True):
                if value is None or value.shape is None:
                    raise LegalityError(f"the shape of an input of {name!r} is not known")
                ranks[f"{name}/{operand}"] = len(value.shape)
                if isinstance(layer, LayerTensors):
                    self._channels[f"{name}/{operand}"] = layer.weight.scale.numpy().reshape(-1)
                own = columns[f"{name}/{operand}"] = _columns(tensors)
                identity = id(value), b"".join(column.tobytes() for column in own.values())
                front = fronts.setdefault(identity, f"{name}/{operand}")
                self._fronts[f"{name}/{operand}"] = front
                if front != f"{name}/{operand}":
                    columns[f"{name}/{operand}"] = {"scale": own["scale"]}
                if wide:
                    self._wide.add(front)
        values = self._step_values(graph, columns, ranks)
        for node in nodes:
            name = node.attributes["name"].as_string()
            layer = self.layers[name]
            steps = [values[f"{name}/{operand}"] for operand in layer.operands]
            if isinstance(layer, ProductTensors):
                self._expand_product(graph, node, name, layer, steps)
            else:
                self._expand_layer(graph, node, name, layer, steps[0])
        if all(node.domain != DOMAIN for node in graph):
            model.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, modified=True)

    def _step_values(
        self,
        graph: ir.Graph,
        columns: Mapping[str, dict[str, np.ndarray]],
        ranks: Mapping[str, int],
    ) -> dict[str, _StepValues]:
        """Look the step up once and hand every input its values."""
        found: dict[str, dict[str, ir.Value]] = {name: {} for name in ranks}
        builder = GraphBuilder(graph, self.prefix)
        varying: dict[str, dict[str, np.ndarray]] = {}
        for name, own in columns.items():
            for key, column in own.items():
                if not (column == column[0]).all():
                    varying.setdefault(name, {})[key] = column
                    continue
                # The same at every step, as clip limits often are: a constant.
                values = column[:1].reshape((1,) * ranks[name])
                if key == "scale" and name in self._channels:
                    values = self._shaped(self._channels[name] * column[0], ranks[name])
                found[name][key] = builder.constant(f"{name}/{key}", values)
        if varying:
            step = look_up_step(graph, self.table)
            self._gather(builder, step, varying, ranks, found)
            graph.insert_after(step.producer(), builder.nodes)  # type: ignore[arg-type]
        fronts = {name: found[self._fronts[name]] for name in found}
        return {
            name: _StepValues(
                self._fronts[name],
                v["inv_scale"],
                found[name]["scale"],
                v.get("low"),
                v.get("high"),
            )
            for name, v in fronts.items()
        }

    @staticmethod
    def _shaped(channels: np.ndarray, rank: int) -> np.ndarray:
        """`[N]` so that it broadcasts over an output: channels last, but first for images."""
        shape = (1, -1, 1, 1) if rank == 4 else (1,) * (rank - 1) + (-1,)
        return channels.reshape(shape)

    def _gather(
        self,
        builder: GraphBuilder,
        step: ir.Value,
        columns: Mapping[str, dict[str, np.ndarray]],
        ranks: Mapping[str, int],
        found: dict[str, dict[str, ir.Value]],
    ) -> None:
        """One Gather of `[T, values]` by the step.

        The scales of layers are multiplied by the weight's scales, for all layers of a rank at once.
        """
        by_rank = sorted({ranks[name] for name in columns})
        plain = {
            rank: [
                (name, key)
                for name, own in columns.items()
                for key in own
                if ranks[name] == rank and not (key == "scale" and name in self._channels)
            ]
            for rank in by_rank
        }
        layers = [name for name in columns if name in self._channels and "scale" in columns[name]]
        by_rank = [rank for rank in by_rank if plain[rank]]
        ordered = [place for rank in by_rank for place in plain[rank]]
        ordered += [(name, "scale") for name in layers]
        table = np.stack([columns[name][key] for name, key in ordered], axis=1)
        rows = builder.op("Gather", [builder.constant("table", table), step], "values", {"axis": 0})
        sizes = [len(plain[rank]) for rank in by_rank] + ([len(layers)] if layers else [])
        parts = [rows]
        if len(sizes) > 1:
            lengths = builder.constant("group_sizes", np.array(sizes, np.int64))
            parts = builder.op("Split", [rows, lengths], "groups", {"axis": 1}, len(sizes))
        for rank, part in zip(by_rank, parts, strict=False):
            if rank > 2:
                axes = builder.constant(f"axes_{rank}", np.arange(2, rank, dtype=np.int64))
                part = builder.op("Unsqueeze", [part, axes], f"rank_{rank}")
            count = len(plain[rank])
            singles = builder.op(
                "Split", [part], f"values_{rank}", {"axis": 1, "num_outputs": count}, count
            )
            singles = singles if count > 1 else [singles]
            for (name, key), value in zip(plain[rank], singles, strict=True):
                found[name][key] = value
        for rank in sorted({ranks[name] for name in layers}):
            own = [name for name in layers if ranks[name] == rank]
            self._channel_scales(builder, parts[-1], layers, own, rank, found)

    def _channel_scales(
        self,
        builder: GraphBuilder,
        scales: ir.Value,
        layers: Sequence[str],
        own: Sequence[str],
        rank: int,
        found: dict[str, dict[str, ir.Value]],
    ) -> None:
        """`d * s[step]` of the layers of one rank, from `scales[B, L]` of all layers."""
        sizes = [len(self._channels[name]) for name in own]
        places = np.repeat([layers.index(name) for name in own], sizes).astype(np.int64)
        index = builder.constant(f"channels_{rank}", places)
        weights = np.concatenate([self._channels[name] for name in own])[None]
        y = builder.op("Gather", [scales, index], f"scales_{rank}", {"axis": 1})
        y = builder.op("Mul", [builder.constant(f"weights_{rank}", weights), y], f"scaled_{rank}")
        axis = 1
        if rank > 2:
            axes = (2, 3) if rank == 4 else tuple(range(1, rank - 1))
            axis = 1 if rank == 4 else rank - 1
            shape = builder.constant(f"channel_axes_{rank}", np.array(axes, np.int64))
            y = builder.op("Unsqueeze", [y, shape], f"shaped_{rank}")
        parts = [y]
        if len(own) > 1:
            lengths = builder.constant(f"channel_sizes_{rank}", np.array(sizes, np.int64))
            attributes = {"axis": axis}
            parts = builder.op("Split", [y, lengths], f"split_{rank}", attributes, len(own))
        for name, part in zip(own, parts, strict=True):
            found[name]["scale"] = part

    def _operand(
        self, builder: GraphBuilder, x: ir.Value, step: _StepValues, prefix: str, *, paired: bool
    ) -> ir.Value:
        """Whole-number codes of an input, as float: dequantised if `paired`, else cast."""
        key = step.front, paired
        if key not in self._floats:
            one = builder.constant("one", np.array(1.0, np.float32))
            zero = builder.constant("zero", np.array(0, np.int8))
            if step.front not in self._codes:
                y = self._scaled(builder, x, step, prefix)
                self._codes[step.front] = builder.op(
                    "QuantizeLinear", [y, one, zero], f"{prefix}codes"
                )
            codes = self._codes[step.front]
            if paired:
                y = builder.op("DequantizeLinear", [codes, one, zero], f"{prefix}activation")
            else:
                y = builder.op("Cast", [codes], f"{prefix}activation", _FLOAT)
            # Later rewrites ask for its rank.
            y.shape, y.type = x.shape, ir.TensorType(ir.DataType.FLOAT)
            self._floats[key] = y
        return self._floats[key]

    @staticmethod
    def _scaled(builder: GraphBuilder, x: ir.Value, step: _StepValues, prefix: str) -> ir.Value:
        """An input in units of its step, clipped."""
        if x.dtype != ir.DataType.FLOAT:
            x = builder.op("Cast", [x], f"{prefix}float", _FLOAT)
        y: ir.Value = builder.op("Mul", [x, step.inv_scale], f"{prefix}scaled")
        if step.low is not None and step.high is not None:
            y = builder.op("Max", [y, step.low], f"{prefix}clip_low")
            y = builder.op("Min", [y, step.high], f"{prefix}clip_high")
        return y

    def _expand_layer(
        self, graph: ir.Graph, node: ir.Node, name: str, layer: LayerTensors, step: _StepValues
    ) -> None:
        builder = GraphBuilder(graph, name)
        (x,) = node.inputs
        assert x is not None
        conv = node.op_type == "LowBitConv2d"
        paired = conv or step.front not in self._wide
        y = self._operand(builder, x, step, "", paired=paired)
        weight = self._weight(builder, layer, transposed=not conv, paired=paired)
        if conv:
            attributes = {
                key: node.attributes[key].value for key in ("strides", "pads", "dilations", "group")
            }
            y = builder.op("Conv", [y, weight], "conv", attributes)
        else:
            y = builder.op("MatMul", [y, weight], "matmul")
        y = builder.op("Mul", [y, step.scale], "rescaled")
        channel = (-1, 1, 1) if conv else (-1,)
        if layer.bias is not None:
            bias = layer.bias.numpy().reshape(channel)
            y = builder.op("Add", [y, builder.constant("bias", bias)], "biased")
        self._finish(builder, node, y)

    def _expand_product(
        self,
        graph: ir.Graph,
        node: ir.Node,
        name: str,
        layer: ProductTensors,
        steps: Sequence[_StepValues],
    ) -> None:
        builder = GraphBuilder(graph, name)
        paired = not any(step.front in self._wide for step in steps)
        left, right = (
            self._operand(builder, x, step, f"{operand}_", paired=paired)  # type: ignore[arg-type]
            for x, step, operand in zip(node.inputs, steps, layer.operands, strict=True)
        )
        y = builder.op("MatMul", [left, right], "matmul")
        for step, operand in zip(steps, layer.operands, strict=True):
            y = builder.op("Mul", [y, step.scale], f"{operand}_rescaled")
        self._finish(builder, node, y)

    @staticmethod
    def _finish(builder: GraphBuilder, node: ir.Node, y: ir.Value) -> None:
        """Back to the graph's own type, and into the node's place."""
        (out,) = node.outputs
        dtype = node.inputs[0].dtype  # type: ignore[union-attr]
        if dtype != ir.DataType.FLOAT:
            y = builder.op("Cast", [y], "narrow", {"to": dtype.value})  # type: ignore[union-attr]
        y.shape, y.type = out.shape, out.type
        ir.convenience.replace_nodes_and_values(
            builder.graph, node, [node], builder.nodes, [out], [y]
        )

    @staticmethod
    def _weight(
        builder: GraphBuilder, layer: LayerTensors, *, transposed: bool, paired: bool
    ) -> ir.Value:
        """The integers as float; `[N, K, kh, kw]`, or `[K, N]` when transposed."""
        packed = layer.weight

        def turned(array: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(array.T) if transposed else array

        if packed.bits > 4:
            integers = builder.constant("weight", turned(packed.integers().numpy()))
        else:
            codes = turned(packed.codes.numpy().astype(np.int8) - _INT4_OFFSET)
            stored = builder.constant(
                "weight", ir.tensor(codes.astype(ml_dtypes.int4), dtype=ir.DataType.INT4)
            )
            offset = turned(packed.zero_point.numpy().astype(np.int8) - _INT4_OFFSET)
            wide = builder.op("Cast", [stored], "weight_int8", {"to": ir.DataType.INT8.value})
            integers = builder.op(
                "Sub", [wide, builder.constant("weight_zero_point", offset)], "weight_integers"
            )
        weight: ir.Value
        if paired:
            scale = builder.constant("ones", np.ones(len(packed.codes), np.float32))
            axis = {"axis": 1 if transposed else 0}
            weight = builder.op("DequantizeLinear", [integers, scale], "weight_float", axis)
        else:
            weight = builder.op("Cast", [integers], "weight_float", _FLOAT)
        return weight
