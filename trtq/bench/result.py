"""What `trtq bench` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trtq.results import Result

__all__ = ["BenchResult", "ComparedValue", "HistoryComparison", "MeasuredRow"]


@dataclass(frozen=True, kw_only=True)
class MeasuredRow(Result):
    """One artefact on one provider.

    Attributes:
        path: artefact or checkpoint, as given by the caller.
        provider: what runs it, e.g. `cpu`.
        kind: `checkpoint`, `run`, `onnx` or `engine`.
        bits: e.g. `w4a8`; precision of a float model, e.g. `fp32`.
        low_bit: whether the model is quantised.
        added: whether the row was added for comparison, without being asked for.
        device: `cpu` or `gpu`, where the denoiser was loaded; None if loading failed.
        measured: whether there are measurements.
        reason: why there are none.
        latency_ms: one call of the denoiser at the first batch size, in milliseconds: `p50`, `p90`,
            `p99`, quartiles `q1` and `q3`, `calls`, `turns`.
        images_per_second: whole images at the first batch size.
        images_per_second_interval: 95 % interval of `images_per_second`.
        speedup: of the denoiser, against the fastest float row of the same device: `baseline`,
            `ratio`, `low`, `high`, `verdict`.
        images_speedup: of whole images, likewise.
        psnr_db: images against those of the float model, in dB.
        load_seconds: time of loading, in seconds.
        build_seconds: time of building the engines, in seconds.
        denoiser_bytes: size of the denoiser's files.
        memory: resident and GPU memory in bytes, by purpose.
        batches: measurements by batch size and by part of the pipeline.
        roofline: place below the device's roofline, see `trtq.bench.cost.roofline`.
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
        unit: its unit.
        before: value in the earlier result.
        after: value in this result.
        ratio: above 1 if this result is better; None if a value is 0.
        verdict: `better`, `worse`, `within the spread`, `too few turns`, `equal`, or `one value each`,
            which has no spread to judge by.
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
        shape: one sample of the denoiser, [C, H, W].
        format_version: version of this record.
        device: processor, GPU and driver.
        date: UTC, ISO 8601.
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 disables it.
        turns: timing rounds per row and part.
        comparisons: number of speedups whose intervals hold together with 95 % confidence.
        threads: threads of one operator.
        seed: seed of the images.
        packages: installed versions by package.
        rows: one entry per artefact and provider.
        slower: labels of low-bit rows that are slower than float, in steps or in whole images.
        undecided: labels of low-bit rows with too few turns for a verdict.
        unjudged: labels of low-bit rows without a float row on the same device.
        notes: sentences for the reader.
        against: comparison with an earlier result; None unless one was given.
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
