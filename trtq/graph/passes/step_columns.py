"""Columns of the table of values that depend on the denoising step, and the Gather that fetches them.

Letters: B batch items, T calibrated steps, N output channels, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["Axes", "Column", "gather_columns"]

_Key = TypeVar("_Key")


class Axes(NamedTuple):
    """The axes of an input and of the output of its layer.

    Attributes:
        rank: number of axes.
        channel: index of the output's channel axis.
    """

    rank: int
    channel: int

    @property
    def key(self) -> str:
        """Part of the names of nodes: the rank, and the place of the channels unless it is usual."""
        if self.channel == (1 if self.rank == 4 else self.rank - 1):
            return str(self.rank)
        return f"{self.rank}_channels_{self.channel}"


@dataclass(frozen=True, eq=False)
class Column:
    """A column of the table: one value of one input at every step.

    Attributes:
        name: name of the input.
        key: `inv_scale`, `scale`, `low` or `high`.
        shape: the axes of the input.
        values: float32 `[T]`.
        weight_scale: factors of the value, `[N]`; None: the value is not multiplied.
    """

    name: str
    key: str
    shape: Axes
    values: np.ndarray
    weight_scale: np.ndarray | None


def gather_columns(
    builder: GraphBuilder,
    step: ir.Value,
    columns: Sequence[Column],
    values: Mapping[str, dict[str, ir.Value]],
) -> None:
    """Fill in the values with one Gather from the table `[T, values]` by step.

    Args:
        builder: builder that collects the nodes.
        step: step of each item, int64 `[B]`.
        columns: the columns.
        values: dictionaries of values by name of the input, which this function fills.

    The table holds the plain columns, grouped by rank, and then one column per layer. The columns of all
    layers of a rank are multiplied by their weights' scales at once.
    """
    layers = [column for column in columns if column.weight_scale is not None]
    plain = [column for column in columns if column.weight_scale is None]
    groups = _grouped(plain, lambda shape: shape.rank)
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
    for shape, group in _grouped(layers, lambda shape: shape).items():
        places = [layers.index(column) for column in group]
        _store(values, group, _channel_scales(builder, parts[-1], group, places, shape))


def _store(
    values: Mapping[str, dict[str, ir.Value]],
    columns: Sequence[Column],
    results: Sequence[ir.Value],
) -> None:
    for column, value in zip(columns, results, strict=True):
        values[column.name][column.key] = value


def _grouped(columns: Sequence[Column], key: Callable[[Axes], _Key]) -> dict[_Key, list[Column]]:
    """Columns grouped by a property of their inputs' axes, smallest first."""
    keys = sorted({key(column.shape) for column in columns})  # type: ignore[type-var]
    return {each: [column for column in columns if key(column.shape) == each] for each in keys}


def _split(builder: GraphBuilder, part: ir.Value, count: int, rank: int) -> list[ir.Value]:
    """`part[B, count]` as `count` values of shape `[B, 1, ...]` with `rank` axes."""
    if rank == 1:
        part = _squeezed(builder, part, f"rank_{rank}")
    if rank > 2:
        axes = builder.constant(f"axes_{rank}", np.arange(2, rank, dtype=np.int64))
        part = builder.op("Unsqueeze", [part, axes], f"rank_{rank}")
    attributes = {"axis": min(1, rank - 1), "num_outputs": count}
    singles = builder.op("Split", [part], f"values_{rank}", attributes, count)
    return singles if count > 1 else [singles]


def _channel_scales(
    builder: GraphBuilder,
    scales: ir.Value,
    layers: Sequence[Column],
    places: Sequence[int],
    shape: Axes,
) -> list[ir.Value]:
    """The products `weight scale * scale[step]` of the layers of one rank.

    Args:
        builder: builder that collects the nodes.
        scales: scales of all layers at the step of each item, `[B, L]`.
        layers: the layers of this rank.
        places: index of each of `layers` in `scales`.
        shape: the axes of the layers' inputs.
    """
    (rank, axis), key = shape, shape.key
    weight_scales = [column.weight_scale for column in layers if column.weight_scale is not None]
    sizes = [len(weight_scale) for weight_scale in weight_scales]
    index = builder.constant(f"channels_{key}", np.repeat(places, sizes).astype(np.int64))
    weights = builder.constant(f"weights_{key}", np.concatenate(weight_scales)[None])
    y = builder.op("Gather", [scales, index], f"scales_{key}", {"axis": 1})
    y = builder.op("Mul", [weights, y], f"scaled_{key}")
    if rank == 1:
        y = _squeezed(builder, y, f"shaped_{key}")
    if rank > 2:
        axes = [place for place in range(1, rank) if place != axis]
        shaped = builder.constant(f"channel_axes_{key}", np.array(axes, np.int64))
        y = builder.op("Unsqueeze", [y, shaped], f"shaped_{key}")
    if len(layers) == 1:
        return [y]
    lengths = builder.constant(f"channel_sizes_{key}", np.array(sizes, np.int64))
    parts: list[ir.Value] = builder.op(
        "Split", [y, lengths], f"split_{key}", {"axis": axis}, len(layers)
    )
    return parts


def _squeezed(builder: GraphBuilder, row: ir.Value, name: str) -> ir.Value:
    """The values `[1, N]` of one step as `[N]`, for inputs without a batch axis."""
    y: ir.Value = builder.op("Squeeze", [row, builder.constant("axis_0", np.array([0]))], name)
    return y
