"""The fine-tuning of every denoiser of a pipeline inside the pipeline's own call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trtq.calib.recipe import Recipe, Training
from trtq.calls.joined import BatchAxes
from trtq.diffusion.schedule import NoiseSchedule
from trtq.errors import TrtqError
from trtq.progress import ProgressCallback
from trtq.quant import QuantizedDenoiser
from trtq.runs.fine_tune import FineTuneResult, fine_tune
from trtq.runs.fine_tune_stage import FineTuning
from trtq.runs.joint_calls import joint_axes, steps_per_item
from trtq.runs.plan_calls import CallsPlan, DenoiserPlan

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trtq.train.points import Points

__all__ = ["CalledTuning", "fine_tune_calls", "step_weight"]

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3
"""Maximum relative difference between a timestep of the pipeline and of the noise schedule."""


@dataclass(frozen=True)
class CalledTuning:
    """The state that the fine-tunings of all denoisers share.

    Attributes:
        plan: the plan; its pipeline is on the accelerator's device.
        parts: plans of the denoisers.
        quantized: quantised denoisers by name; changed in place.
        accelerator: accelerator of this process.
        checkpoints: folder of the checkpoints; each stage of each denoiser has a folder in it.
        fingerprint: hash of model, call and recipe; checkpoints with another hash are not resumed.
        resume: continue from the newest checkpoint.
        progress: callback that receives the stage's name, the work done and the total.
    """

    plan: CallsPlan
    parts: Sequence[DenoiserPlan]
    quantized: Mapping[str, QuantizedDenoiser]
    accelerator: Accelerator
    checkpoints: Path
    fingerprint: str
    resume: bool
    progress: ProgressCallback


def fine_tune_calls(setup: CalledTuning) -> FineTuneResult:
    """Fine-tune the denoisers one after the other, in place, and return the measurements.

    The iterations of the recipe are divided among the denoisers by their number of calls. While one
    denoiser is tuned, the others run in float.

    Raises:
        RecipeError: the policy does not define a set of layers that the recipe names.
        QuantizationError: a set contains no quantised layer.
        ArtefactError: the pipeline cannot be called.
        NonFiniteError: a loss is NaN or infinite.
    """
    recipe = setup.plan.recipe
    training = recipe.training
    assert training is not None
    minimum = 1 if recipe.quest is None else 2
    shares = _shares(
        training.iterations, [len(part.calls.timesteps) for part in setup.parts], minimum
    )
    results = []
    device = setup.accelerator.device
    for index, (part, iterations) in enumerate(zip(setup.parts, shares, strict=True)):
        model = setup.quantized[part.name]
        axes = joint_axes(setup.plan, part, model.to(device), device)
        slots, together = _batches(training, part, setup.plan.call.images, joint=bool(axes))
        changes = {"iterations": iterations, "accumulate": slots}
        share = recipe.model_copy(update={"training": training.model_copy(update=changes)})
        tuning = FineTuning(
            model,
            _called_points(setup, part, share, axes, together),
            part.plan.policy,
            setup.accelerator,
            setup.checkpoints,
            setup.fingerprint,
            setup.resume,
            setup.progress,
            part.roles,
            f"{part.name} " if len(setup.parts) > 1 else "",
            keep_last=index < len(setup.parts) - 1,
        )
        with steps_per_item(model, bool(axes)):
            results.append(fine_tune(tuning, share))
    return _combined(results, [setup.quantized[part.name] for part in setup.parts])


def _batches(
    training: Training, part: DenoiserPlan, images: int, *, joint: bool
) -> tuple[int, int]:
    """Number of micro-batches per update, and of calls per micro-batch.

    Args:
        training: the recipe's training.
        part: plan of the denoiser.
        images: number of images per call of the pipeline.
        joint: whether calls can be computed together.
    """
    if joint:
        training = training.divided(sum(p.numel() for p in part.module.parameters()))
    calls = -(-training.batch // images)
    return (training.accumulate, calls) if joint else (training.accumulate * calls, 1)


def _shares(total: int, lengths: Sequence[int], minimum: int) -> list[int]:
    """Divide iterations in proportion to `lengths`; each share has at least `minimum`."""
    edges = [0]
    for count in range(1, len(lengths) + 1):
        edges.append(round(total * sum(lengths[:count]) / sum(lengths)))
    return [max(minimum, high - low) for low, high in pairwise(edges)]


def _called_points(
    setup: CalledTuning,
    part: DenoiserPlan,
    recipe: Recipe,
    axes: Mapping[str, BatchAxes],
    together: int,
) -> Callable[[str], AbstractContextManager[Points[Any]]]:
    """A function that opens the training points of a stage, see `FineTuning.trajectories`."""
    from trtq.train.called import CalledTrajectories

    training = recipe.training
    assert training is not None
    several = len(setup.parts) > 1
    weight = step_weight(part, training, recipe.steps)

    def opened(purpose: str) -> AbstractContextManager[Points[Any]]:
        return CalledTrajectories(
            setup.plan.source.pipeline,
            {other.name: other.module for other in setup.parts},
            part.name,
            part.calls.argument,
            calls=setup.plan.calls,
            numbers=setup.plan.numbers,
            length=len(part.calls.timesteps),
            slots=training.accumulate,
            stream=setup.accelerator.process_index,
            stride=setup.accelerator.num_processes,
            axes=axes,
            together=together,
            seed=recipe.seed,
            purpose=f"{part.name} {purpose}" if several else purpose,
            staggered=training.trajectory == "staggered",
            weight=weight,
            device=setup.accelerator.device,
        )

    return opened


def step_weight(
    part: DenoiserPlan, training: Training, steps: int
) -> Callable[[float], float] | None:
    """Function `timestep -> weight` of an error; None: weight 1 at all timesteps.

    Args:
        part: plan of the denoiser.
        training: the recipe's training; `influence` needs noise levels in closed form, without which
            the weights are uniform, with a warning.
        steps: number of denoising steps.
    """
    if training.step_weights == "uniform":
        return None
    visited = torch.tensor(sorted(set(part.calls.timesteps)), dtype=torch.float64)
    reason = "its timesteps are not those of the scheduler's noise levels"
    for schedule_of in (_scheduled_by_pipeline, _scheduled_by_scheduler):
        try:
            schedule = schedule_of(part, steps)
        except (TrtqError, ValueError, TypeError, AttributeError, LookupError) as err:
            reason = str(err)
            continue
        if schedule is None:
            continue
        known = schedule.timesteps.double()
        nearest = (visited[:, None] - known).abs().argmin(1)
        if torch.allclose(known[nearest], visited, rtol=_TOLERANCE, atol=_TOLERANCE):
            weights = schedule.influence().double()
            return lambda timestep: float(weights[(known - timestep).abs().argmin()])
    logger.warning(
        "training.step_weights='influence' needs noise levels in closed form, so all steps of %s have "
        "weight 1: %s",
        part.name,
        reason,
    )
    return None


def _scheduled_by_pipeline(part: DenoiserPlan, steps: int) -> NoiseSchedule | None:
    """The schedule by the known use of a scheduler in its pipeline; None: the use is unknown."""
    source = part.plan.source
    return None if source.recording_reason is not None else source.schedule(steps)


def _scheduled_by_scheduler(part: DenoiserPlan, steps: int) -> NoiseSchedule:
    """The schedule by the scheduler alone."""
    return NoiseSchedule.of(part.plan.source.scheduler, steps)


def _combined(
    results: Sequence[FineTuneResult], models: Sequence[QuantizedDenoiser]
) -> FineTuneResult:
    """The measurements of all denoisers; `tuned_share` is a mean weighted by parameters."""
    if len(results) == 1:
        return results[0]
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    shares = [result.tuned_share for result in results]
    tuned = [share * size for share, size in zip(shares, sizes, strict=True) if share is not None]
    return FineTuneResult(
        fine_tune_seconds=round(sum(result.fine_tune_seconds for result in results), 2),
        fine_tune_iterations=sum(result.fine_tune_iterations for result in results),
        stages=[stage for result in results for stage in result.stages],
        tuned_share=sum(tuned) / sum(sizes) if tuned else None,
    )
