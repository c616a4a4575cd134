"""The layer as a plugin of TensorRT and TensorRT-RTX (`IPluginV3` in Python).

Both parsers make a plugin of a node whose operator is its name:

    trtq::LowBitLinear(x, weight, terms, tables, step) -> y
    trtq::LowBitConv2d(x, weight, terms, tables, step) -> y

with x and y in float16 or float32, and the layouts of `trtq.plugins.spec`. The attributes are the fields
of `LayerSpec`. An engine with such nodes needs the plugins when it is loaded: call `register` before.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from trtq.errors import TrtqError, UsageError
from trtq.plugins.driver import current_device
from trtq.plugins.launch import (
    Device,
    Pointers,
    prepare_any_shape,
    prepare_layer,
    start_layer,
)
from trtq.plugins.spec import Geometry, LayerSpec

__all__ = ["NAMESPACE", "PLUGINS", "VERSION", "fields_of", "register", "spec_of", "take_failures"]

NAMESPACE, VERSION = "trtq", "1"
PLUGINS = ("LowBitLinear", "LowBitConv2d")
_INPUTS = ("x", "weight", "terms", "tables", "step")
_FIELDS = {
    "channels": 1,
    "out_channels": 1,
    "steps": 1,
    "weight_bits": 1,
    "activation_bits": 1,
    "kernel_shape": 2,
    "strides": 2,
    "pads": 2,
    "dilations": 2,
    "group": 1,
}
_ALIGNMENT = 256


def fields_of(layer: LayerSpec) -> dict[str, list[int]]:
    """A layer's attributes, as its node and its plugin carry them; `spec_of` is the inverse."""
    g = layer.geometry or Geometry()
    found = {name: [int(getattr(layer, name))] for name in list(_FIELDS)[:5]}
    found |= {"kernel_shape": list(g.kernel), "strides": list(g.stride), "pads": list(g.padding)}
    return found | {"dilations": list(g.dilation), "group": [g.groups]}


def spec_of(name: str, fields: dict[str, list[int]]) -> LayerSpec:
    """A layer from its attributes.

    Args:
        name: of the plugin, one of `PLUGINS`.
        fields: see `fields_of`.

    Raises:
        UsageError: one is missing or has another length.
    """
    for field, count in _FIELDS.items():
        if len(fields.get(field, [])) != count:
            raise UsageError(
                f"the plugin {name} takes {field} as {count} integers, got {fields.get(field)}; export "
                "the model again with this version"
            )
    kernel, stride, padding, dilation = (
        (fields[field][0], fields[field][1])
        for field in ("kernel_shape", "strides", "pads", "dilations")
    )
    geometry = Geometry(kernel, stride, padding, dilation, fields["group"][0])
    channels, out_channels, steps, weight_bits, activation_bits = (
        fields[field][0] for field in list(_FIELDS)[:5]
    )
    return LayerSpec(
        channels,
        out_channels,
        steps,
        weight_bits,
        activation_bits,
        geometry if name == "LowBitConv2d" else None,
    )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _field_collection(trt: Any, fields: dict[str, list[int]]) -> tuple[list[Any], Any]:
    """Attributes as TensorRT takes them, with the objects that own their memory."""
    owned: list[Any] = [np.array(values, np.int32) for values in fields.values()]
    named = zip(fields, list(owned), strict=True)
    owned += [trt.PluginField(name, data, trt.PluginFieldType.INT32) for name, data in named]
    return owned, trt.PluginFieldCollection(owned[len(fields) :])


_failures: deque[str] = deque(maxlen=3)


def take_failures() -> list[str]:
    """The last errors of plugins since they were taken before.

    TensorRT prints what a plugin in Python raises on standard error, and tells its caller nothing.
    """
    found = list(_failures)
    _failures.clear()
    return found


def _kept(method: Any) -> Any:
    """A plugin's method whose errors are kept for `take_failures`, and raised as before."""

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


def _plugin_class(trt: Any, device: Callable[[], Device]) -> type:
    class LowBitPlugin(
        trt.IPluginV3,  # type: ignore[misc]
        trt.IPluginV3OneCore,  # type: ignore[misc]
        trt.IPluginV3OneBuild,  # type: ignore[misc]
        trt.IPluginV3OneRuntime,  # type: ignore[misc]
    ):
        """One layer in one network, engine or context."""

        def __init__(self, name: str, layer: LayerSpec) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_name = name
            self.plugin_namespace, self.plugin_version = NAMESPACE, VERSION
            self.num_outputs = 1
            self.layer = layer
            # TensorRT keeps pointers to what Python owns: as long as the plugin lives, so do these.
            self._fields, self._collection = _field_collection(trt, fields_of(layer))

        def get_capability_interface(self, _: Any) -> Any:
            return self

        def clone(self) -> Any:
            return LowBitPlugin(self.plugin_name, self.layer)

        @_kept
        def attach_to_context(self, _: Any) -> Any:
            found = self.clone()
            try:
                gpu = device()
            except TrtqError:  # While building there may be none.
                return found
            # Shapes may come to be known within the first `enqueue`, while a CUDA graph is captured,
            # and then no kernel can be loaded.
            prepare_any_shape(gpu, self.layer)
            return found

        def get_fields_to_serialize(self) -> Any:
            return self._collection

        def get_output_data_types(self, types: Any) -> Any:
            return [types[0]]

        @_kept
        def get_output_shapes(self, inputs: Any, _: Any, build: Any) -> Any:
            shape, layer = trt.DimsExprs(inputs[0]), self.layer
            if layer.geometry is None:
                shape[len(shape) - 1] = build.constant(layer.out_channels)
                return [shape]
            shape[1] = build.constant(layer.out_channels)
            g = layer.geometry
            for axis in (0, 1):
                lost = g.dilation[axis] * (g.kernel[axis] - 1) + 1 - 2 * g.padding[axis]
                operation = trt.DimensionOperation
                free = build.operation(operation.SUB, shape[2 + axis], build.constant(lost))
                moved = build.operation(operation.FLOOR_DIV, free, build.constant(g.stride[axis]))
                shape[2 + axis] = build.operation(operation.SUM, moved, build.constant(1))
            return [shape]

        def supports_format_combination(self, pos: int, tensors: Any, count: int) -> bool:
            tensor = tensors[pos].desc
            fixed = {
                1: trt.DataType.INT8,
                2: trt.DataType.FLOAT,
                3: trt.DataType.FLOAT,
                4: trt.DataType.INT64,
            }
            if tensor.format != trt.TensorFormat.LINEAR or count != len(_INPUTS):
                return False
            if pos == 0:
                return tensor.type in (trt.DataType.HALF, trt.DataType.FLOAT)
            return bool(tensor.type == fixed.get(pos, tensors[0].desc.type))

        @_kept
        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            weight = tuple(inputs[1].desc.dims)
            if weight != self.layer.weight_shape():
                raise UsageError(
                    f"the weight of a {self.plugin_name} has the shape {list(weight)}, its attributes "
                    f"say {list(self.layer.weight_shape())}"
                )

        @_kept
        def get_workspace_size(self, inputs: Any, _: Any) -> int:
            problem = self.layer.problem(tuple(inputs[0].max))
            return _aligned(problem.code_bytes(native_4=False)) + problem.sum_bytes

        @_kept
        def on_shape_change(self, inputs: Any, _: Any) -> None:
            problem = self.layer.problem(tuple(inputs[0].dims))
            try:
                gpu = device()
            except TrtqError:  # While building there may be none.
                return
            # They are loaded already, unless the context was made where there was no GPU.
            prepare_layer(gpu, self.layer, problem, half=inputs[0].type == trt.DataType.HALF)

        def set_tactic(self, _: int) -> None:
            """There is one; its tile is chosen for the shape when it runs."""

        @_kept
        def enqueue(
            self, inputs: Any, _: Any, sources: Any, targets: Any, workspace: int, stream: int
        ) -> None:
            problem = self.layer.problem(tuple(inputs[0].dims))
            codes = int(workspace)
            at = Pointers(
                **dict(zip(_INPUTS, map(int, sources), strict=True)),
                out=int(targets[0]),
                codes=codes,
                sums=codes + _aligned(problem.code_bytes(native_4=False)),
            )
            half = inputs[0].type == trt.DataType.HALF
            start_layer(device(), self.layer, problem, at, int(stream), half=half)

    return LowBitPlugin


def _creator_class(trt: Any, plugin: type, name: str) -> type:
    class LowBitCreator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Makes plugins of one name, for the parser and for engines that are loaded."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = name
            self.plugin_namespace, self.plugin_version = NAMESPACE, VERSION
            self._fields, self.field_names = _field_collection(trt, {key: [] for key in _FIELDS})

        @_kept
        def create_plugin(self, _: str, fields: Any, phase: Any) -> Any:
            given = {
                field.name: [int(value) for value in np.atleast_1d(field.data)]
                for field in fields
                if field.name in _FIELDS
            }
            return plugin(name, spec_of(name, given))

    return LowBitCreator


_registered: list[Any] = []


def register(trt: Any, device: Callable[[], Device] = current_device) -> None:
    """Make the plugins known to a module, once; they stay so until the process ends.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        device: gives the GPU when a plugin runs.
    """
    registry = trt.get_plugin_registry()
    plugin = _plugin_class(trt, device)
    for name in PLUGINS:
        if registry.get_creator(name, VERSION, NAMESPACE) is not None:
            continue
        creator = _creator_class(trt, plugin, name)()
        if not registry.register_creator(creator, NAMESPACE):
            raise UsageError(f"{trt.__name__} does not take the plugin {name}")
        # The registry does not own what Python makes.
        _registered.append(creator)
