"""The layer as a plugin of TensorRT and TensorRT-RTX (`IPluginV3` in Python).

Both parsers create a plugin for a node whose operator has the plugin's name:

    trtq::LowBitLinear(x, weight, terms, tables, step) -> y
    trtq::LowBitConv2d(x, weight, terms, tables, step) -> y

with x and y in float16 or float32 and the layouts of `trtq.plugins.spec`. The attributes are the fields
of `LayerSpec`. Call `register` before loading an engine with such nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from trtq.errors import TrtqError, UsageError
from trtq.plugins.device import current_device
from trtq.plugins.launch import (
    Device,
    Pointers,
    prepare_any_shape,
    prepare_layer,
    start_layer,
)
from trtq.plugins.low_bit.attributes import (
    FIELDS,
    INPUTS,
    NAMESPACE,
    PLUGINS,
    VERSION,
    fields_of,
    spec_of,
)
from trtq.plugins.low_bit.registry import (
    field_collection,
    plugin_bases,
    recording_failures,
    register_creators,
)
from trtq.plugins.spec import MAX_SPLIT_BYTES, LayerSpec

__all__ = ["PluginMethods", "aligned", "register"]

_ALIGNMENT = 256


def aligned(size: int) -> int:
    """A size rounded up to the alignment of scratch memory."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class PluginMethods:
    """The methods that TensorRT calls on a plugin; `_plugin_class` adds TensorRT's base classes.

    Attributes:
        layer: layer that the plugin computes.
        plugin_name: one of `PLUGINS`.
    """

    _trt: ClassVar[Any]
    _device: ClassVar[Any]  # A static method that returns the GPU.
    layer: LayerSpec
    plugin_name: str
    plugin_namespace: str
    plugin_version: str
    num_outputs: int
    _fields: list[Any]
    _collection: Any

    def _start(self, name: str, fields: dict[str, list[int]]) -> None:
        """Initialise TensorRT's base classes and what TensorRT reads of a plugin."""
        for base in plugin_bases(self._trt):
            base.__init__(self)  # type: ignore[misc]
        self.plugin_name = name
        self.plugin_namespace, self.plugin_version = NAMESPACE, VERSION
        self.num_outputs = 1
        # TensorRT keeps pointers to the memory of these objects, so they must live as long as the
        # plugin.
        self._fields, self._collection = field_collection(self._trt, fields)

    def clone(self) -> Any:
        """A plugin with the same attributes."""
        return type(self)(self.plugin_name, self.layer)  # type: ignore[call-arg]

    def get_capability_interface(self, _: Any) -> Any:
        """The plugin itself, which has all interfaces."""
        return self

    @recording_failures
    def attach_to_context(self, _: Any) -> Any:
        """A clone for one context, with its kernels loaded."""
        clone = self.clone()
        gpu = self._gpu()
        if gpu is not None:
            # Shapes may become known only inside the first `enqueue`, during the capture of a CUDA
            # graph, when no kernel can be loaded.
            prepare_any_shape(gpu, self.layer)
        return clone

    def _gpu(self) -> Device | None:
        """The GPU; None if there is no GPU, which is allowed while an engine is built."""
        try:
            device: Device = self._device()
        except TrtqError:
            return None
        return device

    def get_fields_to_serialize(self) -> Any:
        """The attributes, stored in the engine."""
        return self._collection

    def get_output_data_types(self, types: Any) -> Any:
        """The type of the input."""
        return [types[0]]

    @recording_failures
    def get_output_shapes(self, inputs: Any, _: Any, build: Any) -> Any:
        """The shape of the output, as expressions of the input's."""
        shape = self._trt.DimsExprs(inputs[0])
        if self.layer.geometry is None:
            shape[len(shape) - 1] = build.constant(self.layer.out_channels)
            return [shape]
        shape[1] = build.constant(self.layer.out_channels)
        shape[2], shape[3] = self._out_size(inputs[0][2], inputs[0][3], build)
        return [shape]

    def _out_size(self, height: Any, width: Any, build: Any) -> list[Any]:
        """Height and width of a convolution's output, as TensorRT's expressions."""
        g = self.layer.geometry
        assert g is not None
        operation, sizes = self._trt.DimensionOperation, []
        for axis, size in enumerate((height, width)):
            border = g.dilation[axis] * (g.kernel[axis] - 1) + 1 - 2 * g.padding[axis]
            span = build.operation(operation.SUB, size, build.constant(border))
            count = build.operation(operation.FLOOR_DIV, span, build.constant(g.stride[axis]))
            sizes.append(build.operation(operation.SUM, count, build.constant(1)))
        return sizes

    def supports_format_combination(self, pos: int, tensors: Any, count: int) -> bool:
        """Whether one tensor may have a type and format, given those before it."""
        tensor, types = tensors[pos].desc, self._trt.DataType
        if tensor.format != self._trt.TensorFormat.LINEAR or count != len(INPUTS):
            return False
        if pos == 0:
            return tensor.type in (types.HALF, types.FLOAT)
        fixed = {1: types.INT8, 2: types.FLOAT, 3: types.FLOAT, 4: types.INT64}
        return bool(tensor.type == fixed.get(pos, tensors[0].desc.type))

    @recording_failures
    def configure_plugin(self, inputs: Any, outputs: Any) -> None:
        """Check the weight that the network gives."""
        weight = tuple(inputs[1].desc.dims)
        if weight != self.layer.weight_shape():
            raise UsageError(
                f"the weight of a {self.plugin_name} has the shape {list(weight)}, its attributes "
                f"say {list(self.layer.weight_shape())}"
            )

    @recording_failures
    def get_workspace_size(self, inputs: Any, _: Any) -> int:
        """Scratch memory for the largest input, in bytes."""
        problem = self.layer.problem(tuple(inputs[0].max))
        # The call may be smaller than the maximum, and divide k.
        codes = aligned(problem.code_bytes(native_4=False))
        return codes + aligned(problem.sum_bytes) + MAX_SPLIT_BYTES

    @recording_failures
    def on_shape_change(self, inputs: Any, _: Any) -> None:
        """Check the shape of the next calls, and load their kernels."""
        problem = self.layer.problem(tuple(inputs[0].dims))
        gpu = self._gpu()
        if gpu is not None:
            # Kernels are already loaded, unless the context was created without a GPU.
            half = inputs[0].type == self._trt.DataType.HALF
            prepare_layer(gpu, self.layer, problem, half=half)

    def set_tactic(self, _: int) -> None:
        """Do nothing: there is only one tactic, and the tile is chosen at run time."""

    @recording_failures
    def enqueue(
        self, inputs: Any, _: Any, sources: Any, outputs: Any, workspace: int, stream: int
    ) -> None:
        """Start the kernels on a stream."""
        problem = self.layer.problem(tuple(inputs[0].dims))
        codes = int(workspace)
        sums = codes + aligned(problem.code_bytes(native_4=False))
        at = Pointers(
            **dict(zip(INPUTS, map(int, sources), strict=True)),
            out=int(outputs[0]),
            codes=codes,
            sums=sums,
            partial=sums + aligned(problem.sum_bytes),
        )
        half = inputs[0].type == self._trt.DataType.HALF
        start_layer(self._device(), self.layer, problem, at, int(stream), half=half)


def _plugin_class(trt: Any, device: Callable[[], Device]) -> type:
    """The plugin's class for a module `tensorrt` or `tensorrt_rtx`."""
    bases: Any = plugin_bases(trt)

    class LowBitPlugin(PluginMethods, *bases):  # type: ignore[misc]
        """One layer in one network, engine or context."""

        _trt = trt
        _device = staticmethod(device)

        def __init__(self, name: str, layer: LayerSpec) -> None:
            self._start(name, fields_of(layer))
            self.layer = layer

    return LowBitPlugin


def register(trt: Any, device: Callable[[], Device] = current_device) -> None:
    """Register the plugins of layers alone with TensorRT, once per process.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        device: function that returns the GPU on which a plugin runs.

    Raises:
        UsageError: TensorRT does not accept the plugins.
    """
    plugin = _plugin_class(trt, device)
    register_creators(
        trt, PLUGINS, FIELDS, lambda name, fields: plugin(name, spec_of(name, fields))
    )
