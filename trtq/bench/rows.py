"""Rows during a benchmark: one worker process each, the plan for all of them, and checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from trtq.artefact.opened import DEFAULT_STEPS, Checkpoint
from trtq.bench.artefacts import BenchRow
from trtq.bench.measured import DENOISER
from trtq.bench.process import Worker
from trtq.bench.summary import min_turns
from trtq.errors import MeasurementError, TrtqError, UsageError
from trtq.progress import ProgressCallback

__all__ = [
    "TIMINGS",
    "ActiveRow",
    "Amounts",
    "Plan",
    "check_any_left",
    "check_turns",
    "float_rivals",
    "live_rows",
    "make_plan",
    "open_rows",
]

DEFAULT_TURNS = 10
_MIN_BATCHES = 3
TIMINGS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "speedup": lambda entry: entry["parts"][DENOISER],
    "images_speedup": lambda entry: entry["batch_of_images"],
}
"""Functions that find the compared timing of a batch size, by JSON key of the speedup."""


@dataclass
class ActiveRow:
    """A row while it is being measured.

    Attributes:
        spec: artefact and provider.
        worker: worker process; None if it could not start, or has failed.
        error: reason why the row is not measured, or None.
        opened: the worker's answer to `open`.
        batches: measurements by batch size.
        memory: memory in bytes, by purpose.
        images: images of the first batch size, one array float32[B,C,H,W] per batch.
        operations: number of operations of one denoiser call, by batch size; None if unknown.
    """

    spec: BenchRow
    worker: Worker | None = None
    error: TrtqError | None = None
    opened: dict[str, Any] = field(default_factory=dict)
    batches: dict[int, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    images: list[np.ndarray] = field(default_factory=list)
    operations: dict[int, int | None] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """`PATH@PROVIDER`."""
        return self.spec.label

    @property
    def device(self) -> str | None:
        """Device of the loaded denoiser, `gpu` or `cpu`; None if loading failed."""
        return self.opened.get("device")

    @property
    def reason(self) -> str | None:
        """The reason why the row is not measured, without its label; None if there is no error."""
        return None if self.error is None else str(self.error).removeprefix(f"{self.label}: ")

    def ask(self, question: str, **arguments: Any) -> dict[str, Any] | None:
        """Send a request to the worker; a failure ends it and becomes the row's error.

        Args:
            question: name of the request.
            arguments: JSON values, the keyword arguments of the request.

        Returns:
            The answer; None after a failure.
        """
        if self.worker is None:
            return None
        try:
            return self.worker.ask(question, **arguments)
        except TrtqError as err:  # The measurements of the other rows must not be lost.
            self.error = err
            self.worker.close()
            self.worker = None
            return None


class ModelAndSampling(TypedDict):
    """Arguments of `trtq.bench.history.check_same_run`."""

    model_class: str
    shape: list[int]
    steps: int
    guidance: float


@dataclass(frozen=True)
class Amounts:
    """The values that the caller of a benchmark sets; None means the default. See `Plan`."""

    batches: tuple[int, ...]
    turns: int | None
    images: int
    steps: int | None
    guidance: float | None
    seed: int
    threads: int


@dataclass(frozen=True)
class Plan:
    """The measurements of every row.

    Attributes:
        model_class: class of the denoiser.
        shape: shape of one denoiser sample, [C, H, W]; empty for pipelines used through their own call.
        prompts: prompts of the images; None for a model without prompts.
        batches: batch sizes.
        turns: number of timing rounds per part.
        images: minimum number of images per row and batch size.
        steps: number of denoising steps.
        guidance: classifier-free guidance scale; 1 disables it.
        seed: seed of the images.
        threads: number of threads per operator.
        comparisons: number of low-bit/float comparisons to correct for.
    """

    model_class: str
    shape: list[int]
    prompts: list[str] | None
    batches: tuple[int, ...]
    turns: int
    images: int
    steps: int
    guidance: float
    seed: int
    threads: int
    comparisons: int

    @property
    def model_and_sampling(self) -> ModelAndSampling:
        """The values that two comparable runs share."""
        return {
            "model_class": self.model_class,
            "shape": self.shape,
            "steps": self.steps,
            "guidance": self.guidance,
        }

    def image_batches(self, batch: int) -> int:
        """Number of image batches: enough for `images`, and for a verdict if `turns` allows it."""
        wanted = math.ceil(self.images / batch)
        return max(_MIN_BATCHES, wanted, min(self.turns, min_turns(self.comparisons)))


def make_plan(rows: list[ActiveRow], amounts: Amounts) -> Plan:
    """Fill in the defaults, which depend on the opened rows; see `trtq.bench.run.benchmark`.

    Args:
        rows: opened rows.
        amounts: values that the caller sets.
    """
    opened = next(row.opened for row in rows if row.opened)
    steps, guidance = _sampling(rows, amounts.steps, amounts.guidance)
    comparisons = _count_comparisons(rows, len(amounts.batches))
    return Plan(
        model_class=opened["model_class"],
        shape=opened["shape"],
        prompts=opened["prompts"],
        batches=amounts.batches,
        turns=amounts.turns or max(DEFAULT_TURNS, min_turns(comparisons)),
        images=amounts.images,
        steps=steps,
        guidance=guidance,
        seed=amounts.seed,
        threads=amounts.threads,
        comparisons=comparisons,
    )


def _sampling(
    rows: list[ActiveRow], steps: int | None, guidance: float | None
) -> tuple[int, float]:
    """Steps and guidance: the caller's values, else those of the first artefact's calibration."""
    calibrated = next((row.spec.opened for row in rows if row.spec.low_bit), None)
    called = next((row.opened["steps"] for row in rows if row.opened.get("steps")), None)
    count = steps or called or (calibrated and calibrated.steps) or DEFAULT_STEPS
    if guidance is None and calibrated is not None:
        guidance = calibrated.guidance
    if guidance is None:
        guidance = next((row.opened["guidance"] for row in rows if row.opened), 1.0)
    return count, float(guidance)


def live_rows(rows: list[ActiveRow]) -> list[ActiveRow]:
    """The rows whose worker is running."""
    return [row for row in rows if row.worker is not None]


def open_rows(rows: list[ActiveRow], threads: int, progress: ProgressCallback) -> None:
    """Load the artefact of every row; checkpoints get the image size of the first artefact.

    Args:
        rows: rows to open; rows without a worker are skipped.
        threads: number of threads per operator.
        progress: callback with the stage's name, the completed work and the total.

    Raises:
        UsageError: the rows hold different models, or no row can run with these arguments.
        MeasurementError: no row could be opened.
    """
    size = next((row.spec.size for row in rows if row.spec.size is not None), None)
    for index, row in enumerate(rows):
        progress("load", index, len(rows))
        spec = row.spec
        resized = size if isinstance(spec.opened, Checkpoint) else None
        answer = row.ask(
            "open",
            path=spec.path,
            provider=spec.provider,
            threads=threads,
            size=resized,
            call_of=spec.call_of,
        )
        row.opened = answer or {}
    progress("load", len(rows), len(rows))
    check_any_left(rows)
    _check_same_model(rows)


def check_any_left(rows: list[ActiveRow]) -> None:
    """Raise UsageError or MeasurementError if every row has failed."""
    errors = [row.error for row in rows if row.error is not None]
    if len(errors) < len(rows):
        return
    reasons = "; ".join(f"{row.label}: {row.reason}" for row in rows)
    kind = UsageError if all(isinstance(err, UsageError) for err in errors) else MeasurementError
    raise kind(f"no row could be measured: {reasons}")


def _check_same_model(rows: list[ActiveRow]) -> None:
    """Raise UsageError unless all opened rows hold the same model at the same size."""
    opened_rows = [row for row in rows if row.opened]
    first = opened_rows[0]
    for row in opened_rows[1:]:
        for key in ("model_class", "shape"):
            if row.opened[key] != first.opened[key]:
                raise UsageError(
                    f"{first.label} and {row.label} are different models ({key} {first.opened[key]} "
                    f"and {row.opened[key]}); bench one model at a time"
                )


def float_rivals(row: ActiveRow, rows: list[ActiveRow]) -> list[ActiveRow]:
    """The other float rows on the same device, which can serve as the baseline of a row."""
    return [
        other
        for other in rows
        if other is not row and not other.spec.low_bit and other.device == row.device
    ]


def _count_comparisons(rows: list[ActiveRow], batches: int) -> int:
    """Number of low-bit/float comparisons to correct for.

    The baseline is the fastest of the float rows on a device, so each of them counts.
    """
    live = live_rows(rows)
    pairs = sum(len(float_rivals(row, live)) for row in live if row.spec.low_bit)
    return max(len(TIMINGS) * batches * pairs, 1)


def check_turns(plan: Plan) -> None:
    """Raise UsageError if the plan has too few timing rounds for a verdict."""
    needed = min_turns(plan.comparisons)
    if plan.turns < needed:
        raise UsageError(
            f"{plan.turns} rounds are too few for a verdict on {plan.comparisons} comparisons of rows, "
            f"batch sizes, steps and images; use --turns {needed} or more, or fewer rows"
        )
