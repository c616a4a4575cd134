"""The input transforms of a run, chosen on a few images before the calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from trtq.calib.attention_scales import scale_attention
from trtq.calib.input_rows import RowRecorder
from trtq.calib.recipe import Recipe
from trtq.calib.record import observe_trajectories
from trtq.calib.record_calls import CalledDenoiser, observe_pipeline
from trtq.calib.transform_error import TransformChoice
from trtq.calib.transforms import transform_layers
from trtq.diffusion.sampling import at_once
from trtq.diffusion.schedule import NoiseSchedule
from trtq.precision import Method
from trtq.progress import ProgressCallback
from trtq.quant import LayerPlan, TimestepTable
from trtq.runs.plan import QuantizePlan
from trtq.runs.plan_calls import CallsPlan
from trtq.seeds import seeded_generator

__all__ = ["scales_attention", "with_transforms", "with_transforms_of_calls"]

_IMAGES = 8
_STAGE = "choose transforms"


def _choice(recipe: Recipe) -> TransformChoice | None:
    """What the recipe allows; None: no transform."""
    if not recipe.smooth and not recipe.rotate and recipe.scales != "auto":
        return None
    # The samples of a candidate have neither histograms nor rows apart.
    ranges: Method = "minmax" if recipe.calibration.activations == "minmax" else "search"
    return TransformChoice(
        recipe.smooth,
        recipe.rotate,
        ranges,
        recipe.calibration.weights,
        recipe.tables == "static",
    )


def scales_attention(recipe: Recipe, layers: Sequence[LayerPlan]) -> bool:
    """Whether channels of attention may be scaled; earlier versions' checkpoints lack the factors."""
    return recipe.smooth and any(plan.kind == "product" and plan.quantized for plan in layers)


def _transformed(
    denoiser: nn.Module,
    layers: Sequence[LayerPlan],
    recorder: RowRecorder,
    options: TransformChoice,
) -> list[LayerPlan]:
    """Scale the channels of attention, then transform the layers' inputs, in place; return the plans."""
    plans, inputs = scale_attention(denoiser, layers, recorder.attention, recorder.inputs, options)
    return transform_layers(denoiser, plans, inputs, options)


def with_transforms(
    plan: QuantizePlan,
    schedule: NoiseSchedule,
    device: torch.device,
    progress: ProgressCallback,
) -> QuantizePlan:
    """Choose the transforms on trajectories, and apply them to the plan's denoiser, in place.

    Args:
        plan: the plan.
        schedule: schedule of the trajectories.
        device: device of the denoiser.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        The plan with the chosen transforms.

    Raises:
        NonFiniteError: an input is NaN or infinite; the message names the layer.
    """
    recipe, source = plan.recipe, plan.source
    options = _choice(recipe)
    if options is None:
        return plan
    assert recipe.guidance is not None
    assert recipe.calibration.images is not None
    images = min(_IMAGES, recipe.calibration.images)
    table = TimestepTable(schedule.timesteps.tolist())
    recorder = RowRecorder(plan.layers, table, recipe.seed)
    observe_trajectories(
        recorder,
        source.denoiser,
        schedule,
        table,
        source.draw_conditions(images, seeded_generator(recipe.seed, "calibration conditions")),
        source.sample_shape,
        images=images,
        batch=at_once(source.sample_shape, recipe.calibration.batch),
        seed=recipe.seed,
        guidance=recipe.guidance,
        device=device,
        progress=lambda done, total: progress(_STAGE, done, total),
    )
    return replace(plan, layers=_transformed(source.denoiser, plan.layers, recorder, options))


def with_transforms_of_calls(plan: CallsPlan, progress: ProgressCallback) -> CallsPlan:
    """Choose the transforms inside calls of the pipeline, and apply them to its denoisers, in place.

    Args:
        plan: the plan.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        The plan with the chosen transforms.

    Raises:
        ArtefactError: the pipeline cannot be called.
        NonFiniteError: an input is NaN or infinite; the message names the layer.
    """
    recipe = plan.recipe
    options = _choice(recipe)
    if options is None:
        return plan
    recorders = {
        part.name: RowRecorder(part.plan.layers, part.plan.table, recipe.seed)
        for part in plan.denoisers
    }
    observe_pipeline(
        plan.source.pipeline,
        [
            CalledDenoiser(
                part.name, part.module, part.plan.layers, part.plan.table, part.calls.argument
            )
            for part in plan.denoisers
        ],
        recorders,
        plan.calls[: max(len(plan.numbers), min(_IMAGES, len(plan.calls)))],
        plan.numbers,
        seed=recipe.seed,
        progress=lambda done, total: progress(_STAGE, done, total),
    )
    denoisers = [
        replace(
            part,
            plan=replace(
                part.plan,
                layers=_transformed(part.module, part.plan.layers, recorders[part.name], options),
            ),
        )
        for part in plan.denoisers
    ]
    return replace(plan, denoisers=denoisers)
