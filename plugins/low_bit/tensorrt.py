"""The layer as a plugin of TensorRT and TensorRT-RTX (`IPluginV3` in Python).

Both parsers create a plugin for a node whose operator has the plugin's name:

    trtq::LowBitLinear(x, weight, terms, tables, step) -> y
    trtq::LowBitConv2d(x, weight, terms, tables, step) -> y

with x and y in float16 or float32 and the layouts of `trtq.plugins.spec`. The attributes are the fields
of `LayerSpec`. Call `register` before loading an engine with such nodes.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

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
from trtq.plugins.spec import MAX_SPLIT_BYTES, LayerSpec

__all__ = ["register", "take_failures"]

_ALIGNMENT = 256


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _field_collection(trt: Any, fields: dict[str, list[int]]) -> tuple[list[Any], Any]:
    """The attributes as a TensorRT collection, with the objects that own their memory."""
    owned: list[Any] = [np.array(values, np.int32) for values in fields.values()]
    named = zip(fields, list(owned), strict=True)
    owned += [trt.PluginField(name, data, trt.PluginFieldType.INT32) for name, data in named]
    return owned, trt.PluginFieldCollection(owned[len(fields) :])


_failures: deque[str] = deque(maxlen=3)


def take_failures() -> list[str]:
    """Return and clear the latest errors of plugins since the previous call.

    TensorRT prints errors of Python plugins to standard error and does not pass them to its caller.
    """
    failures = list(_failures)
    _failures.clear()
    return failures


def _recording_failures(method: Any) -> Any:
    """A method of a plugin whose errors are recorded for `take_failures` and raised again."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except Exception as err:
            text = str(err) if isinstance(err, TrtqError) else f"{type(err).__name__}: {err}"
            name = getattr(self, "plugin_name", None) or getattr(self, "name", "")
            _failures.append(f"plugin {name}: {text}")
            raise

    return call


class _PluginMethods:
    """The methods that TensorRT calls on a plugin; `_plugin_class` adds TensorRT's base classes.

    Attributes:
        layer: layer that the plugin computes.
        plugin_name: one of `PLUGINS`.
    """

    _trt: ClassVar[Any]
    _device: ClassVar[Any]  # A static method that returns the GPU.
    layer: LayerSpec
    plugin_name: str
    _collection: Any

    def clone(self) -> Any:
        return type(self)(self.plugin_name, self.layer)  # type: ignore[call-arg]

    def get_capability_interface(self, _: Any) -> Any:
        return self

    @_recording_failures
    def attach_to_context(self, _: Any) -> Any:
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
        return self._collection

    def get_output_data_types(self, types: Any) -> Any:
        return [types[0]]

    @_recording_failures
    def get_output_shapes(self, inputs: Any, _: Any, build: Any) -> Any:
        shape, g = self._trt.DimsExprs(inputs[0]), self.layer.geometry
        if g is None:
            shape[len(shape) - 1] = build.constant(self.layer.out_channels)
            return [shape]
        shape[1] = build.constant(self.layer.out_channels)
        operation = self._trt.DimensionOperation
        for axis in (0, 1):
            border = g.dilation[axis] * (g.kernel[axis] - 1) + 1 - 2 * g.padding[axis]
            span = build.operation(operation.SUB, shape[2 + axis], build.constant(border))
            count = build.operation(operation.FLOOR_DIV, span, build.constant(g.stride[axis]))
            shape[2 + axis] = build.operation(operation.SUM, count, build.constant(1))
        return [shape]

    def supports_format_combination(self, pos: int, tensors: Any, count: int) -> bool:
        tensor, types = tensors[pos].desc, self._trt.DataType
        if tensor.format != self._trt.TensorFormat.LINEAR or count != len(INPUTS):
            return False
        if pos == 0:
            return tensor.type in (types.HALF, types.FLOAT)
        fixed = {1: types.INT8, 2: types.FLOAT, 3: types.FLOAT, 4: types.INT64}
        return bool(tensor.type == fixed.get(pos, tensors[0].desc.type))

    @_recording_failures
    def configure_plugin(self, inputs: Any, outputs: Any) -> None:
        weight = tuple(inputs[1].desc.dims)
        if weight != self.layer.weight_shape():
            raise UsageError(
                f"the weight of a {self.plugin_name} has the shape {list(weight)}, its attributes "
                f"say {list(self.layer.weight_shape())}"
            )

    @_recording_failures
    def get_workspace_size(self, inputs: Any, _: Any) -> int:
        problem = self.layer.problem(tuple(inputs[0].max))
        # The call may be smaller than the maximum, and divide k.
        codes = _aligned(problem.code_bytes(native_4=False))
        return codes + _aligned(problem.sum_bytes) + MAX_SPLIT_BYTES

    @_recording_failures
    def on_shape_change(self, inputs: Any, _: Any) -> None:
        problem = self.layer.problem(tuple(inputs[0].dims))
        gpu = self._gpu()
        if gpu is not None:
            # Kernels are already loaded, unless the context was created without a GPU.
            half = inputs[0].type == self._trt.DataType.HALF
            prepare_layer(gpu, self.layer, problem, half=half)

    def set_tactic(self, _: int) -> None:
        """Do nothing: there is only one tactic, and the tile is chosen at run time."""

    @_recording_failures
    def enqueue(
        self, inputs: Any, _: Any, sources: Any, outputs: Any, workspace: int, stream: int
    ) -> None:
        problem = self.layer.problem(tuple(inputs[0].dims))
        codes = int(workspace)
        sums = codes + _aligned(problem.code_bytes(native_4=False))
        at = Pointers(
            **dict(zip(INPUTS, map(int, sources), strict=True)),
            out=int(outputs[0]),
            codes=codes,
            sums=sums,
            partial=sums + _aligned(problem.sum_bytes),
        )
        half = inputs[0].type == self._trt.DataType.HALF
        start_layer(self._device(), self.layer, problem, at, int(stream), half=half)


def _plugin_class(trt: Any, device: Callable[[], Device]) -> type:
    """The plugin's class for a module `tensorrt` or `tensorrt_rtx`."""

    class LowBitPlugin(
        _PluginMethods,
        trt.IPluginV3,  # type: ignore[misc]
        trt.IPluginV3OneCore,  # type: ignore[misc]
        trt.IPluginV3OneBuild,  # type: ignore[misc]
        trt.IPluginV3OneRuntime,  # type: ignore[misc]
    ):
        """One layer in one network, engine or context."""

        _trt = trt
        _device = staticmethod(device)

        def __init__(self, name: str, layer: LayerSpec) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_name = name
            self.plugin_namespace, self.plugin_version = NAMESPACE, VERSION
            self.num_outputs = 1
            self.layer = layer
            # TensorRT keeps pointers to the memory of these objects, so they must live as long as the
            # plugin.
            self._fields, self._collection = _field_collection(trt, fields_of(layer))

    return LowBitPlugin


def _creator_class(trt: Any, plugin: type, name: str) -> type:
    class LowBitCreator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Creates plugins of one name, for the parser and for loaded engines."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = name
            self.plugin_namespace, self.plugin_version = NAMESPACE, VERSION
            self._fields, self.field_names = _field_collection(trt, {key: [] for key in FIELDS})

        @_recording_failures
        def create_plugin(self, _: str, fields: Any, phase: Any) -> Any:
            given = {
                field.name: [int(value) for value in np.atleast_1d(field.data)]
                for field in fields
                if field.name in FIELDS
            }
            return plugin(name, spec_of(name, given))

    return LowBitCreator


_registered: list[Any] = []


def register(trt: Any, device: Callable[[], Device] = current_device) -> None:
    """Register the plugins with TensorRT, once per process.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        device: function that returns the GPU on which a plugin runs.

    Raises:
        UsageError: TensorRT does not accept the plugins.
    """
    registry = trt.get_plugin_registry()
    plugin = _plugin_class(trt, device)
    for name in PLUGINS:
        if registry.get_creator(name, VERSION, NAMESPACE) is not None:
            continue
        creator = _creator_class(trt, plugin, name)()
        if not registry.register_creator(creator, NAMESPACE):
            raise UsageError(f"{trt.__name__} does not accept the plugin {name}")
        # The registry does not own Python objects.
        _registered.append(creator)
