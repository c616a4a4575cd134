"""How good is it? Images and noise predictions against the float model."""

from __future__ import annotations

import operator
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trtq.artefact.opened import DEFAULT_STEPS, Opened, open_artefact
from trtq.diffusion.pipeline import LoadedPipeline, load_source
from trtq.documents import shown
from trtq.errors import UsageError
from trtq.evaluation.extractor import Extractor, load_extractor
from trtq.evaluation.frechet import bootstrap_interval, feature_statistics, frechet_distance
from trtq.evaluation.metrics import (
    ImageScores,
    layer_snr,
    noise_prediction_snr,
    pixel_scores,
    precision_recall,
    score_images,
    spatial_distance,
)
from trtq.pipelines.draw import Conditioning, conditioning_for, draw
from trtq.pipelines.open import open_any
from trtq.progress import ProgressCallback, silent
from trtq.results import Result

__all__ = [
    "METRICS",
    "Evaluation",
    "Gate",
    "ReferenceSet",
    "draw_reference",
    "evaluate",
    "parse_gate",
]

METRICS = {
    "fd": "Fréchet distance to real images (to the float model's, where there are none)",
    "fd_ratio": "the same over the float model's own",
    "sfd": "Fréchet distance of spatial features to the float model's images",
    "class_accuracy": "share of images recognised as the class asked for",
    "faithfulness": "share of images that show everything the prompt says",
    "inception_score": "exp of the mean divergence of single answers from all",
    "precision": "share of images within the float model's manifold",
    "recall": "share of the float model's images within these images' manifold",
    "psnr_db": "against the float model's images from the same noise",
    "ssim": "against the float model's images from the same noise",
    "snr_db_min": "least signal-to-noise ratio of the noise prediction over the steps",
}
_GATE = re.compile(r"\s*([a-z_]+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")
_OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True)
class Gate:
    """A condition such as `fd<=1.5`.

    Attributes:
        metric: one of `METRICS`.
        operator: `<=`, `>=`, `<` or `>`.
        bound: the number.
    """

    metric: str
    operator: str
    bound: float

    def holds(self, value: float) -> bool:
        """Whether the metric's value satisfies the condition; NaN never does."""
        return bool(_OPERATORS[self.operator](value, self.bound))

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
        raise UsageError(
            f"gate {shown(text)} is not understood; write METRIC<=NUMBER, e.g. fd<=1.5"
        )
    if match[1] not in METRICS:
        raise UsageError(
            f"unknown metric {shown(match[1])} in a gate; choose one of {', '.join(METRICS)}"
        )
    return Gate(match[1], match[2], bound)


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """The float model's images; drawn once, they serve several evaluations.

    Attributes:
        source: the float model.
        conditioning: what was drawn.
        images: float32[B,C,H,W] in [-1, 1].
        extractor: computes features of images; None if there is no classifier and no `--features`.
        scores: the extractor's numbers for these images; None without an extractor.
        steps: denoising steps.
        seed: of the starting noise.
        guidance: classifier-free guidance.
        seconds: time to draw them.
    """

    source: LoadedPipeline
    conditioning: Conditioning
    images: Tensor
    extractor: Extractor | None
    scores: ImageScores | None
    steps: int
    seed: int
    guidance: float
    seconds: float

    @property
    def accuracy_name(self) -> str:
        """What the share of right answers is called for this kind of model."""
        return "class_accuracy" if self.source.prompts is None else "faithfulness"


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation(Result):
    """Numbers and images of one evaluation.

    Attributes:
        scores: the available metrics of `METRICS` by name; metrics of the float model under
            `fd_reference`, `class_accuracy_reference` or `faithfulness_reference` and
            `inception_score_reference`; 95 % intervals under `fd_interval`, `fd_interval_reference`,
            `accuracy_interval`, `accuracy_interval_reference`, `psnr_db_interval` and `ssim_interval`.
        not_computed: metrics that need a feature extractor; None if there is one.
        snr_db: SNR of the noise prediction per step, in dB, cleanest first.
        images: generated images, float32[B,C,H,W] in [-1, 1]; in JSON their number.
        seconds: duration of generating the images, in seconds.
        provider: what ran the artefact.
        layers_worst: SNR of the ten worst layers by name, in dB; None unless the artefact is a run.
        gates: whether each gate is met.
        reference: the float model's images, seed, steps and guidance.
    """

    scores: dict[str, Any]
    not_computed: list[str] | None
    snr_db: list[float]
    images: Tensor
    seconds: float
    provider: str
    layers_worst: dict[str, float] | None
    gates: dict[str, bool]
    reference: ReferenceSet

    @property
    def passed(self) -> bool:
        """Whether every gate is met."""
        return all(self.gates.values())

    @property
    def result(self) -> dict[str, Any]:
        """Deprecated, remains for one release: the same as `to_json()`."""
        return self.to_json()

    def _by_key(self) -> dict[str, Any]:
        reference = self.reference
        values = dict(self.scores)
        if self.not_computed is not None:
            values["not_computed"] = self.not_computed
        values |= {
            "snr_db": self.snr_db,
            "snr_db_min": min(self.snr_db),
            "images": len(self.images),
            "steps": reference.steps,
            "seed": reference.seed,
            "guidance": reference.guidance,
            "features": None if reference.extractor is None else reference.extractor.name,
            "provider": self.provider,
            "seconds": round(self.seconds, 2),
            "seconds_reference": round(reference.seconds, 2),
        }
        if self.layers_worst is not None:
            values["layers_worst"] = self.layers_worst
        return values | {"gates": self.gates, "passed": self.passed}


def draw_reference(
    reference: str | Path | Opened | Any,
    *,
    images: int,
    steps: int,
    seed: int,
    guidance: float | None = None,
    features: Path | None = None,
    judged: LoadedPipeline | None = None,
    progress: ProgressCallback = silent,
) -> ReferenceSet:
    """Draw and score the float model's images.

    Args:
        reference: the float model.
        images: how many.
        steps: denoising steps.
        seed: of the starting noise.
        guidance: classifier-free guidance; by default what the model is meant for.
        features: folder of a CLIP vision model or classifier to judge by; by default the model's own
            classifier. With neither, only SNR, PSNR and SSIM are computed.
        judged: what is compared with it; a reference of another kind of model is refused undrawn.
        progress: called with the stage's name, the work done and the total.

    Raises:
        UsageError: the reference is not a float checkpoint, or not one of `judged`, or `images` is below
            2.
    """
    opened = open_artefact(reference, verify=False)
    if opened.kind != "checkpoint":
        raise UsageError(
            f"the reference {opened.place} is of kind {opened.kind!r}; give the float checkpoint of it"
        )
    source = load_source(opened.place)
    if images < 2:
        raise UsageError(f"--images must be at least 2, got {images}")
    if judged is not None:
        _match(source, judged)
    extractor = load_extractor(source.folder, features)
    conditioning = conditioning_for(source, images)
    start = time.monotonic()
    drawn = draw(
        source,
        conditioning,
        steps=steps,
        seed=seed,
        guidance=guidance,
        progress=lambda done, total: progress("draw with the float model", done, total),
    )
    seconds = time.monotonic() - start
    scores = None if extractor is None else score_images(drawn, conditioning.labels, extractor)
    strength = source.guidance if guidance is None else guidance
    return ReferenceSet(
        source, conditioning, drawn, extractor, scores, steps, seed, strength, seconds
    )


def evaluate(
    artefact: str | Path | Opened | Any,
    reference: str | Path | Opened | Any | ReferenceSet,
    *,
    images: int = 1000,
    steps: int | None = None,
    seed: int = 1,
    guidance: float | None = None,
    provider: str | None = None,
    features: Path | None = None,
    gates: tuple[Gate, ...] = (),
    progress: ProgressCallback = silent,
) -> Evaluation:
    """Compare an artefact with the float model: same noise, same subjects, same steps.

    Args:
        artefact: a run, an ONNX or engine folder, a checkpoint, a pipeline object, or one of them
            opened.
        reference: the float model, or its images from `draw_reference`; then `images`, `steps`,
            `seed`, `guidance` and `features` are those that it was drawn with.
        images: images to draw with each.
        steps: denoising steps; by default what the artefact was calibrated for.
        seed: of the starting noise.
        guidance: classifier-free guidance; by default what the artefact was calibrated for.
        provider: what runs the artefact.
        features: see `draw_reference`.
        gates: conditions; see `passed` in the result.
        progress: called with the stage's name, the work done and the total.

    Raises:
        UsageError: a gate on a number that this model has not.
        TrtqError: see `trtq.errors`.
    """
    opened = open_artefact(artefact, verify=False)
    target = open_any(opened, provider)
    if not isinstance(reference, ReferenceSet):
        reference = draw_reference(
            reference,
            images=images,
            steps=steps or opened.steps or DEFAULT_STEPS,
            seed=seed,
            guidance=opened.guidance if guidance is None else guidance,
            features=features,
            judged=target,
            progress=progress,
        )
    _check_gates(gates, reference)
    start = time.monotonic()
    drawn = draw(
        target,
        reference.conditioning,
        steps=reference.steps,
        seed=reference.seed,
        guidance=reference.guidance,
        progress=lambda done, total: progress("draw", done, total),
    )
    seconds = time.monotonic() - start
    snr = noise_prediction_snr(
        target,
        reference.source,
        steps=reference.steps,
        seed=reference.seed,
        guidance=reference.guidance,
        progress=lambda done, total: progress("compare predictions", done, total),
    )
    worst = None
    if hasattr(target.denoiser, "table"):
        by_layer = layer_snr(target, reference.source, steps=reference.steps, seed=reference.seed)
        worst = dict(list(by_layer.items())[:10])
    scores, not_computed = _compare(drawn, reference)
    known = scores | {"snr_db_min": min(snr)}
    return Evaluation(
        scores=scores,
        not_computed=not_computed,
        snr_db=snr,
        images=drawn,
        seconds=seconds,
        provider=provider or ("cpu" if hasattr(target.denoiser, "engine") else "torch"),
        layers_worst=worst,
        gates={str(gate): gate.holds(float(known[gate.metric])) for gate in gates},
        reference=reference,
    )


def _match(reference: LoadedPipeline, judged: LoadedPipeline) -> None:
    """Let the reference draw images of the judged model's size, if they are models of one kind.

    Raises:
        UsageError: they are not: images of different things cannot be compared.
    """
    if judged.resized and reference.image_size != judged.image_size:
        height, width = judged.image_size
        reference.resize(f"{height}x{width}")
    for what, own, other in (
        ("classes", judged.classes, reference.classes),
        ("prompts", judged.prompts is not None, reference.prompts is not None),
        ("HEIGHT, WIDTH in pixels", judged.image_size, reference.image_size),
        ("sample of shape", judged.sample_shape, reference.sample_shape),
    ):
        if own != other:
            raise UsageError(
                f"the reference {reference.name} is another model than {judged.name}: {what} {other}, "
                f"not {own}; give the float checkpoint that it was made from"
            )


_WITHOUT_FEATURES = ("psnr_db", "ssim", "snr_db_min")
"""Metrics that compare pixels and predictions with the float model's, and need no extractor."""


def _check_gates(gates: tuple[Gate, ...], reference: ReferenceSet) -> None:
    """Refuse a gate on a number that there will not be, before any drawing."""
    if reference.scores is None or reference.extractor is None:
        missing = set(METRICS) - set(_WITHOUT_FEATURES)
        advice = (
            "without a feature extractor there are only "
            f"{', '.join(_WITHOUT_FEATURES)}; pass --features FOLDER with a CLIP vision model"
        )
    else:
        missing = {"class_accuracy", "faithfulness"}
        if reference.scores.accuracy is not None:
            missing.remove(reference.accuracy_name)
        if reference.scores.fd is None:
            missing.add("fd_ratio")
        if reference.scores.inception_score is None:
            missing.add("inception_score")
        advice = f"{reference.extractor.name} does not give it for this model"
    for gate in gates:
        if gate.metric in missing:
            raise UsageError(f"the gate {gate} cannot be checked: {advice}")


def _compare(drawn: Tensor, reference: ReferenceSet) -> tuple[dict[str, Any], list[str] | None]:
    """Scores of images, and the names of metrics that cannot be computed without an extractor."""
    pixels = pixel_scores(drawn, reference.images)
    if reference.scores is None or reference.extractor is None:
        missing = [name for name in METRICS if name not in _WITHOUT_FEATURES]
        return {"fd": None, "fd_reference": None, **pixels}, missing
    scores = score_images(drawn, reference.conditioning.labels, reference.extractor)
    return _compare_features(scores, reference.scores, reference.accuracy_name) | pixels, None


def _compare_features(scores: ImageScores, own: ImageScores, accuracy_name: str) -> dict[str, Any]:
    """The numbers that features give: this model's beside the float model's (`own`)."""
    fd, interval = scores.fd, scores.fd_interval
    if fd is None:
        statistics = feature_statistics(own.features)
        fd = frechet_distance(feature_statistics(scores.features), statistics)
        interval = bootstrap_interval(scores.features, statistics)
    precision, recall = precision_recall(scores.features, own.features)
    result: dict[str, Any] = {
        "fd": fd,
        "fd_interval": interval,
        "fd_reference": own.fd,
        "fd_interval_reference": own.fd_interval,
        "sfd": spatial_distance(scores, own),
        "precision": precision,
        "recall": recall,
    }
    if own.fd is not None:
        result["fd_ratio"] = fd / own.fd
    if scores.accuracy is not None:
        result |= {accuracy_name: scores.accuracy, f"{accuracy_name}_reference": own.accuracy}
        result |= {
            "accuracy_interval": scores.accuracy_interval,
            "accuracy_interval_reference": own.accuracy_interval,
        }
    if scores.inception_score is not None:
        result["inception_score"] = scores.inception_score
        result["inception_score_reference"] = own.inception_score
    return result
