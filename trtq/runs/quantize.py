"""Quantisation of a checkpoint to a run: calibrate, fine-tune, merge, pack."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtq.artefact.folder import check_output, claims_output, new_artefact
from trtq.artefact.listing import CHECKPOINTS
from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_file import write_manifest
from trtq.artefact.manifest_rows import SourceRow, StructureRow
from trtq.artefact.opened import Opened, open_artefact
from trtq.artefact.options import LoraRecord, Metrics, RecipeRecord
from trtq.artefact.partial import partial_folder
from trtq.calib.activation_tables import activation_tables
from trtq.calib.calibrators import range_data
from trtq.calib.recipe import Recipe, load_recipe
from trtq.calib.record import record
from trtq.diffusion.folder import save_pipeline_parts
from trtq.diffusion.sampling import at_once
from trtq.diffusion.schedule import NoiseSchedule
from trtq.lora import LoraRequest
from trtq.progress import ProgressCallback, silent
from trtq.quant import (
    QuantizedDenoiser,
    TimestepTable,
    convert,
    merge,
)
from trtq.resources import peak_rss_bytes
from trtq.runs.call_runs import quantize_calls
from trtq.runs.fine_tune import FineTuneResult, accelerator_for, fine_tune
from trtq.runs.fine_tune_stage import FineTuning
from trtq.runs.given_calls import runs_in_call
from trtq.runs.input_transforms import scales_attention, with_transforms
from trtq.runs.memory import parse_memory, stores_weights
from trtq.runs.plan import QuantizePlan, plan_quantize
from trtq.runs.preparation import clear_partial, source_files
from trtq.runs.quantize_calls import layer_rows
from trtq.runs.result import RunResult
from trtq.runs.scheduled_points import scheduled_points
from trtq.runs.trained import TRAINED_NAME, save_trained
from trtq.runs.weights import FILE_NAME, save_denoiser
from trtq.seeds import seeded_generator
from trtq.torch_settings import with_own_settings

__all__ = ["quantize"]


def _as_recipe(recipe: Recipe | str | Path | dict[str, Any] | None) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is None or isinstance(recipe, dict):
        return load_recipe(None, recipe)
    if str(recipe).endswith(".toml"):
        return load_recipe(Path(recipe))
    return load_recipe(None, {"method": str(recipe)})


def _calibrate(
    plan: QuantizePlan, schedule: NoiseSchedule, device: torch.device, progress: ProgressCallback
) -> dict[str, tuple[Tensor, Tensor]]:
    recipe, source = plan.recipe, plan.source
    images = recipe.calibration.images
    assert images is not None
    assert recipe.guidance is not None
    table = TimestepTable(schedule.timesteps.tolist())
    recordings = record(
        source.denoiser,
        plan.layers,
        schedule,
        table,
        source.draw_conditions(images, seeded_generator(recipe.seed, "calibration conditions")),
        source.sample_shape,
        images=images,
        batch=at_once(source.sample_shape, recipe.calibration.batch),
        samples_per_step=recipe.calibration.samples_per_step,
        seed=recipe.seed,
        guidance=recipe.guidance,
        device=device,
        data=range_data(recipe.calibration.activations, static=recipe.tables == "static"),
        progress=lambda done, total: progress("calibrate", done, total),
    )
    return activation_tables(
        recordings,
        plan.layers,
        recipe.calibration.activations,
        source.denoiser,
        static=recipe.tables == "static",
        progress=lambda done, total: progress("find ranges", done, total),
    )


def _fingerprint(plan: QuantizePlan, files: dict[str, str]) -> str:
    """Hash of model and recipe, which the checkpoints of a run record."""
    # Checkpoints of earlier versions were made with the former name, and without this section.
    recipe = plan.recipe.model_dump_json().replace('"split_scale":', '"split_step":')
    recipe = recipe.replace(',"blockwise":null', "")
    parts = [recipe, json.dumps(files, sort_keys=True)]
    parts += [repr(layer) for layer in plan.layers]
    parts += [repr(lora) for lora in plan.loras]
    if scales_attention(plan.recipe, plan.layers):
        parts.append("scaled attention")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _result(
    plan: QuantizePlan,
    tuning: FineTuneResult | None,
    bytes_before: int,
    folder: Path,
    start: float,
) -> RunResult:
    return RunResult(
        **({} if tuning is None else dict(tuning)),
        zero_points_rounded_after_training=_rounds_zero_points(plan) or None,
        calibration_images=plan.recipe.calibration.images,
        layers_quantized=plan.quantized,
        layers_float=len(plan.layers) - plan.quantized,
        bytes_before=bytes_before,
        bytes_after=(folder / FILE_NAME).stat().st_size,
        seconds=round(time.monotonic() - start, 2),
        peak_rss_bytes=peak_rss_bytes(),
    )


def _rounds_zero_points(plan: QuantizePlan) -> bool:
    """Whether zero points are trained as float numbers and rounded afterwards."""
    return plan.recipe.training is not None and plan.recipe.training.zero_points == "float"


@claims_output
@with_own_settings
def quantize(
    model: str | Path | Opened | Any,
    recipe: Recipe | str | Path | dict[str, Any] | None = None,
    out: str | Path = "run",
    *,
    loras: Sequence[LoraRequest] = (),
    calls: Sequence[Mapping[str, Any]] | None = None,
    inputs: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    memory: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: ProgressCallback = silent,
) -> RunResult | None:
    """Make a low-bit run of a diffusers checkpoint.

    Under `accelerate launch` every process calibrates alike, the fine-tuning is shared, and the first
    process writes.

    Args:
        model: a diffusers folder, the name of a shipped model, a hub id, a pipeline object, or one of
            them opened.
        recipe: a `Recipe`, the name of a method, a TOML file, or a dict of overrides.
        out: folder of the run.
        loras: LoRAs to merge into the float weights first.
        calls: arguments of the pipeline's call, one dict per call, without `generator`. The model is
            calibrated inside these calls, with other seeds and prompts; everything else stays as given.
            None: the trajectories of a pipeline whose noise levels are known in closed form, or a
            default call of any other pipeline.
        inputs: further arguments of every call, e.g. pictures; without `calls`, of a default call.
        config: diffusers folder or hub id with the configuration of a model in a single file.
        memory: memory to use, e.g. `24GB`. If the weights in float32 take more than half of it, layers
            read them from the checkpoint's files when they need them, and the calibration runs inside
            the pipeline's own call; fine-tuning then needs the section `blockwise` of the recipe.
            None: only if the weights take more than 80 % of the available memory.
        resume: continue from the newest checkpoint of an interrupted run.
        overwrite: replace an existing run.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        Sizes, durations and the measurements of the fine-tuning; None in all processes of `accelerate
        launch` except the first.

    Raises:
        TrtqError: see `trtq.errors`; no partial result is left at `out`.
    """
    start = time.monotonic()
    final = check_output(Path(out), overwrite=overwrite, source=model, kind="run")
    chosen = _as_recipe(recipe)
    if config is not None:
        model = open_artefact(model, verify=False, config=config)
    limit = None if memory is None else parse_memory(memory)
    stored = stores_weights(model, chosen, limit)
    if runs_in_call(model, calls, inputs, stored=stored):
        return quantize_calls(
            model,
            chosen,
            final,
            calls or (),
            loras,
            inputs=inputs,
            stored=stored,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            start=start,
        )
    plan = plan_quantize(model, chosen, loras, progress)
    chosen = plan.recipe
    files = source_files(plan.source)
    accelerator = accelerator_for(chosen)
    if not accelerator.is_main_process:
        _share(plan, files, accelerator, partial_folder(final), resume, silent)
        return None
    clear_partial(final, resume=resume, overwrite=overwrite)
    keep = chosen.training is not None
    with new_artefact(final, kind="run", overwrite=overwrite, keep_partial=keep) as folder:
        bytes_before = plan.bytes_before()
        plan, quantized, tuning = _share(plan, files, accelerator, folder, resume, progress)
        save_trained(folder / TRAINED_NAME, quantized)
        save_denoiser(folder / FILE_NAME, quantized, merge(quantized, release=True))
        save_pipeline_parts(plan.source, folder)
        result = _result(plan, tuning, bytes_before, folder, start)
        write_manifest(folder, _manifest(plan, files, result))
    return result


def _share(
    plan: QuantizePlan,
    files: dict[str, str],
    accelerator: Any,
    folder: Path,
    resume: bool,
    progress: ProgressCallback,
) -> tuple[QuantizePlan, QuantizedDenoiser, FineTuneResult | None]:
    """Choose transforms, calibrate, convert and fine-tune: the part that every process runs.

    Returns:
        The plan with the transforms; the quantised denoiser, on the CPU; the measurements of the
        fine-tuning (None without one).
    """
    recipe, source = plan.recipe, plan.source
    schedule = source.schedule(recipe.steps)
    fingerprint = _fingerprint(plan, files)
    source.denoiser.to(accelerator.device)
    plan = with_transforms(plan, schedule, accelerator.device, progress)
    tables = _calibrate(plan, schedule, accelerator.device, progress)
    training = recipe.training
    quantized = convert(
        source.denoiser,
        plan.layers,
        plan.table,
        rank=training.rank if training else 0,
        base=training.base if training else "fp",
        weight_method=recipe.calibration.weights,
        zero_point_mode=training.zero_points if training else "frozen",
        split_scale=training.split_scale if training else False,
        generator=seeded_generator(recipe.seed, "adapters"),
    )
    for path, quantizer in quantized.activations():
        quantizer.set_range(*tables[path])
    tuning = None
    if training is not None:
        quantized.to(accelerator.device)
        setup = FineTuning(
            quantized,
            scheduled_points(
                quantized.teacher,
                schedule,
                source.sample_shape,
                source.draw_conditions,
                recipe,
                accelerator,
            ),
            plan.policy,
            accelerator,
            folder / CHECKPOINTS,
            fingerprint,
            resume,
            progress,
        )
        tuning = fine_tune(setup, recipe)
    return plan, quantized.cpu(), tuning


def _manifest(plan: QuantizePlan, files: dict[str, str], result: RunResult) -> Manifest:
    return Manifest(
        kind="run",
        source=SourceRow(name=plan.source.name, files=files),
        denoiser=plan.source.denoiser_name,
        recipe=RecipeRecord(**plan.recipe.model_dump(mode="json")),
        timesteps=plan.table.timesteps.tolist(),
        layers=layer_rows(plan.layers, adapters=plan.recipe.training is not None),
        structure=StructureRow(
            attention=list(plan.structure.attention), splits=dict(plan.structure.splits)
        ),
        loras=[LoraRecord(**lora.as_dict()) for lora in plan.loras],
        metrics=Metrics(**result.to_json()),
    )
