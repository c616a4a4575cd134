"""The TensorRT plugin: fields, shapes, and the kernels that it starts."""

import numpy as np
import pytest

from tests.plugins.emulator import Emulator, needs_compiler
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.errors import KernelError, UsageError
from trtq.plugins.low_bit import reference, registry
from trtq.plugins.low_bit import tensorrt as plugins
from trtq.plugins.low_bit.attributes import fields_of, spec_of
from trtq.plugins.spec import Geometry, LayerSpec
from trtq.selftest.layers import draw

RTX = BACKENDS["tensorrt-rtx"]
needs_rtx = pytest.mark.skipif(not RTX.installed, reason="needs tensorrt-rtx")
SAME = Geometry((3, 3), padding=(1, 1))


class Desc:
    """TensorRT's description of a tensor for a plugin."""

    def __init__(self, dims, type_):
        self.dims = self.max = dims
        self.type = type_


class EmulatedDevice:
    """A GPU whose kernels run on the CPU."""

    processors = 4

    def __init__(self, folder, architecture):
        self.architecture = architecture
        self.emulator = Emulator(folder)
        self.prepared = []

    def prepare(self, launch):
        self.prepared.append(launch.variant)

    def start(self, launch, stream):
        assert launch.variant in self.prepared
        assert stream == 77
        self.emulator.run(launch, seed=1)


@pytest.mark.parametrize("geometry", [None, SAME, Geometry((1, 3), (2, 1), (0, 1), (1, 2), 4)])
def test_attributes_restore_the_layer(geometry):
    layer = LayerSpec(64, 32, 20, 4, 8, geometry)
    name = "LowBitLinear" if geometry is None else "LowBitConv2d"
    assert spec_of(name, fields_of(layer)) == layer


def test_a_missing_attribute_is_named():
    fields = fields_of(LayerSpec(64, 32, 20, 4, 8))
    with pytest.raises(UsageError, match="takes strides as 2 integers, got None; export"):
        spec_of("LowBitLinear", {k: v for k, v in fields.items() if k != "strides"})


@needs_rtx
@needs_compiler
@pytest.mark.parametrize("architecture", ["sm86", "sm90"])
@pytest.mark.parametrize("geometry", [None, SAME], ids=["linear", "conv"])
def test_the_started_kernels_compute_the_layer(tmp_path, architecture, geometry):
    """Four-bit activations are multiplied as nibbles on sm86 and as bytes on sm90."""
    import tensorrt_rtx as trt

    linear = geometry is None
    case = draw(11, geometry=geometry, channels_last=linear, width=1 if linear else 4)
    problem = case.problem
    layer = LayerSpec(problem.channels, problem.out_channels, problem.steps, 4, 4, geometry)
    device = EmulatedDevice(tmp_path, architecture)
    plugin = plugins._plugin_class(trt, lambda: device)("LowBitConv2d", layer).clone()
    x = np.ascontiguousarray(case.x.transpose(0, 2, 3, 1)[:, :, 0]) if linear else case.x
    sources = [x, case.packed, case.terms, case.tables, case.step]
    descriptions = [Desc(x.shape, trt.DataType.HALF)]
    scratch = np.empty(plugin.get_workspace_size(descriptions, []) + 256, np.uint8)
    start = -scratch.ctypes.data % 256
    out = np.empty(problem.out_shape, np.float16)
    plugin.on_shape_change(descriptions, [])
    plugin.enqueue(
        descriptions,
        [],
        [a.ctypes.data for a in sources],
        [out.ctypes.data],
        scratch.ctypes.data + start,
        77,
    )
    wanted = reference.low_bit(case.x, case.integers, case.terms, case.tables, case.step, geometry)
    actual = out.transpose(0, 3, 1, 2) if linear else out
    assert np.array_equal(actual, wanted)


@needs_rtx
def test_all_kernels_are_loaded_when_a_context_is_created(tmp_path):
    """Kernels are loaded before shapes are known, and so before a graph can be captured."""
    import tensorrt_rtx as trt

    device = EmulatedDevice(tmp_path, "sm89")
    layer = LayerSpec(64, 32, 20, 4, 4, SAME)
    plugin = plugins._plugin_class(trt, lambda: device)("LowBitConv2d", layer)
    assert plugin.attach_to_context(None).layer == layer
    assert {str(variant) for variant in device.prepared} == {
        *(f"quantize-{value}-a4" for value in ("f16", "f32")),
        *(
            f"low_bit-{value}-w4-a4-nchw-{tile}"
            for value in ("f16", "f32")
            for tile in ("64x64", "128x128")
        ),
    }


@needs_rtx
def test_a_context_can_be_created_without_a_gpu():
    """A builder creates contexts without a GPU."""
    import tensorrt_rtx as trt

    def nothing():
        raise KernelError("no GPU can be used")

    plugin = plugins._plugin_class(trt, nothing)("LowBitLinear", LayerSpec(64, 32, 20, 4, 8))
    assert plugin.attach_to_context(None).layer == plugin.layer
    assert registry.take_failures() == []


@needs_rtx
@pytest.mark.parametrize("method", ["enqueue", "on_shape_change", "attach_to_context"])
@pytest.mark.parametrize("error", [KernelError("cannot start it"), RuntimeError("cannot start it")])
def test_errors_of_a_plugin_are_recorded(method, error):
    """TensorRT prints errors to standard error and reports only that the engine failed."""
    import tensorrt_rtx as trt

    class Failing:
        architecture, processors = "sm89", 4

        def prepare(self, launch):
            raise error

        start = lambda self, launch, stream: self.prepare(launch)  # noqa: E731

    plugin = plugins._plugin_class(trt, Failing)("LowBitLinear", LayerSpec(64, 32, 20, 4, 8))
    at = [Desc((2, 7, 64), trt.DataType.HALF)]
    arguments = {
        "enqueue": (at, [], [256] * 5, [256], 256, 77),
        "on_shape_change": (at, []),
        "attach_to_context": (None,),
    }
    registry.take_failures()
    with pytest.raises(type(error)):
        getattr(plugin, method)(*arguments[method])
    kind = "RuntimeError: " if isinstance(error, RuntimeError) else ""
    assert registry.take_failures() == [f"plugin LowBitLinear: {kind}cannot start it"]
    assert registry.take_failures() == []


@needs_rtx
def test_attributes_stay_in_memory_as_long_as_the_plugin():
    """TensorRT reads the attributes later, when freed memory would hold other values."""
    import tensorrt_rtx as trt

    layer = LayerSpec(64, 32, 20, 4, 8, SAME)
    plugin = plugins._plugin_class(trt, lambda: None)("LowBitConv2d", layer)
    collection = plugin.get_fields_to_serialize()
    rubbish = [np.full(2, -5, np.int32) for _ in range(4000)]
    actual = {field.name: np.array(field.data).reshape(-1).tolist() for field in collection}
    assert actual == fields_of(layer)
    assert len(rubbish) == 4000


@needs_rtx
def test_a_weight_of_another_shape_is_refused_while_building():
    import tensorrt_rtx as trt

    layer = LayerSpec(64, 32, 20, 4, 8)
    plugin = plugins._plugin_class(trt, lambda: None)("LowBitLinear", layer)

    class Dynamic:
        desc = Desc((32, 1, 1, 64), trt.DataType.INT8)

    with pytest.raises(
        UsageError, match=r"shape \[32, 1, 1, 64\], its attributes say \[32, 1, 1, 32\]"
    ):
        plugin.configure_plugin([None, Dynamic()], [])


@needs_rtx
def test_an_input_of_another_width_is_refused_when_it_runs():
    import tensorrt_rtx as trt

    plugin = plugins._plugin_class(trt, lambda: None)("LowBitLinear", LayerSpec(64, 32, 20, 4, 8))
    with pytest.raises(UsageError, match=r"takes \[B, ..., 64\], got \[2, 7, 65\]"):
        plugin.on_shape_change([Desc((2, 7, 65), trt.DataType.HALF)], [])
