"""Compare an artefact with the float model through their pipelines' own call."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtq.artefact.opened import Opened, open_artefact
from trtq.calls.user_call import UserCall, accepted_arguments
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.errors import ArtefactError, UsageError
from trtq.evaluation.gates import Gate
from trtq.evaluation.metrics import pixel_scores, psnr_db
from trtq.pipelines.called import CallOptions, call_for, open_called, steps_of
from trtq.pipelines.generate_called import called_media
from trtq.pipelines.media import Media
from trtq.progress import ProgressCallback, silent
from trtq.results import Result

__all__ = ["CallEvaluation", "evaluate_called"]

DEFAULT_CALLS = 8
"""Number of calls per model, whose results are compared pixel by pixel."""
_METRICS = ("psnr_db", "ssim")


@dataclass(frozen=True, kw_only=True, eq=False)
class CallEvaluation(Result):
    """Agreement of an artefact with the float model, from the same calls and seeds.

    Attributes:
        media: `image`, `video` or `audio`; a video is compared frame by frame.
        psnr_db: mean PSNR in dB; equal results count as 100 dB.
        psnr_db_interval: 95 % interval of `psnr_db`; None for sounds.
        ssim: mean SSIM; None for sounds.
        ssim_interval: 95 % interval of `ssim`; None for sounds.
        images: number of results per model.
        frames: number of compared pictures.
        steps: number of denoising steps; None if it is unknown.
        seed: seed of the random numbers.
        provider: runtime of the artefact, e.g. `cpu`.
        seconds: duration of the artefact's calls, in seconds.
        seconds_reference: duration of the float model's calls, in seconds.
        gates: whether each gate is met, by gate.
        pictures: compared pictures, float32[B,C,H,W] in [-1, 1]; None for sounds; not in JSON.
        references: the float model's pictures; None for sounds; not in JSON.
    """

    media: str
    psnr_db: float
    psnr_db_interval: tuple[float, float] | None = None
    ssim: float | None = None
    ssim_interval: tuple[float, float] | None = None
    images: int
    frames: int
    steps: int | None
    seed: int
    provider: str
    seconds: float
    seconds_reference: float
    gates: dict[str, bool]
    pictures: Tensor | None = None
    references: Tensor | None = None

    @property
    def scores(self) -> dict[str, float | None]:
        """The metrics by name, as of `trtq.evaluation.evaluate.Evaluation`."""
        return {"psnr_db": self.psnr_db, "ssim": self.ssim}

    @property
    def passed(self) -> bool:
        """Whether every gate is met."""
        return all(self.gates.values())

    def _by_key(self) -> dict[str, Any]:
        values = super()._by_key()
        del values["pictures"], values["references"]
        return {**values, "passed": self.passed}


def evaluate_called(
    artefact: str | Path | Opened | Any,
    reference: str | Path | Opened | Any,
    *,
    images: int | None = None,
    seed: int = 1,
    options: CallOptions | None = None,
    call: str | Path | Mapping[str, Any] | UserCall | None = None,
    inputs: Mapping[str, Any] | None = None,
    provider: str | None = None,
    gates: Sequence[Gate] = (),
    progress: ProgressCallback = silent,
) -> CallEvaluation:
    """Call both pipelines with the same arguments and seeds, and compare what they return.

    Args:
        artefact: an artefact that was recorded inside its pipeline's call.
        reference: the float checkpoint that it was made from.
        images: number of calls per model; None: 8.
        seed: seed of the random numbers.
        options: options that change the call.
        call: arguments of the call, see `trtq.pipelines.called.call_for`.
        inputs: further arguments of the call.
        provider: runtime of the artefact, see `trtq.pipelines.open.open_any`.
        gates: conditions on `psnr_db` or `ssim`.
        progress: callback with the stage's name, the completed work and the total.

    Raises:
        UsageError: the reference is no float checkpoint or another pipeline, or a gate names a metric
            that cannot be computed here.
        ArtefactError: a pipeline cannot be called.
    """
    _check_gates(gates)
    against = open_artefact(reference, verify=False)
    if against.kind != "checkpoint":
        raise UsageError(
            f"the reference {against.place} is of kind {against.kind!r}; give the float checkpoint of it"
        )
    source, recorded = open_called(artefact, provider)
    float_source = open_pipeline(against.place, against.config, recorded=True)
    if type(float_source.pipeline) is not type(source.pipeline):
        raise UsageError(
            f"the reference {float_source.name} is a {type(float_source.pipeline).__name__}, and "
            f"{source.name} a {type(source.pipeline).__name__}; give the float checkpoint that it was "
            "made from"
        )
    chosen = call_for(source, recorded, options or CallOptions(), call, inputs)
    exact = _exact(source, chosen)
    count = images or DEFAULT_CALLS
    results, seconds = _timed(source, exact, count, seed, progress, "draw")
    expected, seconds_reference = _timed(
        float_source, exact, count, seed, progress, "draw with the float model"
    )
    scores = _scores(results, expected)
    return CallEvaluation(
        **scores,
        media=results[0].kind,
        images=sum(len(media) for media in results),
        steps=steps_of(source.pipeline, chosen),
        seed=seed,
        provider=provider or ("torch" if not hasattr(source.denoiser, "engines") else "cpu"),
        seconds=round(seconds, 2),
        seconds_reference=round(seconds_reference, 2),
        gates={str(gate): gate.holds(_value(scores, gate)) for gate in gates},
    )


def _check_gates(gates: Sequence[Gate]) -> None:
    for gate in gates:
        if gate.metric not in _METRICS:
            raise UsageError(
                f"the gate {gate} cannot be checked: a pipeline that is used through its own call has "
                f" {' and '.join(_METRICS)} only"
            )


def _value(scores: Mapping[str, Any], gate: Gate) -> float:
    value = scores.get(gate.metric)
    if value is None:
        raise UsageError(f"the gate {gate} cannot be checked: a sound has psnr_db only")
    return float(value)


def _exact(source: LoadedPipeline, call: UserCall) -> UserCall:
    """The call with tensors as results, which are not rounded to 8 bits, if the user chose nothing."""
    if "output_type" not in accepted_arguments(source.pipeline) or "output_type" in call.arguments:
        return call
    return call.updated({"output_type": "pt"})


def _timed(
    source: LoadedPipeline,
    call: UserCall,
    count: int,
    seed: int,
    progress: ProgressCallback,
    stage: str,
) -> tuple[list[Media], float]:
    start = time.monotonic()
    results = list(called_media(source, call, count, seed, progress, stage))
    return results, time.monotonic() - start


def _scores(results: Sequence[Media], expected: Sequence[Media]) -> dict[str, Any]:
    """The fields `psnr_db*`, `ssim*`, `frames`, `pictures` and `references` of `CallEvaluation`."""
    given, wanted = _stacked(results), _stacked(expected)
    if [tuple(part.shape) for part in given] != [tuple(part.shape) for part in wanted]:
        raise ArtefactError(
            f"the artefact returns results of shape {list(given[0].shape)}, the float model "
            f"{list(wanted[0].shape)}; give the float checkpoint that the artefact was made from"
        )
    if results[0].kind == "audio":
        values = [psnr_db(a[None], b[None]) for a, b in zip(given, wanted, strict=True)]
        return {"psnr_db": sum(values) / len(values), "frames": len(values)}
    if len({part.shape[1:] for part in given}) > 1:
        raise UsageError("the pictures of the calls have different sizes, which cannot be compared")
    pictures, references = torch.cat(given) * 2 - 1, torch.cat(wanted) * 2 - 1
    return {
        **pixel_scores(pictures, references),
        "frames": len(pictures),
        "pictures": pictures,
        "references": references,
    }


def _stacked(results: Sequence[Media]) -> list[Tensor]:
    """The pictures `[N,C,H,W]` of each picture or video, or the samples of each sound."""
    parts = [part for media in results for part in media.tensors]
    if results[0].kind == "audio":
        return parts
    return [part if part.ndim == 4 else part[None] for part in parts]
