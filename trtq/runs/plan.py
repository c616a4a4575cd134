"""What a quantisation will do, decided before any long work."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from trtq.artefact.opened import Opened, open_artefact
from trtq.calib.policy import Policy, load_policy, plan_layers
from trtq.calib.probe import LayerCall, probe, with_shared_inputs
from trtq.calib.recipe import Recipe
from trtq.calib.sensitivity import (
    FLOAT_BITOPS,
    Budget,
    parse_budget,
    spend,
    weight_sensitivity,
    with_bits,
)
from trtq.diffusion.checkpoint import one_line
from trtq.diffusion.cut import warn_of_cuts
from trtq.diffusion.encode import check_inputs
from trtq.diffusion.pipeline import LoadedPipeline, load_source
from trtq.diffusion.prompts import read_lines
from trtq.diffusion.sampling import at_once, seeded_noise, spread
from trtq.errors import QuantizationError, TrtqError, UsageError
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
from trtq.quant.stand_in import StandIn
from trtq.runs.weights import described_bytes, stored_bytes
from trtq.seeds import seeded_generator

__all__ = ["QuantizePlan", "plan_quantize"]

_SENSITIVITY_IMAGES = 20
_HEADER_BYTES = 16


@dataclass(frozen=True)
class QuantizePlan:
    """What a quantisation will do, before any long work.

    Attributes:
        source: the loaded checkpoint.
        recipe: what to make of it.
        layers: one plan per linear, convolution and spelled-out product.
        table: the calibrated timesteps.
        structure: what was brought into another form; the source's denoiser is in it already.
        policy: the rules that decided about the layers.
        calls: what each layer is called with, by its name.
        loras: what was merged into the float weights.
    """

    source: LoadedPipeline
    recipe: Recipe
    layers: Sequence[LayerPlan]
    table: TimestepTable
    structure: Structure
    policy: Policy
    calls: Mapping[str, LayerCall]
    loras: Sequence[MergedLora] = ()

    @property
    def quantized(self) -> int:
        """Number of layers that become low-bit."""
        return sum(plan.quantized for plan in self.layers)

    def bytes_before(self) -> int:
        """Size of the denoiser's parameters in float32."""
        return 4 * sum(p.numel() for p in self.source.denoiser.parameters())

    def bytes_after(self) -> int:
        """Size of the file: packed integers, weight scales and tables, and the rest as it is stored."""
        modules = dict(self.source.denoiser.named_modules())
        inside: set[str] = set()
        total = _HEADER_BYTES + described_bytes(len(self.table), self.quantized)
        for plan in self.layers:
            if not plan.quantized:
                continue
            inside |= {f"{plan.name}.weight", f"{plan.name}.bias"}
            total += len(plan.operands) * (len(self.table) * 12 + 4 * _entry_bytes(plan.name))
            if plan.weight_bits is not None:
                weight, bias = modules[plan.name].weight, modules[plan.name].bias
                total += _weight_bytes(weight, plan.weight_bits) + 3 * _entry_bytes(plan.name)
                total += 0 if bias is None else stored_bytes(bias) + _entry_bytes(plan.name)
        for name, tensor in self.source.denoiser.state_dict().items():
            if name not in inside:
                total += stored_bytes(tensor) + _entry_bytes(name)
        return total


def _entry_bytes(name: str) -> int:
    """An upper bound of what safetensors' header needs for one tensor of a module."""
    return len(name) + 110


def _weight_bytes(weight: nn.Parameter, bits: int) -> int:
    """Packed codes, scales (float32) and zero points (int16) of one weight."""
    channels = len(weight)
    return -(-channels * bits // 8) * (weight.numel() // channels) + 6 * channels


def plan_quantize(
    model: str | Path | Opened | Any,
    recipe: Recipe,
    loras: Sequence[LoraRequest] = (),
    progress: ProgressCallback = silent,
) -> QuantizePlan:
    """Load the checkpoint, merge LoRAs into it and decide about every layer.

    Raises:
        ArtefactError: the checkpoint cannot be read.
        QuantizationError: no layer would be quantised.
    """
    opened = open_artefact(model, verify=False)
    if opened.kind != "checkpoint":
        raise UsageError(
            f"{opened.place} is of kind {opened.kind!r} and quantised already; give a float checkpoint, "
            "or a run together with --lora to change its LoRAs"
        )
    source = load_source(opened.place)
    if isinstance(source.denoiser, StandIn):
        raise UsageError(
            f"{source.name} is quantised already (its denoiser is a "
            f"{type(source.denoiser).__name__}); give the float pipeline"
        )
    # What cannot be calibrated is refused before anything else is done.
    source.schedule(recipe.steps)
    if source.prompts is not None:
        check_inputs(source.pipeline)
    if not isinstance(opened.place, str | Path):
        # The caller's pipeline stays as it is, and its weights may be shared.
        pipeline = copy.copy(source.pipeline)
        for name, part in pipeline.components.items():
            if name == source.denoiser_name or (loras and isinstance(part, nn.Module)):
                setattr(pipeline, name, copy.deepcopy(part))
        source = LoadedPipeline(source.name, None, pipeline, source.denoiser_name, source.prompts)
    components = {
        name: part
        for name, part in source.pipeline.components.items()
        if isinstance(part, nn.Module)
    }
    merged = merge_loras(components, loras, source.denoiser_name)
    if recipe.size is not None:
        source.resize(recipe.size)
    if recipe.guidance is None:
        recipe = recipe.model_copy(update={"guidance": source.guidance})
    if recipe.training is not None:
        parameters = sum(p.numel() for p in source.denoiser.parameters())
        training = recipe.training.divided(parameters)
        recipe = recipe.model_copy(update={"training": training})
    if recipe.prompts is not None:
        if source.prompts is None:
            raise UsageError(f"{source.name} takes no prompts")
        lines = read_lines(Path(recipe.prompts))
        source.prompts = source.prompts.model_copy(update={"calibration": lines})
    if source.prompts is not None:
        warn_of_cuts(source.pipeline, source.prompts.calibration, "calibration prompts")
    policy = load_policy(
        type(source.denoiser).__name__, None if recipe.policy is None else Path(recipe.policy)
    )
    structure = Structure(
        tuple(attention_modules(source.denoiser)) if recipe.attention.quantize else (),
        skip_splits(source.denoiser) if recipe.split_skips else {},
    )
    apply_structure(source.denoiser, structure)
    probability_bits = recipe.attention.probability_bits
    layers = plan_layers(
        source.denoiser,
        policy,
        recipe.bits,
        None if probability_bits == "float" else probability_bits,
    )
    if not any(plan.quantized for plan in layers):
        raise QuantizationError(
            f"zero layers of {type(source.denoiser).__name__} would be quantised: the policy for "
            f"{policy.family} matches none of its {len(layers)} layers"
        )
    calls = _probe(source, layers, recipe.steps)
    if recipe.calibration.share_inputs:
        layers = with_shared_inputs(layers, calls)
    timesteps = source.timesteps(recipe.steps)
    if recipe.tables == "static":
        timesteps = timesteps[len(timesteps) // 2 :][:1]
    plan = QuantizePlan(
        source, recipe, layers, TimestepTable(timesteps), structure, policy, calls, merged
    )
    if recipe.budget is None:
        return plan
    return replace(plan, layers=_spend_budget(plan, parse_budget(recipe.budget), progress))


def _probe(source: LoadedPipeline, layers: Sequence[LayerPlan], steps: int) -> dict[str, LayerCall]:
    """What each layer is called with in one call of the denoiser on its pipeline's own conditions.

    Raises:
        QuantizationError: the parts of the pipeline do not fit each other, so it cannot be called.
    """
    try:
        conditions = source.draw_conditions(1, seeded_generator(0, "probe conditions"))
        return probe(
            source.denoiser,
            [layer.name for layer in layers],
            source.sample_shape,
            source.timesteps(steps)[0],
            conditions,
        )
    except TrtqError:
        raise
    # What torch and the pipeline raise when, say, text encoder and denoiser are of different widths.
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as err:
        raise QuantizationError(
            f"{source.name}: its {source.denoiser_name} cannot be called with what its pipeline "
            f"passes ({type(err).__name__}: {one_line(err)}); its parts are not of one model"
        ) from err


def _spend_budget(
    plan: QuantizePlan, budget: Budget, progress: ProgressCallback
) -> list[LayerPlan]:
    """Weight bits by sensitivity, for the layers at the recipe's own bits."""
    source, recipe = plan.source, plan.recipe
    names = [layer.name for layer in plan.layers if layer.adapters and layer.weight_bits]
    schedule = source.schedule(recipe.steps)
    generator = seeded_generator(recipe.seed, "sensitivity conditions")
    images = at_once(source.sample_shape, _SENSITIVITY_IMAGES)
    conditions = source.draw_conditions(images, generator)
    noise = seeded_noise(source.sample_shape, recipe.seed, 0, images, "sensitivity")
    guidance = recipe.guidance or 1.0
    x, timestep = spread(source.denoiser, schedule, noise, conditions, guidance)
    sensitivity = weight_sensitivity(
        source.denoiser,
        names,
        x,
        timestep,
        conditions,
        recipe.calibration.weights,
        guidance=guidance,
        progress=lambda done, total: progress("measure sensitivity", done, total),
    )
    modules: dict[str, Any] = dict(source.denoiser.named_modules())
    if budget.kind == "size":
        fixed = plan.bytes_after() - sum(
            _weight_bytes(modules[layer.name].weight, layer.weight_bits or 0)
            for layer in plan.layers
            if layer.name in sensitivity
        )
        available = budget.share * plan.bytes_before() - fixed

        def cost(name: str, bits: int) -> float:
            return _weight_bytes(modules[name].weight, bits)
    else:
        counts = {name: call.multiplications for name, call in plan.calls.items()}
        widths = {layer.name: (layer.weight_bits, layer.activation_bits) for layer in plan.layers}
        whole = sum(counts.values())
        spent = sum(
            count * ((w or 16) * (a or 16))
            for name, count in counts.items()
            for w, a in [widths[name]]
            if name not in sensitivity
        )
        available = budget.share * whole * FLOAT_BITOPS - spent

        def cost(name: str, bits: int) -> float:
            return counts[name] * bits * (widths[name][1] or 16)

    return with_bits(plan.layers, spend(sensitivity, cost, available))
