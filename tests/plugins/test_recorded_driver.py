"""Our code with the real cuda-bindings and NVRTC, on a driver that records and rejects calls."""

from __future__ import annotations

import json
import re

import pytest

from tests.plugins.recording_driver import HERE, RecordingDriver, needs_recording
from tests.plugins.recording_driver import recording as recording
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.engine.tensorrt.compile import compile_engine
from trtq.engine.tensorrt.job import NEEDS_PYTHON, Job
from trtq.errors import BuildError
from trtq.plugins import compile as compiling
from trtq.plugins.variants import TILES, Variant

pytestmark = needs_recording

RTX = BACKENDS["tensorrt-rtx"]
NO_COMPILER = """
from tests.plugins.recording_driver import image
from trtq.plugins import device as devices
devices.cubin = lambda variant, architecture: image(variant.kernel, architecture)
"""


def test_the_driver_refuses_what_a_real_one_refuses(recording: RecordingDriver):
    record = recording.run(
        """
        import threading
        from cuda.bindings import driver as d
        from tests.plugins.recording_driver import image

        def status(answer):
            return int(answer[0])

        statuses = {"before cuInit": status(d.cuCtxGetCurrent())}
        d.cuInit(0)
        statuses["no context"] = status(d.cuStreamCreate(0))
        _, context = d.cuDevicePrimaryCtxRetain(0)
        d.cuCtxSetCurrent(context)
        thread = lambda: statuses.update(thread=int(d.cuCtxGetCurrent()[1]))
        worker = threading.Thread(target=thread)
        worker.start()
        worker.join()
        ptx = lambda version: b"\\n.version %s\\n.target sm_80\\n.entry k()\\0" % version
        statuses["PTX of 12.4"] = status(d.cuModuleLoadData(ptx(b"8.4")))
        statuses["PTX of 12.5"] = status(d.cuModuleLoadData(ptx(b"8.5")))
        statuses["cubin of 13"] = status(d.cuModuleLoadData(image("k", "sm86")))
        _, module = d.cuModuleLoadData(ptx(b"7.0"))
        _, kernel = d.cuModuleGetFunction(module, b"k")
        statuses["another name"] = status(d.cuModuleGetFunction(module, b"other"))
        arguments = d.cuMemAlloc(8)[1]

        def start(shared, stream=0):
            return status(d.cuLaunchKernel(kernel, 1, 1, 1, 32, 1, 1, shared, stream, int(arguments), 0))

        statuses["48 KiB"], statuses["49 KiB"] = start(48 << 10), start(49 << 10)
        limit = d.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        statuses["too much asked"] = status(d.cuFuncSetAttribute(kernel, limit, 100 << 10))
        d.cuFuncSetAttribute(kernel, limit, 49 << 10)
        statuses["49 KiB, asked"] = start(49 << 10)
        for flags in (0, 1):
            _, stream = d.cuStreamCreate(flags)
            d.cuStreamBeginCapture(stream, d.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
            statuses[f"default stream during capture, {flags}"] = start(0)
            statuses[f"end, {flags}"] = status(d.cuStreamEndCapture(stream))
        d.cuStreamBeginCapture(stream, d.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
        statuses["captured launch"] = start(0, stream)
        statuses["loading while capturing"] = status(d.cuModuleLoadData(ptx(b"7.0")))
        statuses["launch after it"] = start(0, stream)
        import json
        print(json.dumps(statuses))
        """,
        cuda=12040,
        gpus=89,
    )
    assert json.loads(record.stdout) == {
        "before cuInit": 3,
        "no context": 201,
        "thread": 0,
        "PTX of 12.4": 0,
        "PTX of 12.5": 222,
        "cubin of 13": 200,
        "another name": 500,
        "48 KiB": 0,
        "49 KiB": 1,
        "too much asked": 1,
        "49 KiB, asked": 0,
        "default stream during capture, 0": 906,
        "end, 0": 901,
        "default stream during capture, 1": 0,
        "end, 1": 0,
        "captured launch": 0,
        "loading while capturing": 900,
        "launch after it": 901,
    }


def full_tensorrt(recording, tmp_path, monkeypatch, **settings):
    """Build through the worker's own process, with a stand-in for full TensorRT."""
    graph = tmp_path / "graph"
    graph.mkdir()
    (graph / "model.onnx").write_bytes(b"")
    for name, value in recording.environment(tmp_path / "calls", **settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(HERE / "packages"), prepend=":")
    job = Job(
        module="tensorrt",
        graph=graph / "model.onnx",
        engine=tmp_path / "model.engine",
        architectures=["current"],
        profiles=[],
    )
    return compile_engine(BACKENDS["tensorrt"], job, use_cache=False).answer


@pytest.mark.parametrize("capability", [75, 89, 90, 120])
def test_engines_of_full_tensorrt_contain_the_kernels(capability, recording, tmp_path, monkeypatch):
    """The worker creates a context; TensorRT loads and starts the kernel on the oldest driver."""
    answer = full_tensorrt(recording, tmp_path, monkeypatch, gpus=capability)
    assert (answer.error, answer.plugins, answer.warnings) == (None, "engine", [])
    assert (tmp_path / "model.engine").read_bytes() == b"an engine with its kernels inside"
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    (started,) = [call for call in calls if call["call"] == "cuLaunchKernel"]
    assert started["status"] == 0
    assert started["grid"] == [2, 2, 1]
    assert started["shared"] == 24 << 10


def test_ptx_that_is_newer_than_the_driver_is_refused(recording, tmp_path, monkeypatch):
    """Repeat the test above with the PTX version of NVRTC 13.5."""
    (tmp_path / "new").mkdir()
    code = "import trtq.plugins.compile as c; c._PTX_VERSIONS['sm89'] = b'9.5'"
    (tmp_path / "new" / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "new"))
    with pytest.raises(BuildError, match="cuModuleLoadData failed with 222"):
        full_tensorrt(recording, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"cuda": 12040}, "driver 580 or later is needed for CUDA 13, you have 550"),
        ({"gpus": ""}, "there is no NVIDIA GPU that this process may use"),
    ],
    ids=["old driver", "no GPU"],
)
def test_the_reason_is_logged_if_kernels_cannot_be_part_of_the_engine(
    settings, why, recording, tmp_path, monkeypatch, caplog
):
    answer = full_tensorrt(recording, tmp_path, monkeypatch, **settings)
    assert answer.plugins == "python"
    assert [text for text in answer.warnings if text.startswith(NEEDS_PYTHON) and why in text]
    assert why in caplog.text


def test_ptx_is_marked_with_the_version_of_its_architecture():
    for architecture, version in (("sm75", "6.5"), ("sm89", "7.8"), ("sm120", "8.7")):
        code = compiling.ptx(Variant("quantize", half=True, native_4=False), architecture)
        assert f"\n.version {version}\n".encode() in code
        assert f"\n.target sm_{architecture[2:]}\n".encode() in code
        assert code.count(b".version") == 1


def test_a_thread_without_context_gets_the_context_of_the_operators_gpu(recording):
    record = recording.run(
        NO_COMPILER
        + """
import ctypes, threading
from contextlib import nullcontext
from types import SimpleNamespace
import torch
from trtq.plugins.launch import Pointers
from trtq.plugins.low_bit import op
from trtq.plugins.spec import LayerSpec

torch.cuda.device = lambda gpu: nullcontext()
torch.cuda.current_device = lambda: 1
torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=0)
layer = LayerSpec(64, 32, 4, 8, 8)
work = lambda: op._start(
    layer, layer.problem((2, 64)), Pointers(*[256] * 8), torch.device("cuda", 1), half=True, silu=False
)
for _ in range(2):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
""",
        gpus="89,86",
    )
    assert "Traceback" not in record.stderr
    assert [call["device"] for call in record.named("cuCtxSetCurrent")] == [1, 1]
    assert len(record.named("cuDevicePrimaryCtxRetain")) == 1
    started = record.named("cuLaunchKernel")
    assert [(call["device"], call["status"]) for call in started] == [(1, 0)] * 4
    assert len({call["thread"] for call in started}) == 2
    assert len(record.named("cuModuleLoadData")) == 2


@pytest.mark.skipif(not RTX.installed, reason="needs tensorrt-rtx")
def test_no_kernel_is_loaded_while_a_graph_is_captured(recording):
    """A plugin gets its shapes in the first enqueue, which may be captured."""
    record = recording.run(
        NO_COMPILER
        + """
import tensorrt_rtx as trt
from cuda.bindings import driver as d
from trtq.plugins.low_bit import registry
from trtq.plugins.low_bit import tensorrt as plugins
from trtq.plugins.spec import Geometry, LayerSpec

class Desc:
    def __init__(self, dims, type_):
        self.dims = self.max = dims
        self.type = type_

gpu = devices.Gpu()
layers = [
    ("LowBitLinear", LayerSpec(64, 512, 4, 4, 4), [(2, 7, 64), (2, 2048, 64), (8, 65536, 64)]),
    ("LowBitConv2d", LayerSpec(64, 512, 4, 8, 8, Geometry((3, 3))), [(1, 64, 9, 9), (4, 64, 256, 256)]),
]
for name, layer, shapes in layers:
    plugin = plugins._plugin_class(trt, devices.current_device)(name, layer).attach_to_context(None)
    for half in (trt.DataType.HALF, trt.DataType.FLOAT):
        for shape in shapes:
            at = [Desc(shape, half)]
            d.cuStreamBeginCapture(gpu.stream, d.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
            plugin.on_shape_change(at, [])
            plugin.enqueue(at, [], [256] * 5, [256], 256, gpu.stream)
            status, _ = d.cuStreamEndCapture(gpu.stream)
            assert int(status) == 0
print(registry.take_failures())
""",
        gpus=89,
    )
    assert record.stdout.strip() == "[]"
    blocks = {tuple(call["block"]) for call in record.named("cuLaunchKernel")}
    shared = {call["shared"] for call in record.named("cuLaunchKernel")}
    assert blocks == {(128, 1, 1), (256, 1, 1)}
    assert shared == {0, *(tile.shared_bytes() for tile in TILES)}, "not every tile was started"


def test_work_of_torch_does_not_invalidate_a_capture(recording):
    """torch's default stream is the legacy stream; an engine's stream must not synchronise with it."""
    record = recording.run(
        """
        from cuda.bindings import driver as d
        from trtq.plugins.device import Gpu
        gpu = Gpu()
        address = gpu.allocate(4)
        d.cuStreamBeginCapture(gpu.stream, d.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
        d.cuMemcpyHtoD(address, bytes(4), 4)
        assert int(d.cuStreamEndCapture(gpu.stream)[0]) == 0
        """
    )
    assert [call["flags"] for call in record.named("cuStreamCreate")] == [1]


def test_after_a_reset_kernels_are_loaded_again(recording):
    record = recording.run(
        NO_COMPILER
        + """
import ctypes
from cuda.bindings import driver as d
from trtq.plugins.launch import Launch
from trtq.plugins.variants import Variant

gpu = devices.Gpu()
launch = Launch(Variant("quantize", True, False), (1, 1, 1), 128, 0, (ctypes.c_int(1),))
for _ in range(2):
    for _ in range(2):
        devices.current_device().start(launch, gpu.stream)
    d.cuDevicePrimaryCtxReset(0)
"""
    )
    assert len(record.named("cuLaunchKernel")) == 4
    assert len(record.named("cuModuleLoadData")) == 2


def test_an_old_driver_is_reported_before_any_other_call(recording):
    record = recording.run(
        """
        from trtq.errors import KernelError
        from trtq.plugins.device import Gpu, current_device, first_gpu
        for call in (Gpu, first_gpu, current_device, lambda: current_device(0)):
            try:
                call()
            except KernelError as err:
                print(err)
        """,
        cuda=12040,
    )
    lines = record.stdout.splitlines()
    text = (
        "no GPU can be used: driver 580 or later is needed for CUDA 13, you have 550 (CUDA 12.4); "
        "update the driver, or `pip install 'cuda-bindings<13' nvidia-cuda-nvrtc-cu12` and "
        "`pip uninstall nvidia-cuda-nvrtc`"
    )
    assert lines == [text] * 4
    assert set(record.names) == {"cuDriverGetVersion"}


def test_errors_of_the_driver_are_explained(recording):
    record = recording.run(
        """
        import json, os
        from trtq.errors import KernelError
        from trtq.plugins.device import Gpu
        messages = {}
        for refused in ("cuInit=34", "cuInit=46", "cuInit=802", "cuInit=803", "cuInit=804", "cuInit=999",
                        "cuDevicePrimaryCtxRetain=2", "cuStreamCreate=702"):
            os.environ["RECORDING_REFUSE"] = refused
            try:
                Gpu()
            except KernelError as err:
                messages[refused] = str(err)
        print(json.dumps(messages))
        """
    )
    messages = json.loads(record.stdout)
    for refused, text in {
        "cuInit=34": "STUB_LIBRARY: the library path has CUDA's stub",
        "cuInit=46": "DEVICE_UNAVAILABLE: another process",
        "cuInit=802": "SYSTEM_NOT_READY: .*fabricmanager",
        "cuInit=803": "SYSTEM_DRIVER_MISMATCH: .*restart",
        "cuInit=804": "COMPAT_NOT_SUPPORTED_ON_DEVICE: .*LD_LIBRARY_PATH",
        "cuInit=999": "ERROR_UNKNOWN: .*--gpus all",
        "cuDevicePrimaryCtxRetain=2": "OUT_OF_MEMORY: the GPU's memory is full",
        "cuStreamCreate=702": "LAUNCH_TIMEOUT: .*smaller batch",
    }.items():
        assert "\n" not in messages[refused]
        assert re.search(text, messages[refused]), messages[refused]


@pytest.mark.parametrize("seen", ["", "-1", "7"])
def test_hidden_gpus_are_reported(seen, recording):
    record = recording.run(
        """
        from trtq.errors import KernelError
        from trtq.plugins.device import Gpu
        from trtq.plugins.driver import first_gpu_uuid
        try:
            Gpu()
        except KernelError as err:
            print(err)
        print(first_gpu_uuid())
        """,
        CUDA_VISIBLE_DEVICES=seen,
    )
    text, uuid = record.stdout.splitlines()
    assert text.endswith(f"that this process may use; CUDA_VISIBLE_DEVICES is {seen!r}")
    assert uuid == "None"


def test_the_first_gpu_is_the_first_visible_gpu(recording):
    code = "from trtq.plugins.driver import first_gpu_uuid; print(first_gpu_uuid())"
    for seen, byte in (("0,1", "10"), ("2", "12"), ("1,0", "11")):
        record = recording.run(code, gpus="89,89,120", CUDA_VISIBLE_DEVICES=seen)
        assert (
            record.stdout.strip() == f"GPU-{byte * 4}-{byte * 2}-{byte * 2}-{byte * 2}-{byte * 6}"
        )


def test_a_gpu_without_integer_tensor_cores_is_refused(recording):
    record = recording.run(
        """
        from trtq.errors import KernelError
        from trtq.plugins.device import Gpu, current_device
        Gpu()
        try:
            current_device()
        except KernelError as err:
            print(err)
        """,
        gpus=61,
    )
    assert "compute capability 7.5 (RTX 20) or later, this one has 6.1" in record.stdout


@pytest.mark.parametrize(
    ("settings", "row", "hint"),
    [
        ({}, "580 (CUDA 13.0)", None),
        ({"cuda": 12040}, "550 (CUDA 12.4)", "driver 580 or later is needed for CUDA 13"),
        ({"gpus": ""}, "580 (CUDA 13.0)", "there is no NVIDIA GPU that this process may use"),
        ({"cuda": 14010}, "CUDA 14.1", None),
    ],
    ids=["supported", "old", "missing", "later"],
)
def test_the_doctor_reports_the_driver(settings, row, hint, recording):
    record = recording.run(
        "import json; from trtq.engine.doctor import doctor; print(json.dumps(doctor().to_json()))",
        **settings,
    )
    report = json.loads(record.stdout.splitlines()[-1])
    assert report["driver"] == row
    gpu = [text for text in report["hints"] if text.startswith("nothing of ours runs on")]
    assert [hint in text for text in gpu] == ([True] if hint else [])
    assert report["ok"], "the main path needs a CPU only"
