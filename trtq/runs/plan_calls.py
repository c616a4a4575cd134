"""The plan of a quantisation inside the pipeline's own call, made before any long work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trtq.calib.budget import parse_budget
from trtq.calib.policy import GENERIC, load_policy, plan_layers
from trtq.calib.probe import LayerCall, observe_calls, with_shared_inputs
from trtq.calib.recipe import Recipe
from trtq.calib.roles import LayerRoles, observe_roles
from trtq.calls.processors import with_processors
from trtq.calls.recorder import RecordedCall
from trtq.calls.survey import DenoiserCalls, survey
from trtq.calls.user_call import UserCall
from trtq.checkpoint.components import denoisers_of
from trtq.checkpoint.ip_adapter import adapter_names, adapter_scales
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.errors import QuantizationError, UsageError
from trtq.lora import LoraRequest, MergedLora, merge_loras
from trtq.progress import ProgressCallback, silent
from trtq.quant import (
    LayerPlan,
    Structure,
    TimestepTable,
    apply_structure,
    attention_modules,
    skip_splits,
)
from trtq.quant.plan import quantizable_layers
from trtq.runs.budget import predictions_in_call, spend_budget
from trtq.runs.calibration_images import with_images
from trtq.runs.given_calls import calibration_prompts, named_files, user_calls
from trtq.runs.plan import QuantizePlan, load_float
from trtq.seeds import seeded_generator

__all__ = ["CallsPlan", "DenoiserPlan", "plan_calls"]


@dataclass(frozen=True)
class DenoiserPlan:
    """The plan of one denoiser.

    Attributes:
        plan: layers, bits and timesteps of the denoiser.
        calls: the denoiser's calls during one call of the pipeline.
        roles: observed roles of the denoiser's layers.
        ip_adapter: shapes of the tensors of IP-Adapters in the denoiser, by path.
        ip_adapter_scales: strengths of the IP-Adapters, by path of the attention processor.
    """

    plan: QuantizePlan
    calls: DenoiserCalls
    roles: LayerRoles
    ip_adapter: Mapping[str, list[int]] = field(default_factory=dict)
    ip_adapter_scales: Mapping[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the component."""
        return self.calls.name

    @property
    def module(self) -> nn.Module:
        """The float model, whose structure is rewritten already."""
        return self.plan.source.denoiser

    @property
    def sample(self) -> RecordedCall:
        """A recorded call of the denoiser."""
        return next(iter(self.calls.first.values()))


@dataclass(frozen=True)
class CallsPlan:
    """The plan of a quantisation inside the pipeline's own call.

    Attributes:
        source: the loaded checkpoint.
        recipe: the recipe, with every default filled in.
        call: the user's call.
        calls: calls of the calibration; the user's calls come first.
        denoisers: one plan per denoiser that the pipeline calls.
        numbers: number of calls of all denoisers during each of the user's calls; `calls[i]` makes
            `numbers[i % len(numbers)]` calls.
        loras: LoRAs that were merged into the float weights.
    """

    source: LoadedPipeline
    recipe: Recipe
    call: UserCall
    calls: Sequence[UserCall]
    denoisers: Sequence[DenoiserPlan]
    numbers: Sequence[int]
    loras: Sequence[MergedLora] = ()


def plan_calls(
    model: Any,
    recipe: Recipe,
    calls: Sequence[Mapping[str, Any]] = (),
    loras: Sequence[LoraRequest] = (),
    inputs: Mapping[str, Any] | None = None,
    *,
    stored: bool = False,
    progress: ProgressCallback = silent,
) -> CallsPlan:
    """Load the checkpoint, run the pipeline once, and choose the bits of every layer.

    Args:
        model: a checkpoint, see `trtq.runs.quantize.quantize`.
        recipe: the recipe; its missing values are filled in from the model and the call.
        calls: arguments of the user's calls of the pipeline; none: a default call.
        loras: LoRAs to merge into the float weights first.
        inputs: further arguments of every call, also of a default call.
        stored: whether large weights stay in their files, see `trtq.checkpoint.stored_models`.
        progress: callback that receives the stage's name, the work done and the total.

    Raises:
        ArtefactError: the checkpoint cannot be read, or the pipeline cannot be called.
        UsageError: the model is already quantised, or an argument does not exist.
        QuantizationError: no layer would be quantised.
    """
    source = load_float(model, copy_all=bool(loras), stored=stored)
    pipeline = source.pipeline
    modules = denoisers_of(pipeline)
    merged = merge_loras(_with_weights(pipeline), loras, source.denoiser_name)
    prompts = calibration_prompts(source, recipe)
    given = user_calls(source, calls, recipe, inputs)
    recipe = recipe.model_copy(update={"steps": given[0].steps or recipe.steps})
    structures = {name: _structured(module, recipe) for name, module in modules.items()}
    with named_files(pipeline, default=not calls and not inputs):
        surveyed = [survey(pipeline, modules, call, recipe.seed) for call in given]
    parts = []
    for name in modules:
        seen = [result[name] for result in surveyed if name in result]
        if seen:
            part = LoadedPipeline(source.name, source.folder, pipeline, name, source.prompts)
            parts.append(_denoiser_plan(part, recipe, seen, structures[name]))
    probed = [len(part.calls.timesteps) / given[0].images for part in parts]
    plans = with_images([part.plan for part in parts], probed)
    recipe = plans[0].recipe
    parts = [
        _within_budget(replace(part, plan=plan), given[0], progress)
        for part, plan in zip(parts, plans, strict=True)
    ]
    return CallsPlan(
        source,
        recipe,
        given[0],
        _calibration_calls(given, prompts, source.classes, recipe),
        parts,
        [sum(len(calls.timesteps) for calls in result.values()) for result in surveyed],
        merged,
    )


def _within_budget(part: DenoiserPlan, call: UserCall, progress: ProgressCallback) -> DenoiserPlan:
    """The plan with weight bits by sensitivity, if the recipe has a budget; it holds per denoiser."""
    recipe = part.plan.recipe
    if recipe.budget is None:
        return part
    predictions = predictions_in_call(
        part.plan.source.pipeline, part.name, call, len(part.calls.timesteps), recipe.seed
    )
    layers = spend_budget(part.plan, parse_budget(recipe.budget), predictions, progress)
    return replace(part, plan=replace(part.plan, layers=layers))


def _with_weights(pipeline: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that have weights."""
    return {
        name: component
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module)
    }


def _structured(module: nn.Module, recipe: Recipe) -> Structure:
    """Rewrite a denoiser as the recipe requests, in place, and return the changes."""
    structure = Structure(
        tuple(attention_modules(module)) if recipe.attention.quantize else (),
        skip_splits(module) if recipe.split_skips else {},
    )
    apply_structure(module, structure)
    return structure


def _denoiser_plan(
    source: LoadedPipeline,
    recipe: Recipe,
    seen: Sequence[DenoiserCalls],
    structure: Structure,
) -> DenoiserPlan:
    """Choose the bits of a denoiser's layers and its timesteps.

    Args:
        source: the pipeline, with this denoiser as its denoiser.
        recipe: the recipe.
        seen: the denoiser's calls during each of the user's calls.
        structure: rewritten modules of the denoiser.
    """
    model_class = type(source.denoiser).__name__
    policy = load_policy(model_class, None if recipe.policy is None else Path(recipe.policy))
    probability_bits = recipe.attention.probability_bits
    denoiser, sample = source.denoiser, next(iter(seen[0].first.values()))

    layer_calls: dict[str, LayerCall] = {}

    def run() -> object:
        with with_processors(denoiser, sample.processors):
            return denoiser(**sample.form.rebuild(sample.tensors))

    def observed_run() -> None:
        # Both observations in one call, which takes minutes for a large model.
        layer_calls.update(observe_calls(denoiser, list(quantizable_layers(denoiser)), run))

    roles = observe_roles(denoiser, observed_run, _images_in(sample, seen[0].argument))
    layers: Sequence[LayerPlan] = plan_layers(
        denoiser,
        policy,
        recipe.precision,
        None if probability_bits == "float" else probability_bits,
        roles,
        load_policy(GENERIC) if recipe.policy is None else None,
        scales=recipe.scales,
        group=recipe.group,
    )
    if not any(layer.quantized for layer in layers):
        raise QuantizationError(
            f"zero layers of {model_class} would be quantised: the policy for {policy.family} matches "
            f"none of its {len(layers)} layers"
        )
    timesteps = sorted({timestep for calls in seen for timestep in calls.timesteps})
    if recipe.tables == "static":
        timesteps = timesteps[len(timesteps) // 2 :][:1]
    merged = replace(
        seen[0], first={key: call for calls in reversed(seen) for key, call in calls.first.items()}
    )
    if "." in merged.argument:
        raise UsageError(
            f"{model_class} takes its timestep inside another argument ({merged.argument}), which trtq "
            "does not support"
        )
    if recipe.calibration.share_inputs:
        layers = with_shared_inputs(layers, layer_calls)
    table = TimestepTable(timesteps)
    plan = QuantizePlan(source, recipe, layers, table, structure, policy, layer_calls)
    if recipe.blockwise is not None:
        # A denoiser without blocks is refused before any long work.
        plan.blocks()
    tensors = denoiser.state_dict()
    adapters = {key: list(tensors[key].shape) for key in adapter_names(tensors)}
    scales = adapter_scales(denoiser, f"the {source.denoiser_name}") if adapters else {}
    return DenoiserPlan(plan, merged, roles, adapters, scales)


def _images_in(call: RecordedCall, argument: str) -> int:
    """Number of images in a denoiser's call, with guidance in one batch twice the user's."""
    timestep = call.tensors[argument]
    if timestep.ndim == 1 and len(timestep) > 1:
        return len(timestep)
    sample = next(tensor for name, tensor in call.tensors.items() if name != argument)
    return len(sample) if sample.ndim > 1 else 1


def _calibration_calls(
    given: Sequence[UserCall], prompts: Sequence[str], classes: int | None, recipe: Recipe
) -> list[UserCall]:
    """The user's calls, then the same calls with other prompts or class labels.

    Args:
        given: the user's calls.
        prompts: prompts to choose from.
        classes: number of the model's classes; None: it has none.
        recipe: recipe with the total number of images.
    """
    assert recipe.calibration.images is not None
    number = max(len(given), -(-recipe.calibration.images // given[0].images))
    generator = seeded_generator(recipe.seed, "calibration prompts")
    calls = list(given)
    while len(calls) < number:
        call = given[len(calls) % len(given)]
        if call.prompts is not None and prompts:
            chosen = _drawn(prompts, call.prompts, generator)
            call = call.with_prompts(chosen)
        if call.labels is not None and classes is not None:
            drawn = torch.randint(classes, (len(call.labels),), generator=generator)
            call = call.with_labels(drawn.tolist())
        calls.append(call)
    return calls


def _drawn(prompts: Sequence[str], count: int, generator: Any) -> list[str]:
    chosen = torch.randint(len(prompts), (count,), generator=generator)
    return [prompts[index] for index in chosen.tolist()]
