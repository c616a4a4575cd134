"""How good is it? Images and noise predictions against the float model."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trtq.diffusion.source import Source, load_source
from trtq.errors import UsageError
from trtq.evaluate.images import draw, labels_for
from trtq.evaluate.metrics import ImageScores, noise_prediction_snr, score_images
from trtq.progress import Reporter, silent
from trtq.stages.load import calibrated_steps, open_any

__all__ = ["Evaluation", "Gate", "ReferenceSet", "draw_reference", "evaluate", "parse_gate"]

CLASSIFIER = "classifier"
DEFAULT_STEPS = 20
_GATE = re.compile(r"\s*([a-z_]+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")
_METRICS = ("fd", "class_accuracy", "snr_db_min", "fd_ratio")


@dataclass(frozen=True)
class Gate:
    """A condition such as `fd<=1.5`.

    Attributes:
        metric: one of `fd`, `fd_ratio`, `class_accuracy`, `snr_db_min`.
        operator: `<=`, `>=`, `<` or `>`.
        bound: the number.
    """

    metric: str
    operator: str
    bound: float

    def holds(self, value: float) -> bool:
        """Whether the metric's value satisfies the condition; NaN never does."""
        return {
            "<=": value <= self.bound,
            ">=": value >= self.bound,
            "<": value < self.bound,
            ">": value > self.bound,
        }[self.operator]

    def __str__(self) -> str:
        """As it was written."""
        return f"{self.metric}{self.operator}{self.bound:g}"


def parse_gate(text: str) -> Gate:
    """`fd<=1.5` -> a `Gate`.

    Raises:
        UsageError: not of that form, or an unknown metric.
    """
    match = _GATE.fullmatch(text)
    try:
        bound = float(match[3]) if match else float("nan")
    except ValueError:
        bound = float("nan")
    if match is None or bound != bound:
        raise UsageError(f"gate {text!r} is not understood; write METRIC<=NUMBER, e.g. fd<=1.5")
    if match[1] not in _METRICS:
        raise UsageError(
            f"unknown metric {match[1]!r} in a gate; choose one of {', '.join(_METRICS)}"
        )
    return Gate(match[1], match[2], bound)


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """The float model's images; drawn once, they serve several evaluations.

    Attributes:
        source: the float model.
        images: float32[B,C,H,W] in [-1, 1].
        labels: LongTensor[B].
        scores: what the classifier thinks of them.
        seconds: time to draw them.
    """

    source: Source
    images: Tensor
    labels: Tensor
    scores: ImageScores
    seconds: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Numbers and images of one evaluation.

    Attributes:
        result: `fd`, `fd_reference`, `fd_ratio`, `class_accuracy`, `class_accuracy_reference`,
            `snr_db` (per step, cleanest first), `snr_db_min`, `images`, `steps`, `seed`, `provider`,
            `seconds`, `gates`, `passed`.
        images: float32[B,C,H,W] of the evaluated model.
        reference: the float model's images.
    """

    result: dict[str, Any]
    images: Tensor
    reference: ReferenceSet


def draw_reference(
    reference: str | Path | Any,
    *,
    images: int,
    steps: int,
    seed: int,
    guidance: float = 1.0,
    report: Reporter = silent,
) -> ReferenceSet:
    """Draw and score the float model's images.

    Raises:
        UsageError: the model has no classes or ships no classifier.
    """
    source = load_source(reference)
    labels = labels_for(source, images)
    if labels is None or source.folder is None:
        raise UsageError(
            f"{reference} cannot be a reference yet: needed is the folder of a class-conditional "
            "model with a classifier"
        )
    if images < 2:
        raise UsageError(f"--images must be at least 2, got {images}")
    start = time.monotonic()
    drawn = draw(
        source,
        images,
        steps=steps,
        seed=seed,
        guidance=guidance,
        progress=lambda done, total: report("draw with the float model", done, total),
    )
    seconds = time.monotonic() - start
    scores = score_images(drawn, labels, source.folder / CLASSIFIER)
    return ReferenceSet(source, drawn, labels, scores, seconds)


def evaluate(
    path: str | Path | Any,
    reference: str | Path | Any | ReferenceSet,
    *,
    images: int = 1000,
    steps: int | None = None,
    seed: int = 1,
    guidance: float = 1.0,
    provider: str | None = None,
    gates: tuple[Gate, ...] = (),
    report: Reporter = silent,
) -> Evaluation:
    """Compare an artefact with the float model: same noise, same labels, same steps.

    Args:
        path: what to judge: a run, an ONNX folder or a checkpoint.
        reference: the float model, or its images from `draw_reference` (then `images`, `steps`,
            `seed` and `guidance` must be those it was drawn with).
        images: images to draw with each.
        steps: denoising steps; by default what the artefact was calibrated for.
        seed: of the starting noise.
        guidance: classifier-free guidance.
        provider: what runs the artefact.
        gates: conditions; see `passed` in the result.
        report: called as work goes on.

    Raises:
        TrtqError: see `trtq.errors`.
    """
    count = steps or calibrated_steps(path) or DEFAULT_STEPS
    target = open_any(path, provider)
    if not isinstance(reference, ReferenceSet):
        reference = draw_reference(
            reference, images=images, steps=count, seed=seed, guidance=guidance, report=report
        )
    start = time.monotonic()
    drawn = draw(
        target,
        len(reference.images),
        steps=count,
        seed=seed,
        labels=reference.labels,
        guidance=guidance,
        progress=lambda done, total: report("draw", done, total),
    )
    seconds = time.monotonic() - start
    assert reference.source.folder is not None
    scores = score_images(drawn, reference.labels, reference.source.folder / CLASSIFIER)
    snr = noise_prediction_snr(
        target,
        reference.source,
        steps=count,
        seed=seed,
        guidance=guidance,
        progress=lambda done, total: report("compare predictions", done, total),
    )
    result: dict[str, Any] = {
        "fd": scores.fd,
        "fd_reference": reference.scores.fd,
        "fd_ratio": scores.fd / reference.scores.fd,
        "class_accuracy": scores.class_accuracy,
        "class_accuracy_reference": reference.scores.class_accuracy,
        "snr_db": snr,
        "snr_db_min": min(snr),
        "images": len(drawn),
        "steps": count,
        "seed": seed,
        "provider": provider or ("cpu" if hasattr(target.denoiser, "engine") else "torch"),
        "seconds": round(seconds, 2),
        "seconds_reference": round(reference.seconds, 2),
    }
    outcomes = {str(gate): gate.holds(float(result[gate.metric])) for gate in gates}
    result |= {"gates": outcomes, "passed": all(outcomes.values())}
    return Evaluation(result, drawn, reference)
