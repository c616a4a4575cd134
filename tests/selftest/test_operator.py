"""Stages 3 and 6 without a GPU: their comparison on torch's CPU operator, and times on a fake GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from trtq.bench.kernel_operands import FORMS, SHAPES, Shape, draw_operands
from trtq.plugins.spec import Geometry
from trtq.selftest import operator, times
from trtq.selftest.record import GpuRow, TimeRow
from trtq.selftest.trials import Options, SkippedError

SMALL = Shape("conv", (2, 24, 9, 8), 16, Geometry((3, 3), (2, 2), (1, 1)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", operator.SHAPES, ids=lambda shape: shape.model)
def test_right_outputs_pass(shape, form):
    for use in (lambda o: o.call(), operator._contiguous, operator._fresh_thread):
        assert operator.run(use, shape, form, "cpu").fault is None


def test_a_wrong_value_and_a_wrong_shape_are_described():
    operands = draw_operands(SMALL, "w4a8", torch.device("cpu"))
    output = operands.call()
    wrong = output.clone()
    wrong[1, 3, 2, 1] += 1
    fault = operator.differences(wrong, operands)
    assert fault.startswith("1 of 640 values are wrong, first at (1, 3, 2, 1): ")
    assert "is torch.float32 of [2, 16, 5, 4]" in operator.differences(output.float(), operands)
    assert "of [2, 16, 5], not of" in operator.differences(output[..., 0], operands)


def test_opcheck_finds_a_fake_kernel_with_another_shape(monkeypatch):
    operator._opcheck(draw_operands(SMALL, "w8a8", torch.device("cpu")))
    wrong = torch.library.custom_op(
        "selftest::doubled", lambda x: x * 2, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    wrong.register_fake(lambda x: x.new_empty(3))
    monkeypatch.setattr(operator, "low_bit", wrong)
    monkeypatch.setattr(operator, "_arguments", lambda operands: (torch.ones(2),))
    with pytest.raises(Exception, match="test_faketensor"):
        operator._opcheck(None)


def test_an_error_in_the_thread_is_an_error_of_the_trial():
    def fail():
        raise RuntimeError("no context")

    with pytest.raises(RuntimeError, match="no context"):
        operator._fresh_thread(SimpleNamespace(call=fail))


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs on the CPU: a replay repeats the captured call."""
    captured = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch, "device", lambda _: "cpu")
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: captured[-1]())
    )
    return captured


@pytest.mark.parametrize("stale", [False, True], ids=["replayed", "stale"])
def test_a_graph_that_keeps_its_first_input_fails(graphs, monkeypatch, stale):
    real = operator.Operands.call

    def call(operands):
        output = real(operands)
        graphs.append(lambda: None if stale else output.copy_(real(operands)))
        return output

    monkeypatch.setattr(operator.Operands, "call", call)
    outcome = operator._graph(SMALL, "w8a8")
    if stale:
        assert outcome.fault.startswith("replay 2: ")
    else:
        assert outcome.fault is None


@pytest.mark.parametrize(
    ("cuda", "available", "message"),
    [(None, False, "built without CUDA; install torch with CUDA"), ("13.0", False, "finds no GPU")],
)
@pytest.mark.parametrize("stage", [operator, times])
def test_without_cuda_the_stage_is_one_skipped_trial(stage, cuda, available, message, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    (trial,) = stage.trials(Options())
    with pytest.raises(SkippedError, match=message):
        trial.call()


@pytest.fixture
def gpu(monkeypatch):
    """A 4090 whose kernels do nothing; each further call takes a microsecond more."""
    started = []
    fake = SimpleNamespace(
        architecture="sm89",
        processors=128,
        started=started,
        start=lambda launch, stream: started.append(launch),
    )
    real = torch.device
    monkeypatch.setattr(torch, "device", lambda _: real("cpu"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(times, "current_device", lambda index: fake)
    monkeypatch.setattr(times, "_nvml", lambda: SimpleNamespace(state={"sm_mhz": 2520}))
    row = GpuRow(
        name="NVIDIA GeForce RTX 4090", architecture="sm89", processors=128, memory_bytes=1
    )
    monkeypatch.setattr(times, "gpu_row", lambda index: row)

    def round_seconds(calls):
        for call in calls:
            call()
        return [[(index + 1) * 1e-6] * 3 for index, _ in enumerate(calls)]

    monkeypatch.setattr(times, "round_seconds", round_seconds)
    return fake


def test_a_row_has_the_parts_each_tile_and_the_prediction(gpu):
    outcome = times.measure_layer(SMALL, "w4a8")
    assert outcome.fault is None
    row = TimeRow.model_validate(outcome.sections["rows"][0])
    assert (row.both, row.half, row.quantise, row.product) == (1, 2, 3, 4)
    assert row.tiles == {"64x64": 5, "128x128": 6}
    assert (row.wrong_values, row.state) == (0, {"sm_mhz": 2520})
    assert row.predicted_product is None, "not a layer of the benchmark"
    names = [str(launch.variant).split("-")[0] for launch in gpu.started]
    assert names == ["quantize", "low_bit", "low_bit", "low_bit"]
    tiles = [(launch.variant.tile.m, launch.variant.tile.n) for launch in gpu.started[1:]]
    assert tiles == [tuple(map(int, row.tile.split("x"))), (64, 64), (128, 128)]


def test_wrong_values_are_a_fault_and_the_row_stays(gpu, monkeypatch):
    real = times.expected
    monkeypatch.setattr(times, "expected", lambda operands: real(operands) + 1)
    outcome = times.measure_layer(SMALL, "w8a8")
    assert outcome.fault == "640 values differ from the layer's definition"
    assert outcome.sections["rows"][0]["wrong_values"] == 640


def test_every_layer_and_form_is_a_trial(gpu):
    names = [trial.name for trial in times.trials(Options())]
    assert names[:3] == ["bandwidth", "half-precision product", "int8 product of cuBLAS"]
    assert names[3:] == [f"{form} at {shape.text}" for shape in SHAPES for form in FORMS]


def test_the_limits_of_the_machine_are_rates(gpu, monkeypatch):
    real = torch.zeros, torch.randn, torch.randint
    monkeypatch.setattr(times, "_COPIED_BYTES", 1 << 10)
    monkeypatch.setattr(times, "_SIDE", 64)
    for name, function in zip(("zeros", "randn", "randint"), real, strict=True):
        on_cpu = lambda *a, function=function, device, **k: function(*a, **k)  # noqa: E731
        monkeypatch.setattr(torch, name, on_cpu)
    assert times._bandwidth().detail == {"gigabytes_per_second": round(2048 / 1e-6 / 1e9, 1)}
    rate = {"tera_operations_per_second": round(2 * 64**3 / 1e-6 / 1e12, 1)}
    assert times._product(integers=False).detail == rate
    assert times._product(integers=True).detail == rate
