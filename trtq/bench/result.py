"""Results of `trtq bench` and `trtq bench kernels`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trtq.bench.device import GpuState
from trtq.results import Result

__all__ = [
    "BenchResult",
    "ComparedValue",
    "HistoryComparison",
    "KernelResult",
    "KernelRow",
    "KernelTimings",
    "MeasuredRow",
]


@dataclass(frozen=True, kw_only=True)
class MeasuredRow(Result):
    """One artefact on one provider.

    Attributes:
        path: artefact or checkpoint, as given by the caller.
        provider: runtime, e.g. `cpu`.
        kind: `checkpoint`, `run`, `onnx` or `engine`.
        bits: bit widths, e.g. `w4a8`; the precision of a float model, e.g. `fp32`.
        low_bit: whether the model is quantised.
        added: whether trtq added the row as a baseline.
        device: device of the denoiser, `cpu` or `gpu`; None if loading failed.
        measured: whether the row was measured.
        reason: reason why the row was not measured; None if it was.
        latency_ms: duration of a denoiser call at the first batch size, in milliseconds: `p50`, `p90`,
            `p99`, quartiles `q1` and `q3`, `calls`, `turns`.
        images_per_second: number of whole images per second at the first batch size.
        images_per_second_interval: 95 % interval of `images_per_second`.
        speedup: speedup of the denoiser over the fastest float row on the same device: `baseline`,
            `ratio`, `low`, `high`, `verdict`.
        images_speedup: speedup of whole images, with the same keys.
        psnr_db: PSNR of the images relative to the float model, in dB.
        load_seconds: duration of loading, in seconds.
        build_seconds: duration of building the engines, in seconds.
        denoiser_bytes: size of the denoiser's files, in bytes.
        memory: resident and GPU memory in bytes, by purpose.
        batches: measurements by batch size and by part of the pipeline.
        roofline: position under the device's roofline, see `trtq.bench.cost.Roofline`.
    """

    path: str
    provider: str
    kind: str
    bits: str
    low_bit: bool
    added: bool
    device: str | None
    measured: bool
    reason: str | None
    latency_ms: dict[str, Any] | None
    images_per_second: float | None
    images_per_second_interval: list[float] | None
    speedup: dict[str, Any] | None
    images_speedup: dict[str, Any] | None
    psnr_db: float | None
    load_seconds: float | None
    build_seconds: float | None
    denoiser_bytes: int | None
    memory: dict[str, int | None] | None
    batches: list[dict[str, Any]]
    roofline: dict[str, Any] | None

    @property
    def label(self) -> str:
        """`PATH@PROVIDER`."""
        return f"{self.path}@{self.provider}"


@dataclass(frozen=True, kw_only=True)
class ComparedValue(Result):
    """One value of a row, in an earlier result and in this one.

    Attributes:
        row: `PATH@PROVIDER`.
        batch: batch size; None for a value of the whole row.
        what: name of the value.
        unit: unit of the value.
        before: value in the earlier result.
        after: value in this result.
        ratio: improvement factor, above 1 if this result is better; None if a value is 0.
        verdict: `better`, `worse`, `within the spread`, `too few turns`, `equal`, or `one value each`
            for values without a spread.
    """

    row: str
    batch: int | None
    what: str
    unit: str
    before: float
    after: float
    ratio: float | None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class HistoryComparison(Result):
    """An earlier result compared with this one.

    Attributes:
        file: path of the earlier result.
        date: date of the earlier result.
        rows: every value of every row and batch size that both results have.
        missing: sentences about rows and batch sizes that only one result has.
        different: sentences about rows whose bits or device differ; these are not compared.
    """

    file: str
    date: str | None
    rows: list[ComparedValue]
    missing: list[str]
    different: list[str]


@dataclass(frozen=True, kw_only=True)
class BenchResult(Result):
    """The result of `trtq.benchmark`.

    Attributes:
        model_class: class of the denoiser.
        shape: shape of one denoiser sample, [C, H, W].
        format_version: version of this record.
        device: processor, GPU and driver.
        date: time of the run, in UTC and ISO 8601.
        steps: number of denoising steps.
        guidance: classifier-free guidance scale; 1 disables it.
        turns: number of timing rounds per row and part.
        comparisons: number of low-bit/float comparisons that the intervals correct for.
        threads: number of threads per operator.
        seed: seed of the images.
        packages: installed versions by package.
        rows: one entry per artefact and provider.
        slower: labels of low-bit rows that are slower than float, in steps or in whole images.
        undecided: labels of low-bit rows with too few rounds for a verdict.
        unjudged: labels of low-bit rows without a float row on the same device.
        notes: remarks for the user, one sentence each.
        against: comparison with an earlier result; None if none was given.
    """

    model_class: str
    shape: list[int]
    format_version: int
    device: dict[str, Any]
    date: str
    steps: int
    guidance: float
    turns: int
    comparisons: int
    threads: int
    seed: int
    packages: dict[str, str]
    rows: list[MeasuredRow]
    slower: list[str]
    undecided: list[str]
    unjudged: list[str]
    notes: list[str]
    against: HistoryComparison | None = None


@dataclass(frozen=True, kw_only=True)
class KernelTimings(Result):
    """Times of one layer on the low-bit kernels and in half precision, and its sizes.

    Attributes:
        microseconds: duration of the layer, including quantisation.
        quantise_microseconds: duration of the quantisation launch alone.
        product_microseconds: duration of the product launch alone.
        tile: tile size of the product.
        fp16_microseconds: duration in half precision, with cuBLAS or cuDNN through torch.
        speedup: `fp16_microseconds` divided by `microseconds`.
        speedup_quartiles: first and third quartile of the speedup over the rounds.
        against_constant_scale: duration with a table of 20 steps divided by the duration with one step.
        tera_operations: rate in 10^12 operations per second.
        share_of_peak: share of the GPU's int8 peak; None for an unknown GPU.
        weight_bytes: size of the packed weights, in bytes.
        fp16_weight_bytes: size of the weights in half precision, in bytes.
    """

    microseconds: float
    quantise_microseconds: float
    product_microseconds: float
    tile: str
    fp16_microseconds: float
    speedup: float
    speedup_quartiles: list[float]
    against_constant_scale: float
    tera_operations: float
    share_of_peak: float | None
    weight_bytes: int
    fp16_weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class KernelRow(Result):
    """One layer in one form.

    Attributes:
        model: name of the model that has the layer.
        shape: input and output sizes, as text.
        form: bit widths, e.g. `w4a8`.
        wrong_values: number of wrong output values; None if the row failed before the check.
        error: error message; None for success.
        timings: times and sizes; None after an error. In JSON these are keys of the row.
        state: clocks, power and temperature of the GPU after the row.
    """

    model: str
    shape: str
    form: str
    wrong_values: int | None
    error: str | None
    timings: KernelTimings | None
    state: GpuState

    def _by_key(self) -> dict[str, Any]:
        values = super()._by_key()
        timings, state = values.pop("timings"), values.pop("state")
        return values | {**(timings or {})} | {"state": state}


@dataclass(frozen=True, kw_only=True)
class KernelResult(Result):
    """The result of `trtq bench kernels`.

    Attributes:
        gpu: name of the GPU.
        driver: version of the driver; None if unknown.
        cuda: newest CUDA version that the driver supports; None if unknown.
        torch: version of torch.
        rows: one entry per layer and form.
    """

    gpu: str
    driver: str | None
    cuda: str | None
    torch: str
    rows: list[KernelRow]
