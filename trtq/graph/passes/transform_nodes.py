"""Nodes that transform the input of a low-bit layer: smoothing and rotation.

Smoothing is `Mul(1 / c)`. A rotation by H of order M is, for a linear layer with K input channels,

    Reshape[..., K / M, M] -> MatMul(H) -> Reshape[..., K]

and for a convolution a convolution with taps of size 1 in K / M groups, whose weight holds H for each
group. Both are computed in the float type of the graph.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.errors import LegalityError
from trtq.graph.passes.builder import GraphBuilder
from trtq.quant.input_transform import TransformTensors, hadamard

__all__ = ["TransformNodes"]


class TransformNodes:
    """Adds the nodes to a graph; inputs that are transformed alike share them."""

    def __init__(self) -> None:
        self._transformed: dict[tuple[int, bytes, bool], tuple[ir.Value, ir.Value]] = {}

    def transformed(
        self,
        builder: GraphBuilder,
        x: ir.Value,
        transform: TransformTensors,
        *,
        channels_first: bool,
    ) -> ir.Value:
        """The transformed input.

        Args:
            builder: builder of the layer.
            x: input of the layer, `[..., K]`, or `[B, K, ...]` with channels first.
            transform: smoothing and rotation.
            channels_first: whether the channels are axis 1 instead of the last axis.

        Raises:
            LegalityError: the shape of the input is unknown.
        """
        if x.shape is None or x.dtype is None:
            raise LegalityError(
                f"the shape of {x.name!r}, an input that is transformed, is not known"
            )
        key = id(x), transform.key, channels_first
        if key not in self._transformed:
            y = self._smoothed(builder, x, transform, channels_first)
            if transform.rotation:
                rotate = _rotated_channels if channels_first else _rotated_rows
                y = rotate(builder, y, len(x.shape), transform.rotation)
            y.shape, y.type = x.shape, x.type
            # The value is kept with its input, since the id of a freed value may be used again.
            self._transformed[key] = x, y
        return self._transformed[key][1]

    @staticmethod
    def _smoothed(
        builder: GraphBuilder, x: ir.Value, transform: TransformTensors, channels_first: bool
    ) -> ir.Value:
        inverse = transform.inv_channels
        if inverse is None:
            return x
        assert x.shape is not None
        axes = (1,) * (len(x.shape) - 2 if channels_first else 0)
        factors = inverse.numpy().reshape(-1, *axes)
        constant = builder.constant("smoothing", _as_type(factors, x))
        y: ir.Value = builder.op("Mul", [x, constant], "smoothed")
        y.shape, y.type = x.shape, x.type
        return y


def _rotated_rows(builder: GraphBuilder, x: ir.Value, rank: int, order: int) -> ir.Value:
    """Rotate the last axis of `x[..., K]`."""
    assert x.shape is not None
    channels = x.shape[-1]
    assert isinstance(channels, int)
    keep = [0] * (rank - 1)
    shared = GraphBuilder(builder.graph, builder.prefix, "transforms")
    sizes = np.array([*keep, channels // order, order], np.int64)
    split = shared.constant(f"split_{rank}_{channels}_{order}", sizes)
    values = _as_type(hadamard(order).numpy(), x)
    matrix = shared.constant(f"rotation_{order}_{values.dtype}", values)
    y = builder.op("Reshape", [x, split], "rotation_groups")
    y.dtype = x.dtype
    y = builder.op("MatMul", [y, matrix], "rotated_groups")
    y.dtype = x.dtype
    joined = shared.constant(f"joined_{rank}_{channels}", np.array([*keep, channels], np.int64))
    result: ir.Value = builder.op("Reshape", [y, joined], "rotated")
    return result


def _rotated_channels(builder: GraphBuilder, x: ir.Value, rank: int, order: int) -> ir.Value:
    """Rotate axis 1 of `x[B, K, ...]`."""
    assert x.shape is not None
    channels = x.shape[1]
    assert isinstance(channels, int)
    groups = channels // order
    blocks = np.tile(hadamard(order).numpy(), (groups, 1)).reshape(
        channels, order, *(1,) * (rank - 2)
    )
    shared = GraphBuilder(builder.graph, builder.prefix, "transforms")
    values = _as_type(blocks, x)
    weight = shared.constant(f"rotation_{order}_{channels}_{rank}_{values.dtype}", values)
    result: ir.Value = builder.op("Conv", [x, weight], "rotated", {"group": groups})
    return result


def _as_type(values: np.ndarray, x: ir.Value) -> np.ndarray:
    """The values in the float type of a graph value."""
    assert x.dtype is not None
    return values.astype(x.dtype.numpy())
