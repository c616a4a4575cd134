"""Compare images and noise predictions of an artefact with those of the float model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trtq.artefact.opened import DEFAULT_STEPS, Opened, open_artefact
from trtq.calls.user_call import UserCall
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.errors import UsageError
from trtq.evaluation.evaluate_called import CallEvaluation, evaluate_called
from trtq.evaluation.frechet import bootstrap_interval, feature_statistics, frechet_distance
from trtq.evaluation.gates import METRICS, PIXEL_METRICS, Gate, check_gates
from trtq.evaluation.metrics import (
    ImageScores,
    layer_snr,
    noise_prediction_snr,
    pixel_scores,
    precision_recall,
    score_images,
    spatial_distance,
)
from trtq.evaluation.reference import ReferenceSet, draw_reference
from trtq.pipelines.called import CallOptions, is_called
from trtq.pipelines.draw import draw
from trtq.pipelines.open import open_any
from trtq.progress import ProgressCallback, silent
from trtq.results import Result

__all__ = ["Evaluation", "evaluate"]

DEFAULT_IMAGES = 1000
"""Number of images per model."""


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
        provider: runtime of the artefact, e.g. `cpu`.
        layers_worst: SNR of the ten worst layers by name, in dB; None unless the artefact is a run.
        gates: whether each gate is met, by gate.
        reference: number of images, seed, steps and guidance of the float model.
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


def evaluate(
    artefact: str | Path | Opened | Any,
    reference: str | Path | Opened | Any | ReferenceSet,
    *,
    images: int | None = None,
    steps: int | None = None,
    seed: int = 1,
    guidance: float | None = None,
    call: str | Path | Mapping[str, Any] | UserCall | None = None,
    inputs: Mapping[str, Any] | None = None,
    provider: str | None = None,
    features: Path | None = None,
    gates: tuple[Gate, ...] = (),
    progress: ProgressCallback = silent,
) -> Evaluation | CallEvaluation:
    """Compare an artefact with the float model, with the same noise, conditions and steps.

    An artefact that was recorded inside its pipeline's call is compared through that call, see
    `trtq.evaluation.evaluate_called`.

    Args:
        artefact: a run, an ONNX or engine folder, a checkpoint, a pipeline object, or one of them
            opened.
        reference: the float model, or its images from `draw_reference`, whose number, steps, seed,
            guidance and features are then used.
        images: number of images to generate with each model; None: 1000, or 8 calls of a recorded
            pipeline.
        steps: number of denoising steps; None: the number that the artefact was calibrated for, else
            20.
        seed: seed of the initial noise.
        guidance: classifier-free guidance scale; None: the value used for calibration.
        call: arguments of the pipeline's call, see `trtq.pipelines.called.call_for`.
        inputs: further arguments of the pipeline's call.
        provider: runtime of the artefact, see `trtq.pipelines.open.open_any`; None: the default.
        features: folder of a CLIP vision model or classifier, see `draw_reference`.
        gates: conditions on the metrics, see `Evaluation.gates`.
        progress: callback with the stage's name, the completed work and the total.

    Raises:
        UsageError: a gate names a metric that cannot be computed for this model.
        TrtqError: see `trtq.errors`.
    """
    opened = open_artefact(artefact, verify=False)
    if is_called(opened, call=call is not None or bool(inputs)):
        if features is not None or isinstance(reference, ReferenceSet):
            raise UsageError(
                "a pipeline that is used through its own call is compared by PSNR and SSIM; leave out "
                "--features, and give the float checkpoint as the reference"
            )
        return evaluate_called(
            opened,
            reference,
            images=images,
            seed=seed,
            options=CallOptions(steps=steps, guidance=guidance),
            call=call,
            inputs=inputs,
            provider=provider,
            gates=gates,
            progress=progress,
        )
    judged = open_any(opened, provider)
    if not isinstance(reference, ReferenceSet):
        reference = draw_reference(
            reference,
            images=DEFAULT_IMAGES if images is None else images,
            steps=steps or opened.steps or DEFAULT_STEPS,
            seed=seed,
            guidance=opened.guidance if guidance is None else guidance,
            features=features,
            judged=judged,
            progress=progress,
        )
    check_gates(gates, reference)
    start = time.monotonic()
    drawn = draw(
        judged,
        reference.conditioning,
        **reference.sampling,
        progress=lambda done, total: progress("draw", done, total),
    )
    seconds = time.monotonic() - start
    snr = noise_prediction_snr(
        judged,
        reference.source,
        **reference.sampling,
        progress=lambda done, total: progress("compare predictions", done, total),
    )
    scores, not_computed = _compare(drawn, reference)
    known = scores | {"snr_db_min": min(snr)}
    return Evaluation(
        scores=scores,
        not_computed=not_computed,
        snr_db=snr,
        images=drawn,
        seconds=seconds,
        provider=provider or ("cpu" if hasattr(judged.denoiser, "engine") else "torch"),
        layers_worst=_worst_layers(judged, reference),
        gates={str(gate): gate.holds(float(known[gate.metric])) for gate in gates},
        reference=reference,
    )


def _worst_layers(judged: LoadedPipeline, reference: ReferenceSet) -> dict[str, float] | None:
    """SNR of the ten worst layers by name, in dB; None unless the artefact is a run."""
    if not hasattr(judged.denoiser, "table"):
        return None
    snr = layer_snr(judged, reference.source, steps=reference.steps, seed=reference.seed)
    return dict(list(snr.items())[:10])


def _compare(drawn: Tensor, reference: ReferenceSet) -> tuple[dict[str, Any], list[str] | None]:
    """Scores of images, and the names of metrics that cannot be computed without an extractor."""
    pixels = pixel_scores(drawn, reference.images)
    if reference.scores is None or reference.extractor is None:
        missing = [name for name in METRICS if name not in PIXEL_METRICS]
        return {"fd": None, "fd_reference": None, **pixels}, missing
    scores = score_images(drawn, reference.conditioning.labels, reference.extractor)
    return _compare_features(scores, reference.scores, reference.accuracy_name) | pixels, None


def _compare_features(
    scores: ImageScores, reference: ImageScores, accuracy_name: str
) -> dict[str, Any]:
    """Feature metrics of this model and of the float model.

    Args:
        scores: scores of this model's images.
        reference: scores of the float model's images.
        accuracy_name: name of the metric for correctly recognised images.
    """
    fd, interval = scores.fd, scores.fd_interval
    if fd is None:
        statistics = feature_statistics(reference.features)
        fd = frechet_distance(feature_statistics(scores.features), statistics)
        interval = bootstrap_interval(scores.features, statistics)
    precision, recall = precision_recall(scores.features, reference.features)
    result: dict[str, Any] = {
        "fd": fd,
        "fd_interval": interval,
        "fd_reference": reference.fd,
        "fd_interval_reference": reference.fd_interval,
        "sfd": spatial_distance(scores, reference),
        "precision": precision,
        "recall": recall,
    }
    if reference.fd is not None:
        result["fd_ratio"] = fd / reference.fd
    if scores.accuracy is not None:
        result |= {accuracy_name: scores.accuracy, f"{accuracy_name}_reference": reference.accuracy}
        result |= {
            "accuracy_interval": scores.accuracy_interval,
            "accuracy_interval_reference": reference.accuracy_interval,
        }
    if scores.inception_score is not None:
        result["inception_score"] = scores.inception_score
        result["inception_score_reference"] = reference.inception_score
    return result
