"""Benchmark artefacts side by side, each in a separate process, in interleaved rounds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from trtq.bench.artefacts import BenchRow, baseline, parse_rows
from trtq.bench.device import Nvml, Peak, cpu_name, gpu_peak
from trtq.bench.history import check_same_run, compare, read_earlier
from trtq.bench.measure import ask_optional, measure
from trtq.bench.process import Worker
from trtq.bench.result import BenchResult
from trtq.bench.rows import ActiveRow, Amounts, check_turns, live_rows, make_plan, open_rows
from trtq.bench.verdicts import make_result
from trtq.engine.tensorrt.run import obstacle
from trtq.errors import MeasurementError
from trtq.processor import has_vnni, processor_features, processors
from trtq.progress import ProgressCallback, silent

__all__ = ["benchmark"]

_WORKER = "trtq.bench.worker"
_BATCHES = (1, 4)


def benchmark(
    artefacts: Sequence[str],
    *,
    providers: Sequence[str] = (),
    batches: Sequence[int] | None = None,
    turns: int | None = None,
    images: int = 8,
    steps: int | None = None,
    guidance: float | None = None,
    threads: int | None = None,
    seed: int = 0,
    against: str | Path | None = None,
    judge: bool = False,
    progress: ProgressCallback = silent,
) -> BenchResult:
    """Measure artefacts side by side, with the float model as a baseline if it can be found.

    Args:
        artefacts: paths and `PATH@PROVIDER`, see `parse_rows`.
        providers: runtimes for paths without `@PROVIDER`, see `parse_rows`.
        batches: batch sizes; None: 1 and 4, or 1 for pipelines that are used through their own call.
        turns: number of timing rounds of about 0.5 s per row; None: 10, or as many as a verdict needs.
        images: minimum number of images per row and batch size; at least three batches are generated.
        steps: number of denoising steps; None: the first artefact's calibration, else 20.
        guidance: classifier-free guidance scale; None: the first artefact's calibration.
        threads: number of threads per operator; None: the number of processors of this process.
        seed: seed of the images.
        against: JSON file with an earlier result to compare with.
        judge: whether to raise before measuring if there are too few rounds for a verdict.
        progress: callback with the stage's name, the completed work and the total.

    Raises:
        UsageError: see `parse_rows`; the models differ; `against` is not comparable; no row can run with
            these arguments; too few rounds for a verdict.
        ArtefactError: the manifest of an artefact cannot be read.
        MeasurementError: every row has failed; a single failed row records its reason instead.
    """
    specs = parse_rows(artefacts, providers)
    notes: list[str] = []
    specs += baseline(specs, notes)
    threads = threads or processors()
    device = _describe_device(threads)
    earlier = None if against is None else read_earlier(Path(against), device)
    with ExitStack() as stack:
        rows = [_start(spec, stack) for spec in specs]
        open_rows(rows, threads, progress)
        if batches is None:
            batches = _BATCHES if specs[0].call_of is None else _BATCHES[:1]
        amounts = Amounts(tuple(batches), turns, images, steps, guidance, seed, threads)
        plan = make_plan(rows, amounts)
        if earlier is not None:
            check_same_run(earlier, Path(str(against)), **plan.model_and_sampling)
        if judge:
            check_turns(plan)
        measure(rows, plan, progress)
        peaks = _peaks(stack, rows, threads)
    result = make_result(rows, plan, peaks, device, notes)
    if earlier is None:
        return result
    return replace(result, against=compare(earlier, result.to_json(), str(against)))


def _describe_device(threads: int) -> dict[str, Any]:
    nvml = Nvml()
    return {
        "cpu": cpu_name(),
        "vnni": has_vnni(),
        "cpu_features": sorted(processor_features()),
        "threads": threads,
        "gpu": nvml.name,
        "driver": nvml.driver,
    }


def _start(spec: BenchRow, stack: ExitStack) -> ActiveRow:
    """Start the worker of a row; an engine that cannot run here becomes a failed row."""
    if spec.kind == "engine":
        reason = obstacle(spec.provider)
        if reason is not None:
            return ActiveRow(spec, error=MeasurementError(reason))
    return ActiveRow(spec, stack.enter_context(Worker(_WORKER, spec.label)))


def _peaks(stack: ExitStack, rows: list[ActiveRow], threads: int) -> dict[str, Peak | None]:
    """Peak performance of GPU and processor; the latter is measured after all workers ended."""
    for row in live_rows(rows):
        assert row.worker is not None
        row.worker.close()
    gpu = Nvml().name
    peaks: dict[str, Peak | None] = {
        "gpu float": gpu_peak(gpu, integers=False) if gpu else None,
        "gpu low-bit": gpu_peak(gpu, integers=True) if gpu else None,
    }
    worker = stack.enter_context(Worker(_WORKER, "the processor's peak"))
    peak = ask_optional(worker, "cpu_peak", threads=threads)
    peaks["cpu"] = None if peak is None else Peak(**peak)
    return peaks
