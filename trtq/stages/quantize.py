"""Checkpoint to run: calibrate, fine-tune, merge, pack."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trtq.calib.policy import load_policy, plan_layers
from trtq.calib.recipe import Recipe, load_recipe
from trtq.calib.record import activation_tables, record
from trtq.diffusion.schedule import NoiseSchedule
from trtq.diffusion.source import Source, load_source
from trtq.errors import QuantizationError
from trtq.manifest import (
    CHECKPOINTS,
    LayerRow,
    Manifest,
    SourceRow,
    StructureRow,
    check_output,
    file_hashes,
    new_artefact,
    partial_folder,
    write_manifest,
)
from trtq.progress import Reporter, silent
from trtq.quant import (
    LayerPlan,
    QuantizedDenoiser,
    Structure,
    TimestepTable,
    apply_structure,
    attention_modules,
    convert,
    merge,
    skip_splits,
)
from trtq.quant.storage import FILE_NAME, save_denoiser
from trtq.resources import peak_rss_bytes
from trtq.seeds import seeded_generator
from trtq.stages.pipeline_folder import save_pipeline_parts

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["QuantizePlan", "describe_plan", "plan_quantize", "quantize"]


@dataclass(frozen=True)
class QuantizePlan:
    """What a quantisation will do, before any long work.

    Attributes:
        source: the loaded checkpoint.
        recipe: what to make of it.
        layers: one plan per linear, convolution and spelled-out product.
        table: the calibrated timesteps.
        structure: what was brought into another form; the source's denoiser is in it already.
    """

    source: Source
    recipe: Recipe
    layers: Sequence[LayerPlan]
    table: TimestepTable
    structure: Structure

    @property
    def quantized(self) -> int:
        """Number of layers that become low-bit."""
        return sum(plan.quantized for plan in self.layers)

    def bytes_before(self) -> int:
        """Size of the denoiser's parameters in float32."""
        return 4 * sum(p.numel() for p in self.source.denoiser.parameters())

    def bytes_after(self) -> int:
        """Size of the packed integers, weight scales and tables, and of the rest in half precision."""
        modules = dict(self.source.denoiser.named_modules())
        inside = total = 0
        for plan in self.layers:
            total += len(plan.operands) * len(self.table) * 12
            if plan.weight_bits is None:
                continue
            weight: Any = modules[plan.name].weight
            inside += weight.numel()
            channels = len(weight)
            total += -(-channels * plan.weight_bits // 8) * (weight.numel() // channels)
            total += channels * 6
        rest = sum(p.numel() for p in self.source.denoiser.parameters()) - inside
        return total + 2 * rest


def plan_quantize(model: str | Path | Any, recipe: Recipe) -> QuantizePlan:
    """Load the checkpoint and decide about every layer.

    Raises:
        ArtefactError: the checkpoint cannot be read.
        QuantizationError: no layer would be quantised.
    """
    source = load_source(model)
    policy = load_policy(
        type(source.denoiser).__name__, Path(recipe.policy) if recipe.policy else None
    )
    structure = Structure(
        tuple(attention_modules(source.denoiser)) if recipe.attention.quantize else (),
        skip_splits(source.denoiser) if recipe.split_skips else {},
    )
    apply_structure(source.denoiser, structure)
    layers = plan_layers(source.denoiser, policy, recipe.bits, recipe.attention.probability_bits)
    if not any(plan.quantized for plan in layers):
        raise QuantizationError(
            f"zero layers of {type(source.denoiser).__name__} would be quantised: the policy for "
            f"{policy.family} matches none of its {len(layers)} layers"
        )
    timesteps = source.timesteps(recipe.steps)
    if recipe.tables == "static":
        timesteps = timesteps[len(timesteps) // 2 :][:1]
    return QuantizePlan(source, recipe, layers, TimestepTable(timesteps), structure)


def describe_plan(plan: QuantizePlan) -> dict[str, Any]:
    """What `--dry-run` says: layers by precision, sizes, steps and tunable parameters."""
    modules = dict(plan.source.denoiser.named_modules())
    training = plan.recipe.training
    adapters = 0
    for layer in plan.layers:
        if training is not None and layer.weight_bits is not None and layer.adapters:
            weight: Any = modules[layer.name].weight
            adapters += training.rank * (len(weight) + weight[0].numel())
    precisions = Counter(layer.precision for layer in plan.layers)
    return {
        "model": plan.source.name,
        "denoiser": type(plan.source.denoiser).__name__,
        "method": plan.recipe.method,
        "layers_quantized": plan.quantized,
        "layers_float": len(plan.layers) - plan.quantized,
        "precisions": dict(precisions),
        "float": [layer.name for layer in plan.layers if not layer.quantized],
        "timesteps": len(plan.table),
        "bytes_before": plan.bytes_before(),
        "bytes_after": plan.bytes_after(),
        "iterations": training.iterations if training else 0,
        "adapter_parameters": adapters,
    }


def _as_recipe(recipe: Recipe | str | Path | dict[str, Any] | None) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is None or isinstance(recipe, dict):
        return load_recipe(None, recipe)
    if str(recipe).endswith(".toml"):
        return load_recipe(Path(recipe))
    return load_recipe(None, {"method": str(recipe)})


def _calibrate(
    plan: QuantizePlan, schedule: NoiseSchedule, report: Reporter
) -> dict[str, tuple[Tensor, Tensor]]:
    recipe, source = plan.recipe, plan.source
    recordings = record(
        source.denoiser,
        plan.layers,
        schedule,
        TimestepTable(schedule.timesteps.tolist()),
        source.draw_conditions(
            recipe.calibration.images, seeded_generator(recipe.seed, "calibration conditions")
        ),
        source.sample_shape,
        images=recipe.calibration.images,
        batch=recipe.calibration.batch,
        samples_per_step=recipe.calibration.samples_per_step,
        seed=recipe.seed,
        guidance=recipe.guidance,
        progress=lambda done, total: report("calibrate", done, total),
    )
    return activation_tables(
        recordings,
        plan.layers,
        recipe.calibration.activations,
        static=recipe.tables == "static",
        progress=lambda done, total: report("find ranges", done, total),
    )


def _fingerprint(plan: QuantizePlan, files: dict[str, str]) -> str:
    parts = [plan.recipe.model_dump_json(), json.dumps(files, sort_keys=True)]
    parts += [repr(layer) for layer in plan.layers]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _fine_tune(
    plan: QuantizePlan,
    quantized: QuantizedDenoiser,
    schedule: NoiseSchedule,
    accelerator: Accelerator,
    checkpoints: Path,
    fingerprint: str,
    resume: bool,
    report: Reporter,
) -> dict[str, Any]:
    from trtq.train.efficientdm import EfficientDM, Rates
    from trtq.train.loop import fit

    recipe = plan.recipe
    training = recipe.training
    assert training is not None
    objective = EfficientDM(
        quantized,
        schedule,
        plan.source.sample_shape,
        plan.source.draw_conditions,
        Rates(
            lora=2 * training.lora_travel / training.iterations,
            weight_scale=training.weight_scale_lr,
            activation=training.activation_lr,
            activation_relative=training.activation_lr_relative,
        ),
        batch=training.batch,
        slots=training.accumulate,
        stream=accelerator.process_index,
        stride=accelerator.num_processes,
        seed=recipe.seed,
        guidance=recipe.guidance,
        eta=training.eta,
        staggered=training.trajectory == "staggered",
    )
    result = fit(
        quantized,
        objective,
        iterations=training.iterations,
        accumulate=training.accumulate,
        weight_decay=training.weight_decay,
        accelerator=accelerator,
        checkpoints=checkpoints,
        checkpoint_every=training.checkpoint_every,
        fingerprint=fingerprint,
        resume=resume,
        progress=lambda done, total: report("fine-tune", done, total),
    )
    return {
        "fine_tune_seconds": round(result.seconds, 2),
        "fine_tune_iterations": result.iterations,
        "loss_first": result.loss_first,
        "loss_last": result.loss_last,
    }


def _zero_point_note(plan: QuantizePlan) -> dict[str, Any]:
    if plan.recipe.training is not None and plan.recipe.training.zero_points == "float":
        return {"zero_points_rounded_after_training": True}
    return {}


def quantize(
    pipeline_or_path: str | Path | Any,
    recipe: Recipe | str | Path | dict[str, Any] | None = None,
    out: str | Path = "run",
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Reporter = silent,
) -> dict[str, Any]:
    """Make a low-bit run of a diffusers checkpoint.

    Under `accelerate launch` every process calibrates alike, the fine-tuning is shared, and the first
    process writes.

    Args:
        pipeline_or_path: a diffusers folder, a shipped model's name, a hub id or a pipeline object.
        recipe: a `Recipe`, the name of a method, a TOML file, or a dict of overrides.
        out: folder of the run.
        resume: go on from the newest checkpoint of an interrupted run.
        overwrite: replace a run that is already there.
        report: called as work goes on.

    Returns:
        `seconds`, `peak_rss_bytes`, `layers_quantized`, `layers_float`, `bytes_before`,
        `bytes_after`, and what fine-tuning measured.

    Raises:
        TrtqError: see `trtq.errors`; nothing half-written is left under `out`.
    """
    start = time.monotonic()
    final = Path(out)
    chosen = _as_recipe(recipe)
    check_output(final, overwrite=overwrite)
    if not resume:
        shutil.rmtree(partial_folder(final) / CHECKPOINTS, ignore_errors=True)
    plan = plan_quantize(pipeline_or_path, chosen)
    source = plan.source
    files = file_hashes(source.folder) if source.folder is not None else {}
    bytes_before = plan.bytes_before()
    schedule = NoiseSchedule.of(source.pipeline.scheduler, chosen.steps)
    accelerator = _accelerator(chosen)
    main = accelerator is None or accelerator.is_main_process
    tables = _calibrate(plan, schedule, report)
    training = chosen.training
    quantized = convert(
        source.denoiser,
        plan.layers,
        plan.table,
        rank=training.rank if training else 0,
        base=training.base if training else "fp",
        weight_method=chosen.calibration.weights,
        zero_point_mode=training.zero_points if training else "frozen",
        split_step=training.split_step if training else False,
        generator=seeded_generator(chosen.seed, "adapters"),
    )
    for path, quantizer in quantized.activations():
        quantizer.set_range(*tables[path])
    writing = None
    if main:
        writing = new_artefact(final, overwrite=overwrite, keep_partial=training is not None)
    with writing or nullcontext(partial_folder(final)) as folder:
        metrics: dict[str, Any] = {}
        if accelerator is not None:
            metrics = _fine_tune(
                plan,
                quantized,
                schedule,
                accelerator,
                folder / CHECKPOINTS,
                _fingerprint(plan, files),
                resume,
                report,
            )
        if main:
            save_denoiser(folder / FILE_NAME, quantized, merge(quantized))
            save_pipeline_parts(source, folder)
            metrics |= _zero_point_note(plan) | {
                "layers_quantized": plan.quantized,
                "layers_float": len(plan.layers) - plan.quantized,
                "bytes_before": bytes_before,
                "bytes_after": (folder / FILE_NAME).stat().st_size,
                "seconds": round(time.monotonic() - start, 2),
                "peak_rss_bytes": peak_rss_bytes(),
            }
            write_manifest(folder, _manifest(plan, files, metrics))
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return metrics


def _accelerator(recipe: Recipe) -> Accelerator | None:
    """Accelerate's, when there is something to train."""
    if recipe.training is None:
        return None
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # accelerate keeps its settings for the life of the process; a second call may want others.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision=recipe.training.mixed_precision
    )


def _manifest(plan: QuantizePlan, files: dict[str, str], metrics: dict[str, Any]) -> Manifest:
    return Manifest(
        kind="run",
        source=SourceRow(name=plan.source.name, files=files),
        denoiser=plan.source.denoiser_name,
        recipe=plan.recipe.model_dump(mode="json"),
        timesteps=plan.table.timesteps.tolist(),
        layers=[
            LayerRow(
                name=layer.name,
                kind=layer.kind,
                weight_bits=layer.weight_bits,
                activation_bits=layer.activation_bits,
                right_bits=layer.right_bits,
                reason=layer.reason,
            )
            for layer in plan.layers
        ],
        structure=StructureRow(
            attention=list(plan.structure.attention), splits=dict(plan.structure.splits)
        ),
        metrics=metrics,
    )
