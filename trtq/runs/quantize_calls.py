"""Quantisation of every denoiser of a pipeline inside the pipeline's own call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_rows import FurtherRow, LayerRow, RecordedRow, SourceRow, StructureRow
from trtq.artefact.options import LoraRecord, Metrics, RecipeRecord
from trtq.calib.activation_tables import activation_tables
from trtq.calib.calibrators import range_data
from trtq.calib.record import Recording
from trtq.calib.record_calls import CalledDenoiser, record_calls
from trtq.calls.stored import CALL_FOLDER, save_call
from trtq.diffusion.folder import save_pipeline_parts
from trtq.errors import QuantizationError
from trtq.progress import ProgressCallback
from trtq.quant import LayerPlan, QuantizedDenoiser, convert, merge
from trtq.runs.plan_calls import CallsPlan, DenoiserPlan
from trtq.runs.result import RunResult
from trtq.runs.trained import TRAINED_NAME, save_trained
from trtq.runs.weights import FILE_NAME, save_denoiser
from trtq.seeds import seeded_generator

__all__ = ["calibrate", "converted", "layer_rows", "manifest_of", "write_run"]

_NOT_ALWAYS = "not called at every step"


def calibrate(
    plan: CallsPlan, progress: ProgressCallback
) -> tuple[list[DenoiserPlan], dict[str, dict[str, tuple[Tensor, Tensor]]]]:
    """Record the pipeline's calls and find the ranges of every activation quantiser.

    Args:
        plan: the plan.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        The plans, in which layers that are not called at every step stay in float, and `(scale[T],
        zero_point[T])` by denoiser and by path of the quantiser.

    Raises:
        QuantizationError: no layer is called at every step.
    """
    recipe = plan.recipe
    recordings = record_calls(
        plan.source.pipeline,
        [
            CalledDenoiser(
                part.name,
                part.module,
                part.plan.layers,
                part.plan.table,
                part.calls.argument,
            )
            for part in plan.denoisers
        ],
        plan.calls,
        plan.numbers,
        samples_per_step=recipe.calibration.samples_per_step,
        seed=recipe.seed,
        data=range_data(recipe.calibration.activations, static=recipe.tables == "static"),
        progress=lambda done, total: progress("calibrate", done, total),
    )
    parts, tables = [], {}
    for part in plan.denoisers:
        layers = [_called(layer, recordings[part.name]) for layer in part.plan.layers]
        if not any(layer.quantized for layer in layers):
            raise QuantizationError(f"no layer of {part.name} is called at every step")
        parts.append(replace(part, plan=replace(part.plan, layers=layers)))
        tables[part.name] = activation_tables(
            recordings[part.name],
            layers,
            recipe.calibration.activations,
            part.module,
            static=recipe.tables == "static",
            progress=lambda done, total: progress("find ranges", done, total),
        )
    return parts, tables


def _called(layer: LayerPlan, recordings: Mapping[str, Recording]) -> LayerPlan:
    """The plan of a layer; float unless every input was recorded at every step."""
    paths = [f"{layer.input_of or layer.name}.{operand}" for operand in layer.operands]
    if all(bool(torch.isfinite(recordings[path].low).all()) for path in paths):
        return layer
    return replace(
        layer,
        weight_bits=None,
        activation_bits=None,
        right_bits=None,
        input_of=None,
        adapters=False,
        format="int",
        group=None,
        reason=_NOT_ALWAYS,
    )


def converted(
    plan: CallsPlan,
    part: DenoiserPlan,
    tables: Mapping[str, tuple[Tensor, Tensor]],
) -> QuantizedDenoiser:
    """The quantised denoiser with its calibrated ranges; the float model is changed in place."""
    recipe, training = plan.recipe, plan.recipe.training
    quantized = convert(
        part.module,
        part.plan.layers,
        part.plan.table,
        rank=training.rank if training else 0,
        base=training.base if training else "fp",
        weight_method=recipe.calibration.weights,
        zero_point_mode=training.zero_points if training else "frozen",
        split_scale=training.split_scale if training else False,
        generator=seeded_generator(recipe.seed, "adapters"),
        timestep=part.calls.argument,
        per_item=False,
    )
    for path, quantizer in quantized.activations():
        quantizer.set_range(*tables[path])
    return quantized


def write_run(
    folder: Path,
    plan: CallsPlan,
    parts: Sequence[DenoiserPlan],
    quantized: Mapping[str, QuantizedDenoiser],
) -> None:
    """Write everything of a run except its manifest.

    Args:
        folder: new folder of the run.
        plan: the plan.
        parts: plans of the denoisers, the first one of the manifest first.
        quantized: quantised denoisers by name; their float weights are released.
    """
    for index, part in enumerate(parts):
        place = folder if index == 0 else folder / part.name
        place.mkdir(exist_ok=True)
        save_trained(place / TRAINED_NAME, quantized[part.name])
        tensors = merge(quantized[part.name], release=True)
        save_denoiser(place / FILE_NAME, quantized[part.name], tensors)
    save_pipeline_parts(plan.source, folder, denoisers=[part.name for part in parts])
    save_call(plan.call, folder / CALL_FOLDER)


def manifest_of(
    plan: CallsPlan,
    parts: Sequence[DenoiserPlan],
    files: dict[str, str],
    result: RunResult,
    model_classes: Mapping[str, str],
) -> Manifest:
    """The manifest of a run.

    Args:
        plan: the plan.
        parts: plans of the denoisers.
        files: SHA-256 of the checkpoint's files.
        result: sizes and durations.
        model_classes: class names of the denoisers by name.
    """
    rows = [_row(part, plan, model_classes[part.name]) for part in parts]
    first, *further = rows
    return Manifest(
        kind="run",
        source=SourceRow(name=plan.source.name, files=files),
        denoiser=first.denoiser,
        recipe=RecipeRecord(**plan.recipe.model_dump(mode="json")),
        timesteps=first.timesteps,
        layers=first.layers,
        structure=first.structure,
        recorded=first.recorded,
        further=further,
        loras=[LoraRecord(**lora.as_dict()) for lora in plan.loras],
        metrics=Metrics(**result.to_json()),
    )


def _row(part: DenoiserPlan, plan: CallsPlan, model_class: str) -> FurtherRow:
    structure = part.plan.structure
    return FurtherRow(
        denoiser=part.name,
        timesteps=part.plan.table.timesteps.tolist(),
        layers=layer_rows(part.plan.layers, adapters=plan.recipe.training is not None),
        structure=StructureRow(
            attention=list(structure.attention),
            splits=dict(structure.splits),
            ip_adapter=dict(part.ip_adapter),
            ip_adapter_scales=dict(part.ip_adapter_scales),
        ),
        recorded=RecordedRow(
            timestep=part.calls.argument, calls=len(part.calls.timesteps), model=model_class
        ),
    )


def layer_rows(layers: Sequence[LayerPlan], *, adapters: bool) -> list[LayerRow]:
    """Rows of the manifest for planned layers.

    Args:
        layers: the plans.
        adapters: whether the fine-tuning used adapters.
    """
    return [
        LayerRow(
            name=layer.name,
            kind=layer.kind,
            weight_bits=layer.weight_bits,
            activation_bits=layer.activation_bits,
            right_bits=layer.right_bits,
            adapters=layer.adapters and adapters,
            reason=layer.reason,
            input_of=layer.input_of,
            smooth=layer.smooth,
            rotate=layer.rotate,
            scales=layer.scales,
            outlier_ratio=layer.outlier_ratio,
            format=layer.format,
            group=layer.group,
        )
        for layer in layers
    ]
