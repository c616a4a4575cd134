"""Values of low-bit inputs that depend on the denoising step, fetched with one Gather per graph.

Letters: B batch items, T calibrated steps, N output channels, L layers.

The step of each batch item is looked up once per graph from `timestep`. One Gather from a table `[T,
values]` fetches the values of all inputs. Values that are equal at every step are constants instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder
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
        inv_scale: reciprocal of the scale.
        scale: the scale; for a layer, multiplied by the weight's scales and shaped to broadcast over
            the output.
        low: smallest code; None if int8 saturates there.
        high: largest code; None if int8 saturates there.
    """

    quantizer: str
    inv_scale: ir.Value
    scale: ir.Value
    low: ir.Value | None
    high: ir.Value | None


@dataclass(frozen=True)
class _Input:
    """An input of a low-bit node.

    Attributes:
        rank: number of axes.
        quantizer: see `StepValues`.
        columns: values per step, float32 `[T]` each, by key.
        weight_scale: scales of the weight, `[N]`; None for an operand of a product of activations.
    """

    rank: int
    quantizer: str
    columns: Mapping[str, np.ndarray]
    weight_scale: np.ndarray | None

    def weight_scale_of(self, key: str) -> np.ndarray | None:
        """The weight's scales if the column `key` is multiplied by them, else None."""
        return self.weight_scale if key == "scale" else None


@dataclass(frozen=True, eq=False)
class _Column:
    """A column of the table: one value of one input at every step.

    Attributes:
        name: name of the input.
        key: `inv_scale`, `scale`, `low` or `high`.
        rank: number of axes of the input.
        values: float32 `[T]`.
        weight_scale: factors of the value, `[N]`; None: the value is not multiplied.
    """

    name: str
    key: str
    rank: int
    values: np.ndarray
    weight_scale: np.ndarray | None


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

    def add(
        self,
        name: str,
        value: ir.Value,
        tensors: ActivationTensors,
        weight_scale: np.ndarray | None = None,
    ) -> str:
        """Register an input.

        Args:
            name: unique name of the input.
            value: the float tensor that is to be quantised.
            tensors: scale and range of the input at every step.
            weight_scale: scales `[N]` of the layer's weight; None for a product of activations.

        Returns:
            Name of the first input with the same tensor and the same columns, whose codes both use.
        """
        assert value.shape is not None
        columns = _columns(tensors)
        identity = id(value), b"".join(column.tobytes() for column in columns.values())
        quantizer = self._quantizers.setdefault(identity, name)
        if quantizer != name:
            columns = {"scale": columns["scale"]}
        self._inputs[name] = _Input(len(value.shape), quantizer, columns, weight_scale)
        return quantizer

    def insert(self) -> dict[str, StepValues]:
        """Insert the nodes into the graph and return the values by input."""
        values: dict[str, dict[str, ir.Value]] = {name: {} for name in self._inputs}
        builder = GraphBuilder(self._graph, self._prefix)
        varying = self._insert_constants(builder, values)
        if varying:
            step = look_up_step(self._graph, self._timesteps, self._timestep)
            _gather(builder, step, varying, values)
            self._graph.insert_after(step.producer(), builder.nodes)  # type: ignore[arg-type]
        result = {}
        for name, entry in self._inputs.items():
            shared = values[entry.quantizer]
            result[name] = StepValues(
                entry.quantizer,
                shared["inv_scale"],
                values[name]["scale"],
                shared.get("low"),
                shared.get("high"),
            )
        return result

    def _insert_constants(
        self, builder: GraphBuilder, values: Mapping[str, dict[str, ir.Value]]
    ) -> list[_Column]:
        """Fill in the values that are equal at every step, and return the other columns."""
        varying = []
        for name, entry in self._inputs.items():
            for key, column in entry.columns.items():
                weight_scale = entry.weight_scale_of(key)
                if not (column == column[0]).all():
                    varying.append(_Column(name, key, entry.rank, column, weight_scale))
                    continue
                if weight_scale is None:
                    constant = column[:1].reshape((1,) * entry.rank)
                else:
                    constant = _per_channel(weight_scale * column[0], entry.rank)
                values[name][key] = builder.constant(f"{name}/{key}", constant)
        return varying


def _columns(operand: ActivationTensors) -> dict[str, np.ndarray]:
    """Values of an input that the graph needs at every step, float32 `[T]` each, by key."""
    columns = {
        "inv_scale": operand.inv_scale.numpy(),
        "scale": operand.scale.numpy(),
    }
    low, high = operand.low.numpy(), operand.high.numpy()
    # At the limits of int8, the saturation of QuantizeLinear replaces the clip.
    if not ((low == _INT8[0]).all() and (high == _INT8[1]).all()):
        columns |= {"low": low.astype(np.float32), "high": high.astype(np.float32)}
    return columns


def _per_channel(scales: np.ndarray, rank: int) -> np.ndarray:
    """Scales `[N]` shaped to broadcast over an output: channels last, but second for images."""
    shape = (1, -1, 1, 1) if rank == 4 else (1,) * (rank - 1) + (-1,)
    return scales.reshape(shape)


def _gather(
    builder: GraphBuilder,
    step: ir.Value,
    columns: Sequence[_Column],
    values: Mapping[str, dict[str, ir.Value]],
) -> None:
    """Fill in the values with one Gather from the table `[T, values]` by step.

    The table holds the plain columns, grouped by rank, and then one column per layer. The columns of all
    layers of a rank are multiplied by their weights' scales at once.
    """
    layers = [column for column in columns if column.weight_scale is not None]
    groups = _by_rank([column for column in columns if column.weight_scale is None])
    ordered = [*chain.from_iterable(groups.values()), *layers]
    table = np.stack([column.values for column in ordered], axis=1)
    rows = builder.op("Gather", [builder.constant("table", table), step], "values", {"axis": 0})
    sizes = [len(group) for group in groups.values()] + ([len(layers)] if layers else [])
    parts = [rows]
    if len(sizes) > 1:
        lengths = builder.constant("group_sizes", np.array(sizes, np.int64))
        parts = builder.op("Split", [rows, lengths], "groups", {"axis": 1}, len(sizes))
    for (rank, group), part in zip(groups.items(), parts, strict=False):
        _store(values, group, _split(builder, part, len(group), rank))
    for rank, group in _by_rank(layers).items():
        places = [layers.index(column) for column in group]
        _store(values, group, _channel_scales(builder, parts[-1], group, places, rank))


def _store(
    values: Mapping[str, dict[str, ir.Value]],
    columns: Sequence[_Column],
    results: Sequence[ir.Value],
) -> None:
    for column, value in zip(columns, results, strict=True):
        values[column.name][column.key] = value


def _by_rank(columns: Sequence[_Column]) -> dict[int, list[_Column]]:
    """Columns grouped by the rank of their inputs, smallest rank first."""
    ranks = sorted({column.rank for column in columns})
    return {rank: [column for column in columns if column.rank == rank] for rank in ranks}


def _split(builder: GraphBuilder, part: ir.Value, count: int, rank: int) -> list[ir.Value]:
    """`part[B, count]` as `count` values of shape `[B, 1, ...]` with `rank` axes."""
    if rank > 2:
        axes = builder.constant(f"axes_{rank}", np.arange(2, rank, dtype=np.int64))
        part = builder.op("Unsqueeze", [part, axes], f"rank_{rank}")
    attributes = {"axis": 1, "num_outputs": count}
    singles = builder.op("Split", [part], f"values_{rank}", attributes, count)
    return singles if count > 1 else [singles]


def _channel_scales(
    builder: GraphBuilder,
    scales: ir.Value,
    layers: Sequence[_Column],
    places: Sequence[int],
    rank: int,
) -> list[ir.Value]:
    """The products `weight scale * scale[step]` of the layers of one rank.

    Args:
        builder: builder that collects the nodes.
        scales: scales of all layers at the step of each item, `[B, L]`.
        layers: the layers of this rank.
        places: index of each of `layers` in `scales`.
        rank: number of axes of the layers' inputs.
    """
    weight_scales = [column.weight_scale for column in layers if column.weight_scale is not None]
    sizes = [len(weight_scale) for weight_scale in weight_scales]
    index = builder.constant(f"channels_{rank}", np.repeat(places, sizes).astype(np.int64))
    weights = builder.constant(f"weights_{rank}", np.concatenate(weight_scales)[None])
    y = builder.op("Gather", [scales, index], f"scales_{rank}", {"axis": 1})
    y = builder.op("Mul", [weights, y], f"scaled_{rank}")
    axis = 1
    if rank > 2:
        axes = (2, 3) if rank == 4 else tuple(range(1, rank - 1))
        axis = 1 if rank == 4 else rank - 1
        shape = builder.constant(f"channel_axes_{rank}", np.array(axes, np.int64))
        y = builder.op("Unsqueeze", [y, shape], f"shaped_{rank}")
    if len(layers) == 1:
        return [y]
    lengths = builder.constant(f"channel_sizes_{rank}", np.array(sizes, np.int64))
    parts: list[ir.Value] = builder.op(
        "Split", [y, lengths], f"split_{rank}", {"axis": axis}, len(layers)
    )
    return parts
