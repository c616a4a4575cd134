"""Predict the times of the kernel benchmark's layers, without a GPU. Nothing here is a measurement.

The product is `trtq.plugins.tile_choice`'s model of a processor, at the boost clock, and at least the
time of the bytes beyond the L2 cache. Expect 30 % of error in a single layer, and more where a model's
assumption fails; files of measurements are to correct its constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trtq.bench.device import Peak, gpu_peak
from trtq.bench.kernel_operands import FORMS, SHAPES, Shape, operations
from trtq.errors import UsageError
from trtq.plugins.spec import LayerSpec, Problem
from trtq.plugins.tile_choice import choose_plan, layer_cycles
from trtq.results import Result

__all__ = [
    "GPUS",
    "GpuModel",
    "KernelPrediction",
    "PredictedRow",
    "predict_kernels",
    "predict_layer",
]


@dataclass(frozen=True)
class GpuModel:
    """A GPU that stands for its architecture.

    Attributes:
        name: name, as in the table of peaks.
        processors: number of streaming multiprocessors.
        gigahertz: boost clock.
        cache_mib: L2 cache, in MiB.
    """

    name: str
    processors: int
    gigahertz: float
    cache_mib: int


GPUS = {
    "sm80": GpuModel("A100-SXM4-80GB", 108, 1.41, 40),
    "sm86": GpuModel("GeForce RTX 3090", 82, 1.695, 6),
    "sm89": GpuModel("GeForce RTX 4090", 128, 2.52, 72),
    "sm90": GpuModel("H100 80GB HBM3", 132, 1.755, 50),
    "sm120": GpuModel("GeForce RTX 5090", 170, 2.407, 96),
}
"""One GPU per architecture, from NVIDIA's data sheets."""
_LAUNCH, _QUANTIZE_START = 1.5, 2.0
"""Microseconds of a launch, and of the quantise kernel's first bytes."""
_HALF_SHARE, _HALF_START = 0.8, 1.0
"""Share of the half-precision peak that cuBLAS and cuDNN reach, and microseconds of their launch."""
_CACHE_SHARE, _MEMORY_SHARE, _CACHE_BYTES = 0.6, 0.85, 16
"""Usable shares of the L2 cache's size and of the memory's bandwidth, and bytes per cycle of a processor
in the quantise kernel."""


@dataclass(frozen=True, kw_only=True)
class PredictedRow(Result):
    """The predicted times of one layer in one form.

    Attributes:
        model: name of the model that has the layer.
        shape: input and output sizes, as text.
        form: bit widths, e.g. `w4a8`.
        tile: tile size of the product.
        splits: number of blocks that divide the product of an output.
        quantise_microseconds: duration of the quantisation launch.
        product_microseconds: duration of the product launch.
        fp16_microseconds: duration in half precision.
        speedup: `fp16_microseconds` divided by the sum of the two launches.
    """

    model: str
    shape: str
    form: str
    tile: str
    splits: int
    quantise_microseconds: float
    product_microseconds: float
    fp16_microseconds: float
    speedup: float


@dataclass(frozen=True, kw_only=True)
class KernelPrediction(Result):
    """The result of `trtq bench kernels --predict`.

    Attributes:
        predicted: always True: no value is a measurement.
        gpu: name of the GPU that stands for the architecture.
        architecture: architecture, e.g. `sm89`.
        mean_speedup: geometric mean of the speed-ups, by form.
        rows: one entry per layer and form.
    """

    predicted: bool
    gpu: str
    architecture: str
    mean_speedup: dict[str, float]
    rows: list[PredictedRow]


def predict_kernels(
    architecture: str, forms: Sequence[str] = tuple(FORMS), shapes: Sequence[Shape] = SHAPES
) -> KernelPrediction:
    """Predict every layer in every form.

    Args:
        architecture: a key of `GPUS`.
        forms: names of `FORMS`.
        shapes: layer shapes.

    Raises:
        UsageError: the architecture or a form is unknown.
    """
    if architecture not in GPUS:
        raise UsageError(f"unknown architecture {architecture!r}; choose from {', '.join(GPUS)}")
    unknown = [form for form in forms if form not in FORMS]
    if unknown:
        raise UsageError(f"unknown form {unknown[0]!r}; choose from {', '.join(FORMS)}")
    gpu = GPUS[architecture]
    peak = gpu_peak(gpu.name, integers=False)
    assert peak is not None
    rows = [
        predict_layer(shape, form, gpu, architecture, peak) for shape in shapes for form in forms
    ]
    means = {}
    for form in forms:
        speedups = [row.speedup for row in rows if row.form == form]
        product = 1.0
        for value in speedups:
            product *= value ** (1 / len(speedups))
        means[form] = product
    return KernelPrediction(
        predicted=True,
        gpu=gpu.name,
        architecture=architecture,
        mean_speedup=means,
        rows=rows,
    )


def _memory_microseconds(total: float, gpu: GpuModel, bandwidth: float) -> float:
    """Microseconds of the bytes that do not stay in the L2 cache."""
    beyond = max(0.0, total - _CACHE_SHARE * (gpu.cache_mib << 20))
    return beyond / (_MEMORY_SHARE * bandwidth) * 1e6


def predict_layer(
    shape: Shape, form: str, gpu: GpuModel, architecture: str, half: Peak
) -> PredictedRow:
    """Predict one layer in one form.

    Args:
        shape: shape of the layer.
        form: name of one of `FORMS`.
        gpu: processors, clock and cache of the GPU.
        architecture: architecture of the GPU, which may be absent from `GPUS`.
        half: half-precision peak and bandwidth of the GPU.
    """
    channels = shape.size[2] if shape.geometry is None else shape.size[1]
    spec = LayerSpec(channels, shape.out, 1, *FORMS[form], shape.geometry)
    problem = spec.problem(shape.size, channels_last=shape.geometry is not None)
    native, packed = spec.native_4(architecture), spec.packed(architecture)
    plan = choose_plan(
        problem,
        gpu.processors,
        architecture,
        packed=packed,
        native_4=native,
        scratch_bytes=problem.split_bytes,
    )
    cycles = layer_cycles(
        problem, plan, gpu.processors, architecture, packed=packed, native_4=native
    )
    codes = problem.code_bytes(native_4=native)
    weights = shape.out * problem.padded_channels * _taps(problem) * spec.weight_bits / 8
    moved = codes + weights + 2 * problem.rows * shape.out
    product = _LAUNCH + max(
        cycles / gpu.gigahertz / 1e3, _memory_microseconds(moved, gpu, half.bytes)
    )
    read = 2 * problem.batch * problem.height * problem.width * problem.channels + codes
    cached = read / (_CACHE_BYTES * gpu.processors * gpu.gigahertz * 1e3)
    quantise = _LAUNCH + max(_QUANTIZE_START, cached, _memory_microseconds(read, gpu, half.bytes))
    fp16 = _HALF_START + operations(shape) / (_HALF_SHARE * half.operations) * 1e6
    return PredictedRow(
        model=shape.model,
        shape=shape.text,
        form=form,
        tile=f"{plan.tile.m}x{plan.tile.n}",
        splits=plan.splits,
        quantise_microseconds=quantise,
        product_microseconds=product,
        fp16_microseconds=fp16,
        speedup=fp16 / (quantise + product),
    )


def _taps(problem: Problem) -> int:
    return problem.geometry.kernel[0] * problem.geometry.kernel[1]
