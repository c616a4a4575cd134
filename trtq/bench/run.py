"""How fast is it? Artefacts side by side, each in a process of its own, called in turns."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtq.artefact.manifest_file import package_versions
from trtq.artefact.opened import DEFAULT_STEPS
from trtq.bench.artefacts import Target, baseline, parse_targets
from trtq.bench.cost import roofline
from trtq.bench.device import Nvml, Peak, cpu_name, gpu_peak
from trtq.bench.history import FORMAT_VERSION, check_same_run, compare, read_former
from trtq.bench.process import Worker
from trtq.bench.result import BenchResult, MeasuredRow
from trtq.bench.summary import median_interval, min_turns, speedup, summarize
from trtq.bench.turns import rotated
from trtq.bench.worker import DENOISER
from trtq.engine.tensorrt.run import obstacle
from trtq.errors import MeasurementError, TrtqError, UsageError
from trtq.evaluation.metrics import psnr_db
from trtq.processes import processors
from trtq.processor import has_vnni, processor_features
from trtq.progress import ProgressCallback, silent

__all__ = ["benchmark"]

logger = logging.getLogger(__name__)

DEFAULT_TURNS = 10
_WORKER = "trtq.bench.worker"
_MIN_DRAWS = 3
_SPEEDUPS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "speedup": lambda one: one["parts"][DENOISER],
    "images_speedup": lambda one: one["batch_of_images"],
}
"""What rows are compared in, and where a batch size has the timings of it."""


@dataclass
class _Row:
    """A target while it is being measured.

    Attributes:
        target: what it is.
        worker: its process; None when there is none, or no more.
        error: why it is not measured.
        opened: what the worker said when it loaded the artefact.
        batches: what was measured, by batch size.
        memory: what the worker said of it.
        images: drawn at the first batch size.
        operations: of one call of the denoiser, by batch size.
    """

    target: Target
    worker: Worker | None = None
    error: TrtqError | None = None
    opened: dict[str, Any] = field(default_factory=dict)
    batches: dict[int, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    images: list[np.ndarray] = field(default_factory=list)
    operations: dict[int, int | None] = field(default_factory=dict)

    @property
    def device(self) -> str | None:
        """`gpu` or `cpu`, as the worker said when it had loaded the artefact; None if it has not."""
        return self.opened.get("device")

    @property
    def reason(self) -> str | None:
        """Why it is not measured, without its name; None if it is."""
        return (
            None if self.error is None else str(self.error).removeprefix(f"{self.target.label}: ")
        )

    def ask(self, question: str, **arguments: Any) -> dict[str, Any] | None:
        """The worker's answer; None if it failed or has ended, which is then the row's error."""
        if self.worker is None:
            return None
        try:
            return self.worker.ask(question, **arguments)
        except TrtqError as err:  # The others go on: what they took would be lost.
            self.error = err
            self.worker.close()
            self.worker = None
            return None


@dataclass(frozen=True)
class _Plan:
    """What is measured of every row.

    Attributes:
        batches: images at once.
        turns: of the timings of parts.
        images: drawn with each row at least.
        steps: denoising steps.
        guidance: 1 is none.
        seed: of the images.
        threads: of one operator.
        prompts: that the images are to show; None for a model that takes none.
        comparisons: of rows with float rows, at each batch size, of steps and of whole images.
    """

    batches: tuple[int, ...]
    turns: int
    images: int
    steps: int
    guidance: float
    seed: int
    threads: int
    prompts: list[str] | None
    comparisons: int

    def draws(self, batch: int) -> int:
        """Batches of images to draw: as many turns as a verdict needs, if the parts have so many."""
        wanted = math.ceil(self.images / batch)
        return max(_MIN_DRAWS, wanted, min(self.turns, min_turns(self.comparisons)))


def benchmark(
    artefacts: Sequence[str],
    *,
    providers: Sequence[str] = (),
    batches: Sequence[int] = (1, 4),
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
    """Measure artefacts side by side; the float model is among them wherever it can be found.

    Every row has a process of its own. All are loaded, and then called in turns: a turn is about half a
    second of calls of one row, then of the next.

    Args:
        artefacts: paths and `PATH@PROVIDER`, see `parse_targets`.
        providers: see `parse_targets`.
        batches: images at once.
        turns: of the timings of parts; by default 10, or more where a verdict needs more.
        images: drawn with each row at least, at each batch size; three batches at the least, and as many
            as a verdict needs, but not more than `turns` for it.
        steps: denoising steps; by default what the first artefact was calibrated for, else 20.
        guidance: classifier-free guidance; by default what the first artefact was calibrated with.
        threads: of one operator, for every row; by default as many as this process may use.
        seed: of the images.
        against: a former result to compare with, as this function gave it, as JSON.
        judge: refuse to begin with too few turns for a verdict.
        progress: called with the stage's name, the work done and the total.

    Returns:
        One row per artefact and provider, verdicts and the run's settings.

    Raises:
        UsageError: see `parse_targets`; the rows are different models; `against` is no such result, or
            of another device, model, size or sampling; no row can be measured with what was asked for;
            too few turns to judge.
        ArtefactError: an artefact's manifest cannot be read.
        MeasurementError: no row could be measured; a single one that fails says why instead.
    """
    targets = parse_targets(artefacts, providers)
    notes: list[str] = []
    targets += baseline(targets, notes)
    count = threads or processors()
    device = _describe_device(count)
    path = None if against is None else Path(against)
    former = None if path is None else read_former(path, device)
    with ExitStack() as stack:
        rows = [_start(target, stack) for target in targets]
        size = next((target.size for target in targets if target.size is not None), None)
        _open(rows, count, size, progress)
        _check_any_left(rows)
        _check_same_model(rows)
        opened = next(row.opened for row in rows if row.opened)
        model = {key: opened[key] for key in ("model_class", "shape")}
        sampling = _sampling(rows, steps, guidance)
        if former is not None and path is not None:
            check_same_run(former, path, steps=sampling[0], guidance=sampling[1], **model)
        comparisons = _comparisons(rows, len(batches))
        turns = turns or max(DEFAULT_TURNS, min_turns(comparisons))
        if judge:
            _check_turns(turns, comparisons)
        plan = _Plan(
            tuple(batches), turns, images, *sampling, seed, count, opened["prompts"], comparisons
        )
        with tempfile.TemporaryDirectory(prefix="trtq-bench-") as scratch:
            for batch in plan.batches:
                _measure_parts(rows, batch, plan, progress)
                _measure_images(rows, batch, plan, Path(scratch), progress)
        _finish(rows, plan)
        _check_any_left(rows)
        peaks = _peaks(stack, rows, count)
    result = _result(rows, plan, peaks, device, notes, **model)
    if former is None:
        return result
    return replace(result, against=compare(former, result.to_json(), str(against)))


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


def _start(target: Target, stack: ExitStack) -> _Row:
    if target.kind == "engine":
        reason = obstacle(target.provider)
        if reason is not None:
            return _Row(target, error=MeasurementError(reason))
    return _Row(target, stack.enter_context(Worker(_WORKER, target.label)))


def _live(rows: list[_Row]) -> list[_Row]:
    return [row for row in rows if row.worker is not None]


def _open(rows: list[_Row], threads: int, size: str | None, progress: ProgressCallback) -> None:
    for index, row in enumerate(rows):
        progress("load", index, len(rows))
        target = row.target
        resized = size if target.manifest is None else None
        found = row.ask(
            "open", path=target.path, provider=target.provider, threads=threads, size=resized
        )
        row.opened = found or {}
    progress("load", len(rows), len(rows))


def _check_any_left(rows: list[_Row]) -> None:
    """Raises UsageError or MeasurementError where every row has failed."""
    errors = {row.target.label: row.error for row in rows if row.error is not None}
    if len(errors) < len(rows):
        return
    wrong_use = all(isinstance(err, UsageError) for err in errors.values())
    reasons = "; ".join(f"{row.target.label}: {row.reason}" for row in rows)
    kind = UsageError if wrong_use else MeasurementError
    raise kind(f"no row could be measured: {reasons}")


def _check_same_model(rows: list[_Row]) -> None:
    """Raises UsageError where rows cannot stand side by side."""
    known = [(row.target.label, row.opened) for row in rows if row.opened]
    for label, opened in known[1:]:
        first_label, first = known[0]
        for key in ("model_class", "shape"):
            if opened[key] != first[key]:
                raise UsageError(
                    f"{first_label} and {label} are different models ({key} {first[key]} and "
                    f"{opened[key]}); bench one model at a time"
                )


def _rivals(row: _Row, rows: list[_Row]) -> list[_Row]:
    """The other rows that are a baseline of a row: float, and on the same device."""
    return [
        other
        for other in rows
        if other is not row and not other.target.low_bit and other.device == row.device
    ]


def _comparisons(rows: list[_Row], batches: int) -> int:
    """Pairs of a low-bit and a float row that chance could tell apart, in steps and in whole images.

    The fastest of several float rows is the baseline, so each of them counts.
    """
    live = _live(rows)
    pairs = sum(len(_rivals(row, live)) for row in live if row.target.low_bit)
    return max(len(_SPEEDUPS) * batches * pairs, 1)


def _check_turns(turns: int, comparisons: int) -> None:
    """Raises UsageError where no verdict can come of it."""
    if turns < (least := min_turns(comparisons)):
        raise UsageError(
            f"{turns} turns are too few to tell slower from chance in {comparisons} comparisons of "
            f"rows, batch sizes, steps and images; measure at least {least} turns, or fewer rows"
        )


def _sampling(rows: list[_Row], steps: int | None, guidance: float | None) -> tuple[int, float]:
    """Steps and guidance for all rows: as asked for, else as the first artefact was calibrated."""
    recipes = [row.target.manifest.recipe for row in rows if row.target.manifest is not None]
    recipe = next((recipe for recipe in recipes if recipe is not None), None)
    count = steps or (recipe and recipe.steps) or DEFAULT_STEPS
    if guidance is None and recipe is not None:
        guidance = recipe.guidance
    if guidance is None:
        guidance = next((row.opened["guidance"] for row in rows if row.opened), 1.0)
    return count, float(guidance)


def _measure_parts(rows: list[_Row], batch: int, plan: _Plan, progress: ProgressCallback) -> None:
    """Timings of every part at one batch size, in turns."""
    sampling = {"steps": plan.steps, "guidance": plan.guidance}
    for row in _live(rows):
        row.batches[batch] = {"batch": batch, "parts": {}}
    for part in next((row.opened["parts"] for row in _live(rows)), []):
        for row in _live(rows):
            found = row.ask("prepare", part=part, batch=batch, **sampling)
            if found is not None and part == DENOISER:
                row.batches[batch]["first_call_seconds"] = found["first_call_seconds"]
        turns: dict[str, list[list[float]]] = {row.target.label: [] for row in rows}
        for turn in range(plan.turns):
            progress(f"time {part}, batch {batch}", turn + 1, plan.turns)
            for row in rotated(_live(rows), turn):
                found = row.ask("time")
                if found is not None:
                    turns[row.target.label].append(found["seconds"])
        for row in _live(rows):
            row.batches[batch]["parts"][part] = summarize(turns[row.target.label])


def _measure_images(
    rows: list[_Row], batch: int, plan: _Plan, scratch: Path, progress: ProgressCallback
) -> None:
    """Whole images at one batch size, in turns; those of the first size are kept."""
    count = plan.draws(batch)
    ask = {
        "batch": batch,
        "steps": plan.steps,
        "seed": plan.seed,
        "guidance": plan.guidance,
        "prompts": plan.prompts,
    }
    for row in _live(rows):
        row.ask("draw", turn=None, out=None, **ask)
    seconds: dict[str, list[list[float]]] = {row.target.label: [] for row in rows}
    joules: dict[str, list[float]] = {row.target.label: [] for row in rows}
    for turn in range(count):
        progress(f"draw, batch {batch}", turn + 1, count)
        for row in rotated(_live(rows), turn):
            out = scratch / "images.npy" if batch == plan.batches[0] else None
            found = row.ask("draw", turn=turn, out=None if out is None else str(out), **ask)
            if found is None:
                continue
            seconds[row.target.label].append([found["seconds"]])
            if found["joules"] is not None:
                joules[row.target.label].append(found["joules"])
            if out is not None:
                row.images.append(np.load(out))
    for row in _live(rows):
        spent, used = seconds[row.target.label], joules[row.target.label]
        whole = summarize(spent)
        interval = median_interval(whole["turns"])
        row.batches[batch] |= {
            "batch_of_images": whole,
            "images_per_second": 1e3 * batch / whole["p50"],
            "images_per_second_interval": interval
            and [1e3 * batch / milliseconds for milliseconds in reversed(interval)],
            "joules_per_image": sum(used) / len(used) / batch if used else None,
        }


def _finish(rows: list[_Row], plan: _Plan) -> None:
    """Memory, then the operations, whose counting takes memory itself."""
    for row in _live(rows):
        found = row.opened["memory"] | (row.ask("memory") or {})
        peaks = (found["load_peak_bytes"], found.get("run_peak_bytes", 0))
        row.memory = found | {"peak_bytes": max(peaks)}
    counter = next(iter(_live(rows)), None)
    for batch in plan.batches:
        found = counter and _extra(
            counter.worker, "operations", batch=batch, steps=plan.steps, guidance=plan.guidance
        )
        for row in rows:
            row.operations[batch] = found["operations"] if found else None


def _extra(worker: Worker | None, question: str, **arguments: Any) -> dict[str, Any] | None:
    """An answer that no timing depends on; None where the worker has none."""
    try:
        return None if worker is None else worker.ask(question, **arguments)
    except TrtqError as err:
        logger.warning("%s: no %s: %s", worker.name if worker else "", question, err)
        return None


def _peaks(stack: ExitStack, rows: list[_Row], threads: int) -> dict[str, Peak | None]:
    """What the devices of the rows can do; the processor is asked when the rows are gone."""
    for row in _live(rows):
        assert row.worker is not None
        row.worker.close()
    gpu = Nvml().name
    peaks: dict[str, Peak | None] = {
        "gpu float": gpu_peak(gpu, integers=False) if gpu else None,
        "gpu low-bit": gpu_peak(gpu, integers=True) if gpu else None,
    }
    worker = stack.enter_context(Worker(_WORKER, "the processor's peak"))
    found = _extra(worker, "cpu_peak", threads=threads)
    peaks["cpu"] = None if found is None else Peak(**found)
    return peaks


def _result(
    rows: list[_Row],
    plan: _Plan,
    peaks: dict[str, Peak | None],
    device: dict[str, Any],
    notes: list[str],
    *,
    model_class: str,
    shape: list[int],
) -> BenchResult:
    for batch in plan.batches:
        _add_speedups(rows, batch, plan.comparisons)
    shown = [_row_result(row, rows, plan, peaks) for row in rows]
    judged = [row for row in shown if row.low_bit and row.measured]
    unjudged = [row.label for row in judged if row.speedup is None]
    floats = [row for row in shown if not row.low_bit]
    notes += [_why_unjudged(label, floats) for label in unjudged if floats]
    return BenchResult(
        model_class=model_class,
        shape=shape,
        format_version=FORMAT_VERSION,
        device=device,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        steps=plan.steps,
        guidance=plan.guidance,
        turns=plan.turns,
        comparisons=plan.comparisons,
        threads=plan.threads,
        seed=plan.seed,
        packages=package_versions(),
        rows=shown,
        slower=_with_verdict(judged, "slower"),
        undecided=_with_verdict(judged, "too few turns"),
        unjudged=unjudged,
        notes=notes,
    )


def _why_unjudged(label: str, floats: list[MeasuredRow]) -> str:
    if not any(row.measured for row in floats):
        return f"{label} is compared with nothing: no float row could be measured"
    return (
        f"{label} runs on another device than every float row that was measured; give the float model "
        "there, too, as an ONNX folder or an engine: trtq export MODEL -o FLOAT --precision fp16"
    )


def _with_verdict(judged: list[MeasuredRow], verdict: str) -> list[str]:
    """Labels of rows with that verdict at some batch size, in steps or in whole images."""
    return [
        row.label
        for row in judged
        if any(
            one[key] and one[key]["verdict"] == verdict for one in row.batches for key in _SPEEDUPS
        )
    ]


def _measured(rows: list[_Row], batch: int) -> Iterator[_Row]:
    for row in rows:
        if row.error is None and DENOISER in row.batches.get(batch, {}).get("parts", {}):
            yield row


def _add_speedups(rows: list[_Row], batch: int, comparisons: int) -> None:
    """Each row's speed against the fastest float row of its device, from turns taken together."""
    measured = list(_measured(rows, batch))
    for row in measured:
        rivals = _rivals(row, measured)
        for key, timing in _SPEEDUPS.items():
            mine = timing(row.batches[batch])
            fastest = min(rivals, key=lambda one: timing(one.batches[batch])["p50"], default=None)
            # The fastest float row has no baseline: it is one.
            found = None
            if fastest is not None and not _leads(row, mine, timing(fastest.batches[batch])):
                theirs = timing(fastest.batches[batch])["turns"]
                found = {"baseline": fastest.target.label}
                found |= speedup(theirs, mine["turns"], comparisons)
            row.batches[batch][key] = found


def _leads(row: _Row, mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return not row.target.low_bit and mine["p50"] <= theirs["p50"]


def _row_result(
    row: _Row, rows: list[_Row], plan: _Plan, peaks: dict[str, Peak | None]
) -> MeasuredRow:
    target = row.target
    measured = row.error is None
    first = row.batches[plan.batches[0]] if measured else {}
    return MeasuredRow(
        path=target.path,
        provider=target.provider,
        kind=target.kind,
        bits=target.bits,
        low_bit=target.low_bit,
        added=target.added,
        device=row.device,
        measured=measured,
        reason=row.reason,
        latency_ms=first["parts"][DENOISER] if first else None,
        images_per_second=first["images_per_second"] if first else None,
        images_per_second_interval=first["images_per_second_interval"] if first else None,
        speedup=first["speedup"] if first else None,
        images_speedup=first["images_speedup"] if first else None,
        psnr_db=_psnr(row, rows) if measured else None,
        load_seconds=row.opened.get("load_seconds"),
        build_seconds=target.build_seconds,
        denoiser_bytes=target.denoiser_bytes,
        memory=row.memory or None,
        batches=[row.batches[batch] for batch in plan.batches] if measured else [],
        roofline=_roofline(row, plan.batches[0], peaks) if measured else None,
    )


def _psnr(row: _Row, rows: list[_Row]) -> float | None:
    """Of a low-bit row's images to those of the first float row, in dB."""
    floats = [one for one in rows if not one.target.low_bit and one.images and one.error is None]
    if not row.target.low_bit or not floats:
        return None
    ours, theirs = (torch.from_numpy(np.concatenate(one.images)) for one in (row, floats[0]))
    return psnr_db(ours, theirs)


def _roofline(row: _Row, batch: int, peaks: dict[str, Peak | None]) -> dict[str, Any] | None:
    key = "cpu"
    if row.device == "gpu":
        key = "gpu low-bit" if row.target.low_bit else "gpu float"
    peak, operations = peaks[key], row.operations[batch]
    weights = row.opened["weight_bytes"] or row.target.denoiser_bytes
    if peak is None or not operations or not weights:
        return None
    seconds = row.batches[batch]["parts"][DENOISER]["p50"] / 1e3
    return roofline(operations, weights, seconds, peak)
