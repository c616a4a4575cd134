"""The kernel benchmark on a simulated GPU; only the timing itself needs a GPU."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

from trtq.bench import kernels as benching
from trtq.bench.kernel_operands import FORMS, SHAPES, Shape, draw_operands, expected, operations
from trtq.bench.kernels import bench_kernels, failed_rows
from trtq.errors import UsageError
from trtq.plugins.spec import Geometry
from trtq.progress import silent

SMALL = (
    Shape("linear", (2, 7, 40), 24),
    Shape("conv", (2, 24, 9, 8), 16, Geometry((3, 3), (2, 2), (1, 1))),
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.model)
def test_the_expected_output_is_that_of_the_operator(shape, form):
    operands = draw_operands(shape, form, torch.device("cpu"))
    assert len(operands.step.unique()) == 2
    assert torch.equal(operands.call(), expected(operands))


def test_counts_operations():
    assert operations(SMALL[0]) == 2 * 14 * 40 * 24
    assert operations(SMALL[1]) == 2 * 2 * 5 * 4 * 24 * 16 * 9
    linear = [shape for shape in SHAPES if shape.geometry is None]
    assert min(operations(shape) for shape in linear) > 1e9
    assert {shape.model for shape in SHAPES} == {"SD 1.5", "SDXL", "DiT-XL/2"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_names_the_command_that_needs_none():
    with pytest.raises(UsageError, match="torch finds none; `trtq plugins build`"):
        bench_kernels()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_every_value_is_exact():
    result = bench_kernels(shapes=SMALL)
    assert [row["wrong_values"] for row in result["rows"]] == [0] * 6


class Gpu:
    """Records the started launches."""

    architecture, processors = "sm89", 128

    def __init__(self):
        self.started = []

    def prepare(self, launch):
        pass

    def start(self, launch, stream):
        self.started.append((launch.variant.kernel, stream))


@pytest.fixture
def gpu(monkeypatch):
    """A simulated GPU that computes on the CPU; its kernels and times are fake."""
    simulated = Gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(benching.torch, "device", lambda _: "cpu")
    monkeypatch.setattr(benching, "current_device", lambda index: simulated)
    monkeypatch.setattr(benching, "driver_cuda", lambda: (13, 0))
    nvml = SimpleNamespace(driver="580.65", state={"sm_mhz": 2520, "watts": 449.8})
    monkeypatch.setattr(benching, "Nvml", lambda: nvml)

    def round_seconds(calls):
        for call in calls:
            call()
        return [[(index + 1) * 1e-6] * 4 for index, _ in enumerate(calls)]

    monkeypatch.setattr(benching, "round_seconds", round_seconds)
    return simulated


def test_a_row_has_the_time_of_each_launch_and_the_state_of_the_gpu(gpu):
    result = bench_kernels(["w4a4"], SMALL)
    assert (result["gpu"], result["driver"], result["cuda"]) == (
        "NVIDIA GeForce RTX 4090",
        "580.65",
        "13.0",
    )
    for row in result["rows"]:
        assert (row["error"], row["wrong_values"]) == (None, 0)
        assert row["quantise_microseconds"] == pytest.approx(4)
        assert row["product_microseconds"] == pytest.approx(5)
        assert row["tile"] == "64x64"
        assert row["state"] == {"sm_mhz": 2520, "watts": 449.8}
    assert gpu.started == [("quantize", 5), ("low_bit", 5)] * 2
    assert failed_rows(result) == []


def test_wrong_values_and_errors_are_recorded_and_other_rows_continue(gpu, monkeypatch):
    real, rows = benching.expected, []

    def wrong_then_failing(operands):
        rows.append(operands)
        if len(rows) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return real(operands) + (len(rows) == 1)

    monkeypatch.setattr(benching, "expected", wrong_then_failing)
    result = bench_kernels(["w8a8"], (*SMALL, *SMALL))
    first, second, third, fourth = result["rows"]
    assert first["wrong_values"] == 2 * 7 * 24
    assert first["microseconds"] == pytest.approx(1)
    assert (second["wrong_values"], second["error"]) == (
        None,
        "OutOfMemoryError: CUDA out of memory.",
    )
    assert third["wrong_values"] == fourth["wrong_values"] == 0
    assert failed_rows(result) == [
        "w8a8 at 14 x 40 -> 24: 336 values differ from the layer's definition",
        "w8a8 at 2 x 24 x 9 x 8 -> 16, 3 x 3: OutOfMemoryError: CUDA out of memory.",
    ]


def test_the_command_writes_all_rows_and_exits_with_1(gpu, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from trtq.cli import app

    real, rows = benching.expected, []

    def wrong(operands):
        rows.append(operands)
        return real(operands) + (len(rows) == 1)

    monkeypatch.setattr(benching, "expected", wrong)
    monkeypatch.setattr(benching, "SHAPES", SMALL)
    monkeypatch.setattr(benching.bench_kernels, "__defaults__", (("w8a8",), SMALL, silent))
    out = tmp_path / "kernels.json"
    done = CliRunner().invoke(app, ["bench", "kernels", "--form", "w8a8", "-o", str(out)])
    assert done.exit_code == 1
    assert (
        "error: w8a8 at 14 x 40 -> 24: 336 values differ from the layer's definition" in done.output
    )
    assert [row["wrong_values"] for row in json.loads(out.read_text())["rows"]] == [336, 0]
    assert "Traceback" not in done.output
    nowhere = str(tmp_path / "none" / "kernels.json")
    done = CliRunner().invoke(app, ["bench", "kernels", "-o", nowhere])
    assert done.exit_code == 2
    assert f"the folder {tmp_path / 'none'} does not exist" in done.output
    assert len(rows) == 2, "the folder is checked before the first measurement"


def test_warm_up_waits_for_the_kernels_that_create_the_operands(monkeypatch):
    """Warm-up runs on a separate stream."""
    events = []

    class Stream:
        def wait_stream(self, other):
            events.append(("wait", other))

    class Graph(contextlib.nullcontext):
        pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "torch's")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    benching._captured(lambda: events.append("call"))
    assert events[:2] == [("wait", "torch's"), "call"]
