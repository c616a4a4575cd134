"""The model of a GPU that a file describes, for the predicted times next to the measured ones."""

from __future__ import annotations

from trtq.bench.device import Peak, gpu_peak
from trtq.bench.kernel_operands import FORMS, SHAPES
from trtq.bench.kernel_prediction import GPUS, GpuModel, PredictedRow, predict_layer
from trtq.selftest.record import GpuRow

__all__ = ["predict_row"]

_HALF_PER_CLOCK = {"sm80": 2048, "sm90": 4096, "sm100": 8192}
"""Half-precision operations with float32 sums per clock and processor, of server architectures."""
_GEFORCE_PER_CLOCK, _OTHER_PER_CLOCK = 512, 1024


def _published(gpu: GpuRow) -> tuple[GpuModel, Peak] | None:
    """The model of a GPU that is in the tables of data sheets."""
    name = gpu.name.removeprefix("NVIDIA ")
    peak = gpu_peak(gpu.name, integers=False)
    models = [model for model in GPUS.values() if model.name == name]
    return None if peak is None or not models else (models[0], peak)


def _described(gpu: GpuRow) -> tuple[GpuModel, Peak] | None:
    """The model by what the driver reports; None: it reports too little."""
    if not (gpu.clock_mhz and gpu.cache_bytes):
        return None
    gigahertz = gpu.clock_mhz / 1e3
    peak = gpu_peak(gpu.name, integers=False)
    if peak is None:
        if not (gpu.memory_mhz and gpu.bus_bits):
            return None
        usual = _GEFORCE_PER_CLOCK if "GeForce" in gpu.name else _OTHER_PER_CLOCK
        per_clock = _HALF_PER_CLOCK.get(gpu.architecture, usual)
        operations = per_clock * gpu.processors * gigahertz * 1e9
        # Two transfers per clock.
        peak = Peak(operations, 2 * gpu.memory_mhz * 1e6 * gpu.bus_bits / 8, "clocks")
    model = GpuModel(gpu.name, gpu.processors, gigahertz, gpu.cache_bytes >> 20)
    return model, peak


def predict_row(gpu: GpuRow, shape: str, form: str) -> PredictedRow | None:
    """The predicted times of a layer of the benchmark on a GPU.

    Args:
        gpu: the GPU; data sheets count where its name is in them, else what the driver reports.
        shape: text of one of the benchmark's shapes.
        form: bit widths, e.g. `w4a8`.

    Returns:
        The prediction; None: the layer is not the benchmark's, or the GPU is described too little.
    """
    known = _published(gpu) or _described(gpu)
    shapes = [row for row in SHAPES if row.text == shape]
    if known is None or not shapes or form not in FORMS:
        return None
    return predict_layer(shapes[0], form, known[0], gpu.architecture, known[1])
