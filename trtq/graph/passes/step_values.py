"""Values of low-bit inputs that depend on the denoising step, fetched with one Gather per graph.

Letters: B batch items, T calibrated steps, N output channels, L layers.

The step of each batch item is looked up once per graph from `timestep`. One Gather from a table `[T,
values]` fetches the values of all inputs. Values that are equal at every step are constants instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder
from trtq.graph.passes.step_columns import Axes, Column, gather_columns
from trtq.graph.passes.step_lookup import StepInput, look_up_step
from trtq.quant.tensors import ActivationTensors
from trtq.quant.timestep import TimestepTable

__all__ = ["StepTable", "StepValues"]

_INT8 = (-128, 127)
_TIMESTEP = StepInput()


@dataclass(frozen=True)
class StepValues:
    """Values of one input at the step of each batch item, shaped to broadcast over the input.

    Attributes:
        quantizer: name of the input whose quantised codes this input uses; often this input.
        inv_scale: reciprocal of the scale; None: the scale is computed per row.
        scale: the scale; for a layer, multiplied by the weight's scales and shaped to broadcast over
            the output. If scales are computed per row: the largest scale, or None without a limit.
        low: smallest code; None if int8 saturates there.
        high: largest code; None if int8 saturates there.
    """

    quantizer: str
    inv_scale: ir.Value | None
    scale: ir.Value | None
    low: ir.Value | None
    high: ir.Value | None


@dataclass(frozen=True)
class _Input:
    """An input of a low-bit node.

    Attributes:
        shape: the axes of the input.
        quantizer: see `StepValues`.
        columns: values per step, float32 `[T]` each, by key.
        weight_scale: scales of the weight, `[N]`, by which the scale is multiplied; None for an operand
            of a product of activations, and for scales per row.
        first: name of the input in the first call of the layer with as many axes, whose values this
            input uses; this input itself unless the layer is called again.
    """

    shape: Axes
    quantizer: str
    columns: Mapping[str, np.ndarray]
    weight_scale: np.ndarray | None
    first: str

    def weight_scale_of(self, key: str) -> np.ndarray | None:
        """The weight's scales if the column `key` is multiplied by them, else None."""
        return self.weight_scale if key == "scale" else None


class StepTable:
    """The values of all low-bit inputs of a graph. Call `add` for every input, then `insert` once.

    Args:
        graph: the graph to which the nodes are added.
        timesteps: the calibrated timesteps.
        prefix: prefix of the names of the new nodes.
        timestep: the graph input that determines the step.
    """

    def __init__(
        self,
        graph: ir.Graph,
        timesteps: TimestepTable,
        prefix: str,
        timestep: StepInput = _TIMESTEP,
    ) -> None:
        self._timestep = timestep
        self._graph = graph
        self._timesteps = timesteps
        self._prefix = prefix
        self._inputs: dict[str, _Input] = {}
        self._quantizers: dict[tuple[int, bytes], str] = {}
        self._first: dict[tuple[str, Axes], str] = {}

    def add(
        self,
        name: str,
        value: ir.Value,
        tensors: ActivationTensors,
        weight_scale: np.ndarray | None = None,
        *,
        channel: int | None = None,
        repeats: str | None = None,
        key: bytes = b"",
        codes: str = "int8",
    ) -> str:
        """Register an input.

        Args:
            name: unique name of the input.
            value: the float tensor that is to be quantised.
            tensors: scale and range of the input at every step.
            weight_scale: scales `[N]` of the layer's weight; None for a product of activations.
            channel: index of the channel axis of the layer's output; None: the last axis.
            repeats: name of the input in the first call of the same layer; None: this is the first.
            key: bytes that differ for inputs that are quantised differently for other reasons.
            codes: type of the codes; inputs share codes of one type only.

        Returns:
            Name of the first input with the same tensor, columns and key, whose codes both use.
        """
        assert value.shape is not None
        columns = _columns(tensors, clipped=codes != "fp8")
        contents = b"".join(column.tobytes() for column in columns.values())
        identity = id(value), b"|".join((key, tensors.policy.encode(), codes.encode(), contents))
        quantizer = self._quantizers.setdefault(identity, name)
        rank = len(value.shape)
        shape = Axes(rank, rank - 1 if channel is None else channel)
        first = self._first.setdefault((repeats or name, shape), name)
        if first != name:
            columns = {}
        elif quantizer != name:
            columns = {key: column for key, column in columns.items() if key == "scale"}
        if tensors.policy != "step":
            weight_scale = None
        self._inputs[name] = _Input(shape, quantizer, columns, weight_scale, first)
        return quantizer

    def insert(self) -> dict[str, StepValues]:
        """Insert the nodes into the graph and return the values by input."""
        values: dict[str, dict[str, ir.Value]] = {name: {} for name in self._inputs}
        builder = GraphBuilder(self._graph, self._prefix)
        varying = self._insert_constants(builder, values)
        if varying:
            step = look_up_step(self._graph, self._timesteps, self._timestep)
            gather_columns(builder, step, varying, values)
            self._graph.insert_after(step.producer(), builder.nodes)  # type: ignore[arg-type]
        result = {}
        for name, entry in self._inputs.items():
            shared = values[self._inputs[entry.first].quantizer]
            result[name] = StepValues(
                entry.quantizer,
                shared.get("inv_scale"),
                values[entry.first].get("scale"),
                shared.get("low"),
                shared.get("high"),
            )
        return result

    def _insert_constants(
        self, builder: GraphBuilder, values: Mapping[str, dict[str, ir.Value]]
    ) -> list[Column]:
        """Fill in the values that are equal at every step, and return the other columns."""
        varying = []
        for name, entry in self._inputs.items():
            for key, column in entry.columns.items():
                weight_scale = entry.weight_scale_of(key)
                if not (column == column[0]).all():
                    varying.append(Column(name, key, entry.shape, column, weight_scale))
                    continue
                scales, sizes = column[:1], [1] * entry.shape.rank
                if weight_scale is not None:
                    scales, sizes[entry.shape.channel] = weight_scale * column[0], -1
                constant = scales.reshape(sizes)
                values[name][key] = builder.constant(f"{name}/{key}", constant)
        return varying


def _columns(operand: ActivationTensors, *, clipped: bool) -> dict[str, np.ndarray]:
    """Values of an input that the graph needs at every step, float32 `[T]` each, by key.

    Args:
        operand: tensors of the input.
        clipped: whether the codes have limits that depend on the step.
    """
    columns = {}
    if operand.policy == "step":
        columns["inv_scale"] = operand.inv_scale.numpy()
    if operand.policy != "row":
        columns["scale"] = operand.scale.numpy()
    if not clipped:
        return columns
    low, high = operand.low.numpy(), operand.high.numpy()
    # At the limits of int8, the saturation of QuantizeLinear replaces the clip.
    if not ((low == _INT8[0]).all() and (high == _INT8[1]).all()):
        columns |= {"low": low.astype(np.float32), "high": high.astype(np.float32)}
    return columns
