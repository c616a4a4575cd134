"""The layer as a plugin whose kernel is part of the engine, with full TensorRT's `@aot_impl`.

Such an engine needs neither Python nor this package at run time. TensorRT limits such a plugin to one
launch without workspace, so the plugin uses the fused kernel, with one tile for all shapes. The plugins
replace those of `trtq.plugins.low_bit.tensorrt` and have the same names, inputs and attributes.

No `from __future__ import annotations` here: TensorRT reads the annotations of these functions.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from trtq.plugins.low_bit.attributes import FIELDS, INPUTS, NAMESPACE, PLUGINS, spec_of
from trtq.plugins.spec import Geometry, LayerSpec
from trtq.plugins.variants import ONE_LAUNCH_TILES, Tile, Variant

__all__ = ["register_ahead_of_time", "register_all"]

_LARGE_TILE_CHANNELS = 128
"""Minimum number of output channels for which the larger tile is faster."""


def _tile(layer: LayerSpec) -> Tile:
    groups = 1 if layer.geometry is None else layer.geometry.groups
    return ONE_LAUNCH_TILES[layer.out_channels // groups >= _LARGE_TILE_CHANNELS]


def _out_size(size: Any, geometry: Geometry, axis: int) -> Any:
    """Output size along an axis; sizes are integers or TensorRT's expressions."""
    border = geometry.dilation[axis] * (geometry.kernel[axis] - 1) + 1 - 2 * geometry.padding[axis]
    return (size - border) // geometry.stride[axis] + 1


def _shape_arguments(layer: LayerSpec, shape: Any) -> tuple[list[Any], Any]:
    """The integers of `trtq.plugins.arguments.shape_arguments`, and the number of output rows."""
    g = layer.geometry or Geometry()
    if layer.geometry is None:
        height: Any = 1
        for axis in range(1, len(shape) - 1):
            height = shape[axis] * height
        width: Any = 1
        out = height, 1
    else:
        height, width = shape[2], shape[3]
        out = _out_size(height, g, 0), _out_size(width, g, 1)
    sizes = [shape[0], height, width, layer.channels // g.groups, *out, layer.out_channels]
    fixed = [g.groups, *g.kernel, *g.stride, *g.padding, *g.dilation, layer.steps]
    return [*sizes, *fixed], shape[0] * out[0] * out[1]


def _annotated(function: Any, names: dict[str, Any], returns: Any) -> Any:
    """Set the signature that TensorRT inspects on a function of `*arguments`."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind, annotation=type_) for name, type_ in names.items()],
        return_annotation=returns,
    )
    return function


def register_ahead_of_time(
    trt: Any, trtp: Any, code_of: Callable[[Variant], bytes], name: str
) -> None:
    """Define one plugin.

    Args:
        trt: the module `tensorrt`.
        trtp: the module `tensorrt.plugin`.
        code_of: function that compiles a kernel for the current GPU, see `trtq.plugins.compile.ptx`.
        name: one of `trtq.plugins.low_bit.attributes.PLUGINS`.
    """
    tensors: dict[str, Any] = dict.fromkeys(INPUTS, trtp.TensorDesc)
    arguments = tensors | dict.fromkeys(FIELDS, npt.NDArray[np.int32])

    def layer_of(values: tuple[Any, ...]) -> LayerSpec:
        fields = dict(zip(FIELDS, values[len(INPUTS) :], strict=False))
        return spec_of(name, {key: [int(v) for v in value] for key, value in fields.items()})

    def describe(*values: Any) -> Any:
        x, layer = values[0], layer_of(values)
        out = x.like()
        if layer.geometry is None:
            out.shape_expr[len(out.shape_expr) - 1] = layer.out_channels
        else:
            out.shape_expr[1] = layer.out_channels
            for axis in (0, 1):
                size = x.shape_expr[2 + axis]
                out.shape_expr[2 + axis] = _out_size(size, layer.geometry, axis)
        return out

    def implement(*values: Any) -> Any:
        x, layer = values[0], layer_of(values)
        integers, rows = _shape_arguments(layer, x.shape_expr)
        tile, groups = _tile(layer), 1 if layer.geometry is None else layer.geometry.groups
        half = x.dtype == trt.DataType.HALF
        variant = Variant(
            "low_bit",
            half,
            False,
            layer.weight_bits,
            fused=True,
            tile=tile,
            channels_last=layer.geometry is None,
        )
        launch = trtp.KernelLaunchParams()
        launch.grid_x = -(-(layer.out_channels // groups) // tile.n)
        launch.grid_y = (rows + (tile.m - 1)) // tile.m
        launch.grid_z = groups
        launch.block_x, launch.shared_mem = tile.threads, variant.shared_bytes
        extra = trtp.SymIntExprs(len(integers))
        for index, value in enumerate(integers):
            extra[index] = trtp.SymInt32(value)
        return variant.kernel, code_of(variant), launch, extra

    plugin = f"{NAMESPACE}::{name}"
    trtp.register(plugin)(_annotated(describe, arguments, trtp.TensorDesc))
    outputs = {"outputs": tuple[trtp.TensorDesc], "tactic": int}
    returns = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    trtp.aot_impl(plugin)(_annotated(implement, arguments | outputs, returns))


def register_all(trt: Any, trtp: Any, code_of: Callable[[Variant], bytes]) -> None:
    """Define both plugins; arguments are those of `register_ahead_of_time`."""
    for name in PLUGINS:
        register_ahead_of_time(trt, trtp, code_of, name)
