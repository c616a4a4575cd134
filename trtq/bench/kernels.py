"""Compare the low-bit kernels with cuBLAS and cuDNN in half precision, layer by layer, on a GPU.

Each row is first checked bit by bit against `kernel_operands.expected`, computed on the same GPU. Then
the low-bit kernel, the half-precision kernel and the two launches of the low-bit kernel are timed in
interleaved rounds, each as one CUDA graph of several calls. A row that is wrong or fails is recorded,
and the benchmark continues with the next row.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trtq.bench.device import Nvml, gpu_peak
from trtq.bench.kernel_operands import (
    FORMS,
    SHAPES,
    Operands,
    Shape,
    draw_operands,
    expected,
    operations,
)
from trtq.bench.result import KernelResult, KernelRow, KernelTimings
from trtq.errors import TrtqError, UsageError
from trtq.plugins.device import current_device
from trtq.plugins.driver import driver_cuda, old_driver
from trtq.plugins.launch import Device, Launch, Pointers, layer_launches
from trtq.plugins.tile_choice import Plan, choose_plan
from trtq.progress import ProgressCallback, silent

__all__ = [
    "FORMS",
    "bench_kernels",
    "failed_rows",
    "half_precision_call",
    "layer_plan",
    "planned_launches",
    "round_seconds",
    "starts",
]

_CALLS, _ROUNDS, _WARM_UP = 20, 15, 3


def layer_plan(operands: Operands, device: Device) -> Plan:
    """The plan that the layer's operator chooses on a device."""
    spec, problem = operands.spec, operands.problem
    return choose_plan(
        problem,
        device.processors,
        device.architecture,
        packed=spec.packed(device.architecture),
        native_4=spec.native_4(device.architecture),
        scratch_bytes=problem.split_bytes,
    )


def planned_launches(
    operands: Operands, device: Device, plan: Plan
) -> tuple[list[Launch], list[Tensor]]:
    """The two kernel launches of a layer under a plan, and the buffers that they use."""
    o, spec, problem = operands, operands.spec, operands.problem
    sizes = (problem.code_bytes(native_4=False), problem.sum_bytes, problem.split_bytes)
    codes, sums, partial = (
        torch.empty(size, dtype=torch.uint8, device=o.x.device) for size in sizes
    )
    out = torch.empty(problem.out_shape, dtype=o.x.dtype, device=o.x.device)
    tensors = (o.x, o.weight, o.terms, o.tables, o.step, out, codes, sums)
    launches = layer_launches(
        problem,
        replace(Pointers(*(tensor.data_ptr() for tensor in tensors)), partial=partial.data_ptr()),
        plan.tile,
        splits=plan.splits,
        half=True,
        weight_bits=spec.weight_bits,
        native_4=spec.native_4(device.architecture),
    )
    return launches, [out, codes, sums, partial]


def starts(launches: Sequence[Launch], device: Device) -> list[Callable[[], object]]:
    """Functions that start a launch each, on torch's current stream."""

    def start(launch: Launch) -> Callable[[], object]:
        return lambda: device.start(launch, torch.cuda.current_stream().cuda_stream)

    return [start(launch) for launch in launches]


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    # The kernels that created the operands may still run on the previous stream.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    return graph


def round_seconds(calls: Sequence[Callable[[], object]]) -> list[list[float]]:
    """Seconds per call of each callable, one value per round; the first round is discarded."""
    graphs = [_captured(call) for call in calls]
    seconds: list[list[float]] = [[] for _ in calls]
    for round_index in range(_ROUNDS + 1):
        for index, graph in enumerate(graphs):
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if round_index:
                seconds[index].append(start.elapsed_time(end) / 1000 / _CALLS)
    return seconds


def half_precision_call(operands: Operands) -> Callable[[], object]:
    """A call of the layer in half precision, by cuBLAS or cuDNN."""
    weight, bias = operands.integers.half(), operands.terms[1].half()
    g = operands.spec.geometry
    if g is None:
        flat = weight.flatten(1)
        return lambda: functional.linear(operands.x, flat, bias)
    last = weight.contiguous(memory_format=torch.channels_last)
    return lambda: functional.conv2d(
        operands.x, last, bias, g.stride, g.padding, g.dilation, g.groups
    )


def _timings(operands: Operands, constant: Operands, shape: Shape, gpu: Device) -> KernelTimings:
    """Times of a layer, of its two launches and of the half-precision kernel."""
    half_call = half_precision_call(operands)
    launches, _memory = planned_launches(operands, gpu, layer_plan(operands, gpu))
    low_bit_seconds, constant_seconds, half_seconds, *parts = round_seconds(
        (operands.call, constant.call, half_call, *starts(launches, gpu))
    )
    quantising, product = (statistics.median(part) for part in parts)
    seconds, fp16_seconds = statistics.median(low_bit_seconds), statistics.median(half_seconds)
    count = operations(shape)
    peak = gpu_peak(torch.cuda.get_device_name(operands.x.device), integers=True)
    ratios = [half / low for half, low in zip(half_seconds, low_bit_seconds, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return KernelTimings(
        microseconds=seconds * 1e6,
        quantise_microseconds=quantising * 1e6,
        product_microseconds=product * 1e6,
        tile=str(launches[-1].variant).rpartition("-")[2],
        fp16_microseconds=fp16_seconds * 1e6,
        speedup=fp16_seconds / seconds,
        speedup_quartiles=[quartiles[0], quartiles[2]],
        against_constant_scale=seconds / statistics.median(constant_seconds),
        tera_operations=count / seconds / 1e12,
        share_of_peak=None if peak is None else count / seconds / peak.operations,
        weight_bytes=operands.weight.numel(),
        fp16_weight_bytes=2 * operands.integers.numel(),
    )


def bench_kernels(
    forms: Sequence[str] = tuple(FORMS),
    shapes: Sequence[Shape] = SHAPES,
    progress: ProgressCallback = silent,
) -> KernelResult:
    """Measure every layer in every form.

    Args:
        forms: names of `FORMS`.
        shapes: layer shapes.
        progress: callback with the stage's name, the completed rows and the total.

    Raises:
        UsageError: torch finds no NVIDIA GPU, or a form is unknown.
    """
    unknown = [form for form in forms if form not in FORMS]
    if unknown:
        raise UsageError(f"unknown form {unknown[0]!r}; choose from {', '.join(FORMS)}")
    if not torch.cuda.is_available():
        old = old_driver()
        raise UsageError(
            "the kernel benchmark needs an NVIDIA GPU, and torch finds none"
            + ("" if old is None else f" ({old})")
            + "; `trtq plugins build` compiles the kernels without a GPU"
        )
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    gpu, nvml = current_device(torch.cuda.current_device()), Nvml()
    rows = []
    for index, (shape, form) in enumerate((s, f) for s in shapes for f in forms):
        progress("bench kernels", index, len(shapes) * len(forms))
        rows.append(_measured_row(shape, form, device, gpu, nvml))
    cuda = driver_cuda()
    return KernelResult(
        gpu=name,
        driver=nvml.driver,
        cuda=None if cuda is None else f"{cuda[0]}.{cuda[1]}",
        torch=torch.__version__,
        rows=rows,
    )


def _measured_row(
    shape: Shape, form: str, device: torch.device, gpu: Device, nvml: Nvml
) -> KernelRow:
    """Measure one row; an exception becomes the row's `error`, so the other rows are kept."""
    wrong_values, error, timings = None, None, None
    try:
        operands = draw_operands(shape, form, device)
        constant = draw_operands(shape, form, device, steps=1)
        wrong_values = int((operands.call() != expected(operands)).sum())
        timings = _timings(operands, constant, shape, gpu)
    except Exception as err:  # Out of memory or a failed kernel, from torch, trtq or driver.
        first = (str(err).strip() or type(err).__name__).splitlines()[0]
        error = first if isinstance(err, TrtqError) else f"{type(err).__name__}: {first}"
    return KernelRow(
        model=shape.model,
        shape=shape.text,
        form=form,
        wrong_values=wrong_values,
        error=error,
        timings=timings,
        state=nvml.state,
    )


def failed_rows(result: Mapping[str, Any]) -> list[str]:
    """Describe each wrong or failed row of a result in one sentence; the result may be JSON."""
    sentences = []
    for row in result["rows"]:
        where = f"{row['form']} at {row['shape']}"
        if row["wrong_values"]:
            sentences.append(
                f"{where}: {row['wrong_values']} values differ from the layer's definition"
            )
        if row["error"] is not None:
            sentences.append(f"{where}: {row['error']}")
    return sentences
