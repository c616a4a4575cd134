"""Our kernels against cuBLAS and cuDNN in half precision, one layer at a time, on the GPU that is there.

Every row is held to the integers: the same layer computed in float64 on the same GPU, scaled in
float32 as the kernel does it, must agree bit by bit. Then kernel and rival take turns, each as one CUDA
graph of several calls, and so do the kernel's two launches alone. A row that is wrong or fails is
recorded, and the others go on.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trtq.bench.device import Nvml, gpu_peak
from trtq.errors import TrtqError, UsageError
from trtq.plugins.device import current_device
from trtq.plugins.driver import driver_cuda, old_driver
from trtq.plugins.launch import Device, Launch, Pointers, choose_tile, layer_launches
from trtq.plugins.low_bit import pack
from trtq.plugins.low_bit.op import flat_fields, low_bit
from trtq.plugins.spec import Geometry, LayerSpec
from trtq.progress import ProgressCallback, silent

__all__ = [
    "FORMS",
    "SHAPES",
    "Shape",
    "bench_kernels",
    "draw_operands",
    "failed_rows",
    "operations",
]

FORMS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4)}
_CALLS, _TURNS, _WARM_UP = 20, 15, 3
_STEPS = 20


@dataclass(frozen=True)
class Shape:
    """A layer of a model that people have.

    Attributes:
        model: whose layer it is.
        size: of the input: `(B, tokens, C)` or `(B, C, H, W)`.
        out: output channels.
        geometry: of the convolution; None for a linear layer.
    """

    model: str
    size: tuple[int, ...]
    out: int
    geometry: Geometry | None = None

    @property
    def text(self) -> str:
        """E.g. `8192 x 320 -> 1280` or `2 x 320 x 64 x 64 -> 320, 3 x 3`."""
        if self.geometry is None:
            return f"{self.size[0] * self.size[1]} x {self.size[2]} -> {self.out}"
        sides = " x ".join(map(str, self.size))
        return f"{sides} -> {self.out}, {self.geometry.kernel[0]} x {self.geometry.kernel[1]}"


_SAME = Geometry((3, 3), padding=(1, 1))
SHAPES = (
    Shape("SD 1.5", (2, 4096, 320), 320),
    Shape("SD 1.5", (2, 4096, 320), 2560),
    Shape("SD 1.5", (2, 4096, 1280), 320),
    Shape("SD 1.5", (2, 1024, 640), 5120),
    Shape("SD 1.5", (2, 320, 64, 64), 320, _SAME),
    Shape("SD 1.5", (2, 640, 32, 32), 640, _SAME),
    Shape("SD 1.5", (2, 1280, 32, 32), 640, _SAME),
    Shape("SDXL", (2, 4096, 640), 5120),
    Shape("SDXL", (2, 4096, 1280), 5120),
    Shape("SDXL", (2, 4096, 5120), 1280),
    Shape("SDXL", (2, 1280, 32, 32), 1280, _SAME),
    Shape("SDXL", (2, 640, 64, 64), 640, _SAME),
    Shape("DiT-XL/2", (16, 256, 1152), 4608),
    Shape("DiT-XL/2", (16, 256, 4608), 1152),
)


def operations(shape: Shape) -> int:
    """Multiplications and additions of a layer."""
    geometry = shape.geometry or Geometry()
    if shape.geometry is None:
        rows, channels = shape.size[0] * shape.size[1], shape.size[2]
    else:
        spec = LayerSpec(shape.size[1], shape.out, 1, 8, 8, geometry)
        rows, channels = spec.problem(shape.size).rows, shape.size[1] // geometry.groups
    return 2 * rows * shape.out * channels * geometry.kernel[0] * geometry.kernel[1]


@dataclass(frozen=True)
class Operands:
    """A random layer and its input on a device.

    Attributes:
        spec: what it is.
        x: half precision, channels last where it is an image.
        weight: packed.
        integers: `q - z`, `[N, C, ...]`.
        terms: float32[4, N].
        tables: float32[4, T].
        step: int64[B], all different where the batch has several images.
    """

    spec: LayerSpec
    x: Tensor
    weight: Tensor
    integers: Tensor
    terms: Tensor
    tables: Tensor
    step: Tensor

    def call(self) -> Tensor:
        """The layer by our kernels."""
        found: Tensor = low_bit(
            self.x,
            self.weight,
            self.terms,
            self.tables,
            self.step,
            None,
            flat_fields(self.spec),
            False,
        )
        return found


def draw_operands(
    shape: Shape, form: str, device: torch.device, *, steps: int = _STEPS, seed: int = 0
) -> Operands:
    """Random codes over their whole range, and values that fill the activation's."""
    weight_bits, activation_bits = FORMS[form]
    rng = np.random.default_rng(seed)
    channels = shape.size[1] if shape.geometry else shape.size[-1]
    spec = LayerSpec(channels, shape.out, steps, weight_bits, activation_bits, shape.geometry)
    geometry = shape.geometry or Geometry()
    size = (shape.out, channels // geometry.groups, *geometry.kernel)
    codes = rng.integers(0, 1 << weight_bits, size, np.uint8)
    zero_point = rng.integers(4, 12, shape.out) if weight_bits == 4 else np.full(shape.out, 128)
    integers = (codes.astype(np.int16) - zero_point.reshape(-1, 1, 1, 1)).astype(np.int8)
    stored = zero_point if weight_bits == 4 else np.zeros_like(zero_point)
    packed = pack.pack_nibbles(codes, zero_point) if weight_bits == 4 else pack.pack_bytes(integers)
    span = (1 << activation_bits) - 1
    scale = (rng.uniform(2, 4, steps) / (span / 2)).astype(np.float32)
    low = np.full(steps, -(1 << (activation_bits - 1)))
    tables = np.stack([scale, 1 / scale, low, low + span]).astype(np.float32)
    terms = pack.terms(
        rng.uniform(0.5e-3, 1e-3, shape.out).astype(np.float32),
        rng.standard_normal(shape.out).astype(np.float32),
        stored,
        integers,
    )
    x = torch.from_numpy(rng.standard_normal(shape.size, np.float32)).to(device).half()
    if shape.geometry is not None:
        x = x.contiguous(memory_format=torch.channels_last)
    step = torch.arange(shape.size[0], device=device) % steps
    tensors = (packed, integers, terms, tables)
    weight, whole, on_device, table = (torch.from_numpy(t).to(device) for t in tensors)
    return Operands(spec, x, weight, whole, on_device, table, step)


def expected(operands: Operands) -> Tensor:
    """The layer from its definition: exact sums in float64, then scaled as the kernel scales them."""
    o, geometry = operands, operands.spec.geometry
    items = (-1, *(1,) * (o.x.ndim - 1))
    scale, inverse, low, high = (row[o.step].reshape(items) for row in o.tables)
    codes = (o.x.float() * inverse).round().clamp(low, high).double()
    channel = (-1,) if geometry is None else (-1, 1, 1)
    if geometry is None:
        sums = functional.linear(codes, o.integers.double().flatten(1))
    else:
        g = geometry
        size = (codes.shape[0], o.spec.out_channels, -1)
        columns = functional.unfold(codes, g.kernel, g.dilation, g.padding, g.stride)
        sums = (o.integers.double().flatten(1) @ columns).reshape(size)
        sums = sums.reshape(o.spec.problem(o.x.shape).out_shape)
    y = sums.float() * (o.terms[0].reshape(channel) * scale) + o.terms[1].reshape(channel)
    found: Tensor = y.half()
    return found


def _launches(operands: Operands, device: Device) -> tuple[list[Launch], list[Tensor]]:
    """The layer's two launches, as the operator makes them, and the memory that they need."""
    o, spec = operands, operands.spec
    problem = spec.problem(o.x.shape, channels_last=spec.geometry is not None)
    sizes = (problem.code_bytes(native_4=False), problem.sum_bytes)
    codes, sums = (torch.empty(size, dtype=torch.uint8, device=o.x.device) for size in sizes)
    out = torch.empty(problem.out_shape, dtype=o.x.dtype, device=o.x.device)
    tensors = (o.x, o.weight, o.terms, o.tables, o.step, out, codes, sums)
    launches = layer_launches(
        problem,
        Pointers(*(tensor.data_ptr() for tensor in tensors)),
        choose_tile(problem, device.processors, device.architecture),
        half=True,
        weight_bits=spec.weight_bits,
        native_4=spec.native_4(device.architecture),
    )
    return launches, [out, codes, sums]


def _starts(launches: Sequence[Launch], device: Device) -> list[Callable[[], object]]:
    def start(launch: Launch) -> Callable[[], object]:
        return lambda: device.start(launch, torch.cuda.current_stream().cuda_stream)

    return [start(launch) for launch in launches]


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    # What made the operands may still be at work on the stream before.
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


def _seconds_in_turns(calls: Sequence[Callable[[], object]]) -> list[list[float]]:
    """Seconds of one call, of each in turn; the first turn is thrown away."""
    graphs = [_captured(call) for call in calls]
    found: list[list[float]] = [[] for _ in calls]
    for turn in range(_TURNS + 1):
        for place, graph in enumerate(graphs):
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if turn:
                found[place].append(start.elapsed_time(end) / 1000 / _CALLS)
    return found


def _row(
    operands: Operands, constant: Operands, shape: Shape, form: str, gpu: Device, name: str
) -> dict[str, Any]:
    """The times of a layer, of its launches and of its rival."""
    half = operands.integers.half()
    bias = operands.terms[1].half()
    if shape.geometry is None:
        half = half.flatten(1)
        rival: Callable[[], object] = lambda: functional.linear(operands.x, half, bias)  # noqa: E731
    else:
        half = half.contiguous(memory_format=torch.channels_last)
        g = shape.geometry
        rival = lambda: functional.conv2d(  # noqa: E731
            operands.x, half, bias, g.stride, g.padding, g.dilation, g.groups
        )
    launches, _memory = _launches(operands, gpu)
    own, fixed, theirs, *parts = _seconds_in_turns(
        (operands.call, constant.call, rival, *_starts(launches, gpu))
    )
    quantising, product = (statistics.median(part) for part in parts)
    seconds, other = statistics.median(own), statistics.median(theirs)
    count = operations(shape)
    peak = gpu_peak(name, integers=True)
    quartiles = statistics.quantiles([a / b for a, b in zip(theirs, own, strict=True)], n=4)
    return {
        "microseconds": seconds * 1e6,
        "quantise_microseconds": quantising * 1e6,
        "product_microseconds": product * 1e6,
        "tile": str(launches[-1].variant).rpartition("-")[2],
        "fp16_microseconds": other * 1e6,
        "speedup": other / seconds,
        "speedup_quartiles": [quartiles[0], quartiles[2]],
        "against_constant_scale": seconds / statistics.median(fixed),
        "tera_operations": count / seconds / 1e12,
        "share_of_peak": None if peak is None else count / seconds / peak.operations,
        "weight_bytes": operands.weight.numel(),
        "fp16_weight_bytes": 2 * half.numel(),
    }


def bench_kernels(
    forms: Sequence[str] = tuple(FORMS),
    shapes: Sequence[Shape] = SHAPES,
    progress: ProgressCallback = silent,
) -> dict[str, Any]:
    """Measure every layer in every form.

    Args:
        forms: of `FORMS`.
        shapes: the layers.
        progress: called with the stage's name, the work done and the total.

    Returns:
        `gpu`, `driver`, `cuda` (that the driver takes), `torch`, and `rows`, each with `model`, `shape`,
        `form`, `wrong_values` (None: it did not come to that), `error` (None: there was none), `state`
        (the GPU after the row, see `trtq.bench.device.Nvml.state`); and, unless there was an error,
        `microseconds` (quantising included), `quantise_microseconds` and `product_microseconds` (either
        launch alone), `tile` (of the product), `fp16_microseconds` (cuBLAS or cuDNN through torch),
        `speedup` and its quartiles over the turns, `against_constant_scale` (time with a table of 20
        steps over time with one), `tera_operations`, `share_of_peak` (of int8; None where it is not
        known), `weight_bytes`, `fp16_weight_bytes`. See `failed_rows`.

    Raises:
        UsageError: there is no NVIDIA GPU, or an unknown form.
    """
    unknown = [form for form in forms if form not in FORMS]
    if unknown:
        raise UsageError(f"unknown form {unknown[0]!r}; choose of {', '.join(FORMS)}")
    if not torch.cuda.is_available():
        old = old_driver()
        raise UsageError(
            "kernels are measured on an NVIDIA GPU, and torch sees none here"
            + ("" if old is None else f" ({old})")
            + "; `trtq plugins build` compiles them without one"
        )
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    gpu, nvml = current_device(torch.cuda.current_device()), Nvml()
    rows = []
    for index, (shape, form) in enumerate((s, f) for s in shapes for f in forms):
        progress("bench kernels", index, len(shapes) * len(forms))
        rows.append(_whole_row(shape, form, device, gpu, name) | {"state": nvml.state})
    cuda = driver_cuda()
    return {
        "gpu": name,
        "driver": nvml.driver,
        "cuda": None if cuda is None else f"{cuda[0]}.{cuda[1]}",
        "torch": torch.__version__,
        "rows": rows,
    }


def _whole_row(
    shape: Shape, form: str, device: torch.device, gpu: Device, name: str
) -> dict[str, Any]:
    """A row, whatever happens: what was measured before it, and what comes after, must not be lost."""
    row: dict[str, Any] = {"model": shape.model, "shape": shape.text, "form": form}
    row |= {"wrong_values": None, "error": None}
    try:
        operands = draw_operands(shape, form, device)
        constant = draw_operands(shape, form, device, steps=1)
        row["wrong_values"] = int((operands.call() != expected(operands)).sum())
        row |= _row(operands, constant, shape, form, gpu, name)
    except Exception as err:  # Memory, a kernel that fails: torch's errors, ours, the driver's.
        first = (str(err).strip() or type(err).__name__).splitlines()[0]
        row["error"] = first if isinstance(err, TrtqError) else f"{type(err).__name__}: {first}"
    return row


def failed_rows(result: dict[str, Any]) -> list[str]:
    """What is wrong with a result of `bench_kernels`, one sentence a row."""
    found = []
    for row in result["rows"]:
        where = f"{row['form']} at {row['shape']}"
        if row["wrong_values"]:
            found.append(
                f"{where}: {row['wrong_values']} values differ from the layer's definition"
            )
        if row["error"] is not None:
            found.append(f"{where}: {row['error']}")
    return found
