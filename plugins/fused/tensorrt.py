"""Fused layers as plugins of TensorRT and TensorRT-RTX (`IPluginV3` in Python).

    trtq::FusedLinear(x, weight, terms, tables, step [, affine] [, image_shift] [, residual]) -> y
    trtq::FusedConv2d(x, weight, terms, tables, step [, affine] [, image_shift] [, residual]) -> y

`trtq.plugins.fused.attributes` describes inputs and attributes. Graphs in files have only the nodes of
layers alone; `trtq.graph.runtimes.fuse_plugins` makes these nodes when an engine is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trtq.plugins.device import current_device
from trtq.plugins.fused.attributes import (
    FUSED_FIELDS,
    FUSED_PLUGINS,
    Fusion,
    fused_fields,
    fusion_of,
    input_names,
)
from trtq.plugins.fused.launches import FusedCall, FusedPointers, prepare_fused, start_fused
from trtq.plugins.launch import Device, Pointers
from trtq.plugins.low_bit import tensorrt as low_bit
from trtq.plugins.low_bit.registry import plugin_bases, recording_failures, register_creators
from trtq.plugins.low_bit.tensorrt import PluginMethods, aligned
from trtq.plugins.spec import MAX_SPLIT_BYTES, LayerSpec

__all__ = ["register"]


class _FusedMethods(PluginMethods):
    """The methods that TensorRT calls on a fused plugin.

    Attributes:
        fusion: what the plugin computes in addition to its layer.
    """

    fusion: Fusion

    def clone(self) -> Any:
        return type(self)(self.plugin_name, self.layer, self.fusion)  # type: ignore[call-arg]

    @recording_failures
    def attach_to_context(self, _: Any) -> Any:
        clone, gpu = self.clone(), self._gpu()
        if gpu is not None:
            prepare_fused(gpu, self.layer, self.fusion)
        return clone

    @recording_failures
    def get_output_shapes(self, inputs: Any, _: Any, build: Any) -> Any:
        x, channels = inputs[0], build.constant(self.layer.out_channels)
        shape = self._trt.DimsExprs(x)
        if self.layer.geometry is None:
            if self.fusion.heads:
                shape = self._trt.DimsExprs(3)
                shape[0], shape[1] = x[0], x[2]
            shape[len(shape) - 1] = channels
            return [shape]
        height, width = (x[1], x[2]) if self.fusion.x_last else (x[2], x[3])
        height, width = self._out_size(height, width, build)
        order = (height, width, channels) if self.fusion.out_last else (channels, height, width)
        for axis, size in enumerate(order):
            shape[1 + axis] = size
        return [shape]

    def supports_format_combination(self, pos: int, tensors: Any, count: int) -> bool:
        names = input_names(self.fusion)
        tensor, types = tensors[pos].desc, self._trt.DataType
        if tensor.format != self._trt.TensorFormat.LINEAR or count != len(names):
            return False
        if pos == 0:
            return tensor.type in (types.HALF, types.FLOAT)
        fixed = {"weight": types.INT8, "step": types.INT64}
        fixed |= dict.fromkeys(("terms", "tables", "affine"), types.FLOAT)
        name = names[pos] if pos < len(names) else "out"
        return bool(tensor.type == fixed.get(name, tensors[0].desc.type))

    def _call(self, shape: Any) -> FusedCall:
        return FusedCall.of(self.layer, self.fusion, tuple(shape))

    @recording_failures
    def get_workspace_size(self, inputs: Any, _: Any) -> int:
        call = self._call(inputs[0].max)
        sizes = call.source.code_bytes(native_4=False), call.source.sum_bytes, call.statistics_bytes
        # The call may be smaller than the maximum, and divide k.
        return sum(map(aligned, sizes)) + MAX_SPLIT_BYTES

    @recording_failures
    def on_shape_change(self, inputs: Any, _: Any) -> None:
        self._call(inputs[0].dims)
        gpu = self._gpu()
        if gpu is not None:
            # Kernels are already loaded, unless the context was created without a GPU.
            prepare_fused(gpu, self.layer, self.fusion)

    @recording_failures
    def enqueue(
        self, inputs: Any, _: Any, sources: Any, outputs: Any, workspace: int, stream: int
    ) -> None:
        call = self._call(inputs[0].dims)
        names = input_names(self.fusion)
        addresses = dict(zip(names, map(int, sources), strict=True))
        affine, shift = addresses.pop("affine", 0), addresses.pop("image_shift", 0)
        width = inputs[names.index("image_shift")].dims[1] if shift else 0
        sums = int(workspace) + aligned(call.source.code_bytes(native_4=False))
        statistics = sums + aligned(call.source.sum_bytes)
        layer = Pointers(
            **addresses,
            out=int(outputs[0]),
            codes=int(workspace),
            sums=sums,
            partial=statistics + aligned(call.statistics_bytes),
        )
        at = FusedPointers(layer, affine, shift, int(width), statistics)
        half = inputs[0].type == self._trt.DataType.HALF
        start_fused(self._device(), call, at, int(stream), half=half)


def _plugin_class(trt: Any, device: Callable[[], Device]) -> type:
    """The plugin's class for a module `tensorrt` or `tensorrt_rtx`."""
    bases: Any = plugin_bases(trt)

    class FusedPlugin(_FusedMethods, *bases):  # type: ignore[misc]
        """One fused layer in one network, engine or context."""

        _trt = trt
        _device = staticmethod(device)

        def __init__(self, name: str, layer: LayerSpec, fusion: Fusion) -> None:
            self._start(name, fused_fields(layer, fusion))
            self.layer, self.fusion = layer, fusion

    return FusedPlugin


def register(trt: Any, device: Callable[[], Device] = current_device) -> None:
    """Register the plugins of layers alone and of fused layers with TensorRT, once per process.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        device: function that returns the GPU on which a plugin runs.

    Raises:
        UsageError: TensorRT does not accept the plugins.
    """
    low_bit.register(trt, device)
    plugin = _plugin_class(trt, device)
    register_creators(
        trt,
        FUSED_PLUGINS,
        FUSED_FIELDS,
        lambda name, fields: plugin(name, *fusion_of(name, fields)),
    )
