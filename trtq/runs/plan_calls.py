"""The plan of a quantisation inside the pipeline's own call, made before any long work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trtq.artefact.opened import Opened
from trtq.calib.policy import GENERIC, load_policy, plan_layers
from trtq.calib.probe import observe_calls, with_shared_inputs
from trtq.calib.recipe import Recipe
from trtq.calib.roles import LayerRoles, observe_roles
from trtq.calls.recorder import DenoiserCalls, RecordedCall, denoisers_of, survey
from trtq.calls.user_call import STEPS_ARGUMENT, UserCall, check_names, default_call
from trtq.diffusion.ip_adapter import adapter_names
from trtq.diffusion.layout import CONFIG_NAME, read_index, read_json
from trtq.diffusion.loading import resolve_model
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.prompts import general_prompts, read_lines
from trtq.diffusion.scheduler_rules import KNOWN_SCHEDULERS
from trtq.diffusion.stepping import KNOWN_PIPELINES, stepping_of
from trtq.errors import ArtefactError, QuantizationError, UsageError
from trtq.lora import LoraRequest, MergedLora, merge_loras
from trtq.quant import (
    LayerPlan,
    Structure,
    TimestepTable,
    apply_structure,
    attention_modules,
    skip_splits,
)
from trtq.runs.plan import QuantizePlan, load_float
from trtq.seeds import seeded_generator

__all__ = ["CallsPlan", "DenoiserPlan", "knows_pipeline", "plan_calls", "user_calls"]


@dataclass(frozen=True)
class DenoiserPlan:
    """The plan of one denoiser.

    Attributes:
        plan: layers, bits and timesteps of the denoiser.
        calls: the denoiser's calls during one call of the pipeline.
        roles: observed roles of the denoiser's layers.
        ip_adapter: shapes of the tensors of IP-Adapters in the denoiser, by path.
    """

    plan: QuantizePlan
    calls: DenoiserCalls
    roles: LayerRoles
    ip_adapter: Mapping[str, list[int]] = field(default_factory=dict)

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


def knows_pipeline(model: Any) -> bool:
    """Whether trtq knows a pipeline's noise levels and inputs in closed form, without recording.

    Args:
        model: a checkpoint, see `trtq.runs.quantize.quantize`; one that cannot be read counts as known.
    """
    place = model.place if isinstance(model, Opened) else model
    if not isinstance(place, str | Path):
        if isinstance(place, nn.Module):
            return True
        scheduler = type(getattr(place, "scheduler", None)).__name__
        config = getattr(getattr(place, "unet", None), "config", {})
        return stepping_of(place) is not None and _known_parts(scheduler, config)
    try:
        folder = resolve_model(place)
        if not isinstance(folder, Path) or not folder.is_dir():
            return True
        index = read_index(folder)
        scheduler = str((index.get("scheduler") or [None, None])[1])
        path = folder / "unet" / CONFIG_NAME
        config = read_json(path) if path.is_file() else {}
    except ArtefactError:
        return True
    return str(index["_class_name"]) in KNOWN_PIPELINES and _known_parts(scheduler, config)


def _known_parts(scheduler: str, config: Mapping[str, Any]) -> bool:
    """Whether a scheduler is known, and a UNet takes no inputs that only its pipeline can make."""
    further = config.get("time_cond_proj_dim"), config.get("encoder_hid_dim_type")
    return (
        scheduler in KNOWN_SCHEDULERS and further[0] is None and further[1] in (None, "text_proj")
    )


def plan_calls(
    model: Any,
    recipe: Recipe,
    calls: Sequence[Mapping[str, Any]] = (),
    loras: Sequence[LoraRequest] = (),
    inputs: Mapping[str, Any] | None = None,
) -> CallsPlan:
    """Load the checkpoint, run the pipeline once, and choose the bits of every layer.

    Args:
        model: a checkpoint, see `trtq.runs.quantize.quantize`.
        recipe: the recipe; its missing values are filled in from the model and the call.
        calls: arguments of the user's calls of the pipeline; none: a default call.
        loras: LoRAs to merge into the float weights first.
        inputs: further arguments of every call, also of a default call.

    Raises:
        ArtefactError: the checkpoint cannot be read, or the pipeline cannot be called.
        UsageError: the model is already quantised, or an argument does not exist.
        QuantizationError: no layer would be quantised.
    """
    source = load_float(model, copy_all=bool(loras))
    pipeline = source.pipeline
    modules = denoisers_of(pipeline)
    merged = merge_loras(_with_weights(pipeline), loras, source.denoiser_name)
    prompts = _prompts(source, recipe)
    given = user_calls(source, calls, recipe, inputs)
    recipe = recipe.model_copy(update={"steps": given[0].steps or recipe.steps})
    structures = {name: _structured(module, recipe) for name, module in modules.items()}
    surveyed = [survey(pipeline, modules, call, recipe.seed) for call in given]
    parts = []
    for name in modules:
        seen = [result[name] for result in surveyed if name in result]
        if seen:
            part = LoadedPipeline(source.name, source.folder, pipeline, name, source.prompts)
            parts.append(_denoiser_plan(part, recipe, seen, structures[name]))
    return CallsPlan(
        source,
        recipe,
        given[0],
        _calibration_calls(given, prompts, recipe),
        parts,
        [sum(len(calls.timesteps) for calls in result.values()) for result in surveyed],
        merged,
    )


def user_calls(
    source: LoadedPipeline,
    calls: Sequence[Mapping[str, Any]] = (),
    recipe: Recipe | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> list[UserCall]:
    """The user's calls, checked and with a number of steps.

    Args:
        source: the loaded checkpoint.
        calls: arguments of the user's calls; none: a default call.
        recipe: recipe with the steps, prompts and size of a default call; None: the defaults.
        inputs: further arguments of every call, also of a default call.

    Raises:
        UsageError: an argument does not exist, or the pipeline requires one that trtq cannot choose.
    """
    chosen = Recipe(method="minmax") if recipe is None else recipe
    further = dict(inputs or {})
    given = [UserCall({**arguments, **further}) for arguments in calls]
    for call in given:
        call.check(source.pipeline)
    if not given:
        check_names(source.pipeline, further)
        offered = {**_offered(source, chosen), **further}
        given = [default_call(source.pipeline, _prompts(source, chosen), offered)]
    return [_with_steps(call, chosen) for call in given]


def _with_weights(pipeline: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that have weights."""
    return {
        name: component
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module)
    }


def _prompts(source: LoadedPipeline, recipe: Recipe) -> tuple[str, ...]:
    """The user's prompts, else those of the model, else general ones."""
    if recipe.prompts is not None:
        return read_lines(Path(recipe.prompts))
    chosen = source.prompts if source.prompts is not None else general_prompts()
    return tuple(chosen.calibration)


def _offered(source: LoadedPipeline, recipe: Recipe) -> dict[str, Any]:
    """Arguments that a default call passes if the pipeline takes them."""
    offered: dict[str, Any] = {
        STEPS_ARGUMENT: recipe.steps,
        "guidance_scale": recipe.guidance,
        "class_labels": [0] if source.classes is not None else None,
    }
    if recipe.size is not None:
        height, _, width = recipe.size.partition("x")
        offered |= {"height": int(height), "width": int(width)}
    return offered


def _with_steps(call: UserCall, recipe: Recipe) -> UserCall:
    """The call with a number of steps, unless the user chose timesteps or noise levels."""
    chosen = {"timesteps", "sigmas", STEPS_ARGUMENT}
    if any(call.arguments.get(name) is not None for name in chosen):
        return call
    return call.updated({STEPS_ARGUMENT: recipe.steps})


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

    def run() -> object:
        return denoiser(**sample.form.rebuild(sample.tensors))

    roles = observe_roles(denoiser, run, _images_in(sample, seen[0].argument))
    layers: Sequence[LayerPlan] = plan_layers(
        denoiser,
        policy,
        recipe.bits,
        None if probability_bits == "float" else probability_bits,
        roles,
        load_policy(GENERIC) if recipe.policy is None else None,
    )
    with torch.no_grad():
        layer_calls = observe_calls(denoiser, [layer.name for layer in layers], run)
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
    tensors = denoiser.state_dict()
    adapters = {key: list(tensors[key].shape) for key in adapter_names(tensors)}
    return DenoiserPlan(plan, merged, roles, adapters)


def _images_in(call: RecordedCall, argument: str) -> int:
    """Number of images in a denoiser's call, with guidance in one batch twice the user's."""
    timestep = call.tensors[argument]
    if timestep.ndim == 1 and len(timestep) > 1:
        return len(timestep)
    sample = next(tensor for name, tensor in call.tensors.items() if name != argument)
    return len(sample) if sample.ndim > 1 else 1


def _calibration_calls(
    given: Sequence[UserCall], prompts: Sequence[str], recipe: Recipe
) -> list[UserCall]:
    """The user's calls, then the same calls with other prompts, for the recipe's number of images."""
    number = max(len(given), -(-recipe.calibration.images // max(1, given[0].prompts or 1)))
    generator = seeded_generator(recipe.seed, "calibration prompts")
    calls = list(given)
    while len(calls) < number:
        call = given[len(calls) % len(given)]
        if call.prompts is not None and prompts:
            chosen = _drawn(prompts, call.prompts, generator)
            call = call.with_prompts(chosen)
        calls.append(call)
    return calls


def _drawn(prompts: Sequence[str], count: int, generator: Any) -> list[str]:
    chosen = torch.randint(len(prompts), (count,), generator=generator)
    return [prompts[index] for index in chosen.tolist()]
