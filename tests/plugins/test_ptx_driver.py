"""The whole path to the GPU, through the real cuda-bindings, with kernels that run as PTX on the CPU.

The driver is the recording one: memory that a kernel may use is what has been allocated, and a result is
there after a wait.
"""

from __future__ import annotations

import json

import pytest

from tests.conftest import shared
from tests.plugins.ptx import needs_ptx
from tests.plugins.recording_driver import RecordingDriver, needs_recording
from tests.plugins.recording_driver import recording as recording
from trtq.engine.tensorrt.backends import BACKENDS

pytestmark = [needs_recording, needs_ptx]
needs_rtx = pytest.mark.skipif(not BACKENDS["tensorrt-rtx"].installed, reason="needs tensorrt-rtx")
CAPABILITIES = [
    80,
    *(pytest.param(capability, marks=pytest.mark.slow) for capability in (75, 90, 120)),
]
START = """
import json
import numpy as np
from trtq.selftest.layers import draw
from tests.plugins.recording_driver.runner import run_ptx
from trtq.plugins import device as devices
from trtq.plugins.low_bit import reference
from trtq.plugins.spec import Geometry, LayerSpec

run_ptx()
gpu = devices.Gpu()
SAME = Geometry((3, 3), padding=(1, 1))


def drawn(seed, bits, activation_bits, geometry, **options):
    case = draw(seed, bits=bits, activation_bits=activation_bits, geometry=geometry, **options)
    p = case.problem
    return case, LayerSpec(p.channels, p.out_channels, p.steps, bits, activation_bits, geometry)


def expected(case, **options):
    return reference.low_bit(
        case.x, case.integers, case.terms, case.tables, case.step, case.problem.geometry, **options
    )
"""


@pytest.fixture
def path(recording: RecordingDriver, tmp_path_factory):
    """Runs code in a process with the driver; every argument of a launch is counted."""
    builds = shared(tmp_path_factory, "ptx", lambda _: None)

    def run(code, capability=80, **settings):
        exact = {"exact": 1, "PYTHONMALLOC": "debug", "builds": builds, "gpus": capability}
        return recording.run(START + code, **exact, **settings)

    return run


def ended_well(record):
    """Whether all calls succeeded, and nothing was left undone at the end of the process."""
    (end,) = record.ends
    bad = [call for call in record.calls if call["status"]]
    return not bad and not end["unfinished"] and not end["broken guards"] and not end["pushed"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_operator_of_torch_computes_the_layer(path, capability):
    record = path(
        """
import torch
from tests.plugins.recording_driver.torch_memory import DeviceMemory
from trtq.plugins.low_bit import op

memory = DeviceMemory(gpu)
equal = {}
for name, of in {
    "linear": (11, 4, 4, None, dict(channels_last=True, width=1)),
    "convolution": (12, 8, 8, SAME, {}),
    "channels last": (13, 4, 8, SAME, dict(channels_last=True, height=4)),
}.items():
    case, layer = drawn(*of[:4], **of[4])
    linear = of[3] is None
    x = np.ascontiguousarray(case.x.transpose(0, 2, 3, 1)[:, :, 0]) if linear else case.x
    x = torch.from_numpy(x)
    x = x.contiguous(memory_format=torch.channels_last) if name == "channels last" else x
    residual = None
    if not linear:
        residual = draw(14, height=of[4].get("height", 5), channels=case.problem.out_channels).x
    host = [x, *map(torch.from_numpy, (case.packed, case.terms, case.tables, case.step))]
    host.append(None if residual is None else torch.from_numpy(residual))
    given = [None if tensor is None else memory.placed(tensor) for tensor in host]
    with memory:
        out = op.low_bit._init_fn(*given, op.flat_fields(layer), False)
    wanted = expected(case, residual=residual)
    wanted = wanted.transpose(0, 2, 3, 1)[:, :, 0] if linear else wanted
    early = np.array_equal(out.numpy(), wanted)
    gpu.wait()
    of_cpu = torch.ops.trtq.low_bit(*host, op.flat_fields(layer), False).numpy()
    equal[name] = early, np.array_equal(out.numpy(), wanted), np.array_equal(of_cpu, wanted)
print(json.dumps(equal))
""",
        capability,
    )
    names = ("linear", "convolution", "channels last")
    # Not before the wait; then as the reference and as torch on the CPU.
    assert json.loads(record.stdout) == {name: [False, True, True] for name in names}
    assert ended_well(record)
    assert len(record.named("cuLaunchKernel")) == 6


@needs_rtx
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_plugin_of_tensorrt_computes_the_layer(path, capability):
    record = path(
        """
import tensorrt_rtx as trt
from trtq.plugins.low_bit import registry
from trtq.plugins.low_bit import tensorrt as plugins
from trtq.plugins.launch import prepare_layer

class Desc:
    def __init__(self, dims, type_):
        self.dims = self.max = dims
        self.type = type_

# A context loads every variant of its layer, which the tests of the recording driver see to.
plugins.prepare_any_shape = lambda *_: None
equal = []
for linear, of in ((True, (11, 4, 4, None)), (False, (12, 8, 8, SAME))):
    case, layer = drawn(*of, channels_last=linear, width=1 if linear else 4)
    name = "LowBitLinear" if linear else "LowBitConv2d"
    plugin = plugins._plugin_class(trt, devices.current_device)(name, layer).attach_to_context(None)
    x = np.ascontiguousarray(case.x.transpose(0, 2, 3, 1)[:, :, 0]) if linear else case.x
    at = [Desc(x.shape, trt.DataType.HALF)]
    sources = []
    for array in (x, case.packed, case.terms, case.tables, case.step):
        sources.append(gpu.allocate(array.nbytes))
        gpu.upload(sources[-1], np.ascontiguousarray(array))
    out = np.zeros(case.problem.out_shape, np.float16)
    result, scratch = gpu.allocate(out.nbytes), gpu.allocate(plugin.get_workspace_size(at, []))
    plugin.on_shape_change(at, [])
    plugin.enqueue(at, [], sources, [result], scratch, gpu.stream)
    gpu.download(out, result)
    gpu.wait()
    for address in (*sources, result, scratch):
        gpu.free(address)
    actual = out.transpose(0, 3, 1, 2) if linear else out
    equal.append(np.array_equal(actual, expected(case)))
print(json.dumps([equal, registry.take_failures()]))
""",
        capability,
    )
    assert json.loads(record.stdout) == [[True, True], []]
    assert ended_well(record)
    assert record.ends[0]["live"] == 0


LAUNCHES = """
import dataclasses, os, sys
from trtq.errors import KernelError
from trtq.plugins.launch import Pointers, layer_launches
from trtq.plugins.variants import TILES

case, layer = drawn(12, 8, 8, SAME)
problem = case.problem
arrays = (case.x, case.packed, case.terms, case.tables, case.step)
out = np.zeros(problem.out_shape, np.float16)
sizes = [*(a.nbytes for a in arrays), out.nbytes, problem.code_bytes(native_4=False), 4]
at = [gpu.allocate(size) for size in sizes]
for address, array in zip(at, arrays):
    gpu.upload(address, array)
device = devices.current_device()


def launches():
    return layer_launches(problem, Pointers(*at), TILES[0], half=True, weight_bits=8, native_4=False)


def freed_weight():
    gpu.free(at[1])
    return launches()


def short_scratch():
    at[6] = gpu.allocate(64)
    return launches()


def too_few():
    first, second = launches()
    return first, dataclasses.replace(second, arguments=second.arguments[:-1])


def too_many():
    first, second = launches()
    return dataclasses.replace(first, arguments=(*first.arguments, first.arguments[0])), second


def run(started):
    try:
        for launch in started:
            device.start(launch, gpu.stream)
        gpu.download(out, at[5])
        gpu.wait()
    except KernelError as err:
        return str(err)
    return "right" if np.array_equal(out, expected(case)) else "wrong"


for launch in launches():
    device.prepare(launch)
for make in (launches, freed_weight, short_scratch, too_few, too_many):
    # A fault ends the context, so each case has its own process.
    if os.fork() == 0:
        print(json.dumps(run(make())), flush=True)
        os._exit(0)
    os.wait()
"""


def test_wrong_launches_are_found(path):
    record = path(LAUNCHES)
    right, freed, short, few, many = map(json.loads, record.stdout.splitlines())
    assert right == "right"
    text = "the GPU failed: CUDA_ERROR_ILLEGAL_ADDRESS: a kernel accessed memory out of bounds"
    assert freed.startswith(text)
    assert short.startswith(text)
    assert few == "cannot start low_bit-f16-w8-nchw-64x64 on sm80: CUDA_ERROR_INVALID_VALUE"
    assert many == "cannot start quantize-f16 on sm80: CUDA_ERROR_INVALID_VALUE"
    of_weight, of_codes = (call["text"] for call in record.named("fault"))
    assert "a global load of 16 bytes outside of memory" in of_weight
    assert "a global store of 16 bytes outside of memory: " in of_codes
    assert "into an allocation of 64 bytes, which has 64" in of_codes


def test_misuse_of_memory_and_contexts_is_found(path):
    record = path(
        """
from cuda.bindings import driver as d

status = lambda answer: int(answer[0])
statuses = {}
address = gpu.allocate(64)
statuses["upload beyond the end"] = status(d.cuMemcpyHtoD(address + 60, bytes(8), 8))
statuses["upload"] = status(d.cuMemcpyHtoD(address, bytes(64), 64))
host = np.full(64, 7, np.uint8)
gpu.download(host, address)
statuses["before the wait"] = int(host[0])
gpu.wait()
statuses["after the wait"] = int(host[0])
gpu.free(address)
statuses["freed twice"] = status(d.cuMemFree(address))
late = d.cuMemcpyDtoHAsync(host.ctypes.data, address, 1, gpu.stream)
statuses["download of freed memory"] = status(late)
statuses["pop"] = status(d.cuCtxPopCurrent())
statuses["push"] = status(d.cuCtxPushCurrent(gpu._context))
events = [d.cuEventCreate(0)[1] for _ in range(2)]
d.cuEventRecord(events[0], gpu.stream)
statuses["time of an event that is not done"] = status(d.cuEventElapsedTime(events[0], events[0]))
d.cuEventRecord(events[1], gpu.stream)
d.cuEventSynchronize(events[1])
statuses["time"] = d.cuEventElapsedTime(*events)[1] > 0
other = gpu.allocate(64)
gpu.upload(other, host)
print(json.dumps(statuses))
import ctypes
ctypes.memset(other + 64, 0, 1)
"""
    )
    assert json.loads(record.stdout) == {
        "upload beyond the end": 1,
        "upload": 0,
        "before the wait": 7,
        "after the wait": 0,
        "freed twice": 1,
        "download of freed memory": 1,
        "pop": 201,
        "push": 0,
        "time of an event that is not done": 600,
        "time": True,
    }
    assert not ended_well(record)
    (end,) = record.ends
    left = {name: end[name] for name in ("unfinished", "live", "broken guards", "pushed")}
    assert left == {"unfinished": 1, "live": 1, "broken guards": 1, "pushed": 1}
