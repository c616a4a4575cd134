"""The plan of a quantisation, made before any long work."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from trtq.artefact.opened import Opened, open_artefact
from trtq.calib.budget import parse_budget
from trtq.calib.policy import Policy, load_policy, plan_layers
from trtq.calib.probe import LayerCall, probe, with_shared_inputs
from trtq.calib.recipe import Recipe
from trtq.checkpoint.components import DENOISERS
from trtq.checkpoint.wording import one_line
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.prompts import read_lines
from trtq.diffusion.truncation import warn_of_truncation
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
from trtq.quant.stored_weight import plain_name, weight_parameter
from trtq.runs.budget import predictions_on_trajectories, spend_budget
from trtq.runs.calibration_images import with_images
from trtq.runs.sizes import entry_bytes, format_bytes
from trtq.runs.weights import described_bytes, stored_bytes
from trtq.seeds import seeded_generator
from trtq.train.blocks import block_paths, is_inside

__all__ = ["QuantizePlan", "plan_quantize"]

_HEADER_BYTES = 16


@dataclass(frozen=True)
class QuantizePlan:
    """The plan of a quantisation, made before any long work.

    Attributes:
        source: the loaded checkpoint.
        recipe: the recipe, with every default filled in.
        layers: one plan per linear, convolution and product of activations.
        table: the calibrated timesteps.
        structure: rewritten modules; the denoiser of `source` is rewritten already.
        policy: the rules for the bits of the layers.
        calls: shapes and operations of each layer's call, by the layer's name.
        loras: LoRAs that were merged into the float weights.
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

    def blocks(self) -> list[str]:
        """Paths of the blocks that block-wise fine-tuning trains one by one.

        Raises:
            QuantizationError: the denoiser has no blocks.
        """
        low_bit = [plan for plan in self.layers if plan.weight_bits is not None]
        paths = block_paths(self.source.denoiser, [plan.name for plan in low_bit])
        if self.recipe.quest is not None:
            return paths
        # EfficientDM trains nothing in a block without adapters.
        trained = [plan.name for plan in self.layers if plan.adapters and plan.quantized]
        return [path for path in paths if any(is_inside(name, path) for name in trained)]

    def bytes_before(self) -> int:
        """Size of the denoiser's parameters in float32, in bytes."""
        return 4 * sum(p.numel() for p in self.source.denoiser.parameters())

    def bytes_after(self) -> int:
        """Size of the file in bytes: packed integers, weight scales, tables and float tensors."""
        modules = dict(self.source.denoiser.named_modules())
        inside: set[str] = set()
        total = _HEADER_BYTES + described_bytes(len(self.table), self.quantized)
        for plan in self.layers:
            if not plan.quantized:
                continue
            inside |= {f"{plan.name}.weight", f"{plan.name}.bias"}
            total += len(plan.operands) * (len(self.table) * 12 + 4 * entry_bytes(plan.name))
            if plan.weight_bits is not None:
                layer = modules[plan.name]
                weight, bias = weight_parameter(layer), layer.bias
                total += format_bytes(weight, plan)
                total += 3 * entry_bytes(plan.name)
                total += 0 if bias is None else stored_bytes(bias) + entry_bytes(plan.name)
        for name, tensor in self.source.denoiser.state_dict().items():
            if plain_name(name) not in inside:
                total += stored_bytes(tensor) + entry_bytes(name)
        return total


def plan_quantize(
    model: str | Path | Opened | Any,
    recipe: Recipe,
    loras: Sequence[LoraRequest] = (),
    progress: ProgressCallback = silent,
) -> QuantizePlan:
    """Load the checkpoint, merge LoRAs into it and choose the bits of every layer.

    Args:
        model: a diffusers folder, the name of a shipped model, a hub id, a pipeline object, or one of
            them opened.
        recipe: the recipe; its missing values are filled in from the model.
        loras: LoRAs to merge into the float weights first.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        The plan, with the loaded checkpoint.

    Raises:
        ArtefactError: the checkpoint cannot be read.
        UsageError: the model is already quantised, or does not take the recipe's prompts.
        QuantizationError: no layer would be quantised.
    """
    source = load_float(model, copy_all=bool(loras), steps=recipe.steps)
    merged = merge_loras(_modules(source), loras, source.denoiser_name)
    if recipe.size is not None:
        source = source.sized(recipe.size)
    recipe = _with_defaults(recipe, source)
    _choose_prompts(source, recipe)
    policy = load_policy(
        type(source.denoiser).__name__, None if recipe.policy is None else Path(recipe.policy)
    )
    structure = Structure(
        tuple(attention_modules(source.denoiser)) if recipe.attention.quantize else (),
        skip_splits(source.denoiser) if recipe.split_skips else {},
    )
    apply_structure(source.denoiser, structure)
    layers, calls = _plan_layers(source, recipe, policy)
    timesteps = source.timesteps(recipe.steps)
    if recipe.tables == "static":
        timesteps = timesteps[len(timesteps) // 2 :][:1]
    plan = QuantizePlan(
        source, recipe, layers, TimestepTable(timesteps), structure, policy, calls, merged
    )
    (plan,) = with_images([plan], [recipe.steps * (1 if recipe.guidance in (None, 1.0) else 2)])
    if recipe.blockwise is not None:
        # A denoiser without blocks is refused before any long work.
        plan.blocks()
    if recipe.budget is None:
        return plan
    predictions = predictions_on_trajectories(plan)
    layers = spend_budget(plan, parse_budget(recipe.budget), predictions, progress)
    return replace(plan, layers=layers)


def load_float(
    model: str | Path | Opened | Any,
    *,
    copy_all: bool,
    steps: int | None = None,
    stored: bool = False,
) -> LoadedPipeline:
    """Load the float checkpoint, and first raise if it cannot be calibrated.

    Args:
        model: see `plan_quantize`.
        copy_all: whether components of a pipeline object other than the denoiser may change too.
        steps: denoising steps of a calibration that follows noise levels in closed form; None: the
            calibration runs inside the pipeline's own call, and every denoiser may change.
        stored: whether large weights stay in their files, see `trtq.checkpoint.stored_models`.

    Raises:
        UsageError: the model is already quantised, or has no noise levels in closed form.
    """
    opened = open_artefact(model, verify=False)
    if opened.kind != "checkpoint":
        raise UsageError(
            f"{opened.place} is of kind {opened.kind!r}, which is already quantised; give a float "
            "checkpoint, or a run together with --lora to change its LoRAs"
        )
    source = open_pipeline(opened.place, opened.config, recorded=steps is None, stored=stored)
    if isinstance(source.denoiser, StandIn):
        raise UsageError(
            f"{source.name} is already quantised (its denoiser is a "
            f"{type(source.denoiser).__name__}); give the float pipeline"
        )
    if steps is not None:
        source.schedule(steps)
    if isinstance(opened.place, str | Path):
        return source
    # The caller's pipeline must not change, and its weights may be shared.
    pipeline = copy.copy(source.pipeline)
    for name, component in pipeline.components.items():
        changes = name == source.denoiser_name or (steps is None and name in DENOISERS)
        if changes or (copy_all and isinstance(component, nn.Module)):
            setattr(pipeline, name, copy.deepcopy(component))
    return LoadedPipeline(source.name, None, pipeline, source.denoiser_name, source.prompts)


def _modules(source: LoadedPipeline) -> dict[str, nn.Module]:
    """The components of a pipeline that have weights."""
    return {
        name: component
        for name, component in source.pipeline.components.items()
        if isinstance(component, nn.Module)
    }


def _with_defaults(recipe: Recipe, source: LoadedPipeline) -> Recipe:
    """The recipe with the guidance scale and the batch division that suit the model."""
    update: dict[str, Any] = {}
    if recipe.guidance is None:
        update["guidance"] = source.guidance
    if recipe.training is not None:
        parameters = sum(p.numel() for p in source.denoiser.parameters())
        update["training"] = recipe.training.divided(parameters)
    return recipe.model_copy(update=update)


def _choose_prompts(source: LoadedPipeline, recipe: Recipe) -> None:
    """Set the recipe's calibration prompts, and warn about prompts that are cut off.

    Raises:
        UsageError: the recipe has prompts, but the model does not accept prompts.
    """
    if recipe.prompts is not None:
        if source.prompts is None:
            raise UsageError(f"{source.name} accepts no prompts")
        lines = read_lines(Path(recipe.prompts))
        source.prompts = source.prompts.model_copy(update={"calibration": lines})
    if source.prompts is not None:
        warn_of_truncation(source.pipeline, source.prompts.calibration, "calibration prompts")


def _plan_layers(
    source: LoadedPipeline, recipe: Recipe, policy: Policy
) -> tuple[Sequence[LayerPlan], dict[str, LayerCall]]:
    """Choose the bits of every layer, and record the shapes and operations of its call.

    Raises:
        QuantizationError: no layer would be quantised.
    """
    probability_bits = recipe.attention.probability_bits
    layers: Sequence[LayerPlan] = plan_layers(
        source.denoiser,
        policy,
        recipe.precision,
        None if probability_bits == "float" else probability_bits,
        scales=recipe.scales,
        group=recipe.group,
    )
    if not any(plan.quantized for plan in layers):
        raise QuantizationError(
            f"zero layers of {type(source.denoiser).__name__} would be quantised: the policy for "
            f"{policy.family} matches none of its {len(layers)} layers"
        )
    calls = _probe(source, layers, recipe.steps)
    if recipe.calibration.share_inputs:
        layers = with_shared_inputs(layers, calls)
    return layers, calls


def _probe(source: LoadedPipeline, layers: Sequence[LayerPlan], steps: int) -> dict[str, LayerCall]:
    """The call of each layer during one call of the denoiser with its pipeline's own conditions.

    Raises:
        QuantizationError: the pipeline cannot be called, since its components do not fit each other.
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
    # torch and the pipeline raise these if, e.g., text encoder and denoiser have different widths.
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as err:
        raise QuantizationError(
            f"{source.name}: its {source.denoiser_name} cannot be called with what its pipeline "
            f"passes ({type(err).__name__}: {one_line(err)}); its components belong to different models"
        ) from err
