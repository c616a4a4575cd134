"""A run that is calibrated and fine-tuned inside the pipeline's own call."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trtq.artefact.folder import new_artefact
from trtq.artefact.listing import CHECKPOINTS
from trtq.artefact.manifest_file import write_manifest
from trtq.artefact.partial import partial_folder
from trtq.calib.recipe import Recipe
from trtq.calls.form import flatten_value
from trtq.calls.user_call import UserCall
from trtq.lora import LoraRequest
from trtq.progress import ProgressCallback, silent
from trtq.quant import QuantizedDenoiser
from trtq.resources import peak_rss_bytes
from trtq.runs.fine_tune import FineTuneResult, accelerator_for
from trtq.runs.fine_tune_calls import CalledTuning, fine_tune_calls
from trtq.runs.input_transforms import scales_attention, with_transforms_of_calls
from trtq.runs.plan_calls import CallsPlan, DenoiserPlan, plan_calls
from trtq.runs.preparation import clear_partial, source_files
from trtq.runs.quantize_calls import calibrate, converted, manifest_of, write_run
from trtq.runs.result import RunResult
from trtq.runs.weights import FILE_NAME

__all__ = ["quantize_calls"]


def quantize_calls(
    model: Any,
    recipe: Recipe,
    final: Path,
    calls: Sequence[Mapping[str, Any]],
    loras: Sequence[LoraRequest],
    *,
    inputs: Mapping[str, Any] | None,
    stored: bool,
    resume: bool,
    overwrite: bool,
    progress: ProgressCallback,
    start: float,
) -> RunResult | None:
    """Make a run inside the pipeline's own call; see `trtq.runs.quantize.quantize`.

    Args:
        model: a checkpoint.
        recipe: the recipe.
        final: folder of the run.
        calls: arguments of the user's calls of the pipeline; none: a default call.
        loras: LoRAs to merge into the float weights first.
        inputs: further arguments of every call.
        stored: whether large weights stay in their files, see `trtq.runs.memory`.
        resume: continue from the newest checkpoint of an interrupted run.
        overwrite: replace an existing run.
        progress: callback that receives the stage's name, the work done and the total.
        start: time of the start by `time.monotonic`, in seconds.

    Raises:
        TrtqError: see `trtq.errors`; no partial result is left at `final`.
    """
    plan = plan_calls(model, recipe, calls, loras, inputs, stored=stored, progress=progress)
    model_classes = {part.name: type(part.module).__name__ for part in plan.denoisers}
    files = source_files(plan.source)
    bytes_before = sum(part.plan.bytes_before() for part in plan.denoisers)
    accelerator = accelerator_for(plan.recipe)
    if not accelerator.is_main_process:
        _share(plan, files, accelerator, partial_folder(final), resume, silent)
        return None
    clear_partial(final, resume=resume, overwrite=overwrite)
    keep = plan.recipe.training is not None
    with new_artefact(final, kind="run", overwrite=overwrite, keep_partial=keep) as folder:
        parts, quantized, tuning = _share(plan, files, accelerator, folder, resume, progress)
        write_run(folder, plan, parts, quantized)
        low_bit = sum(part.plan.quantized for part in parts)
        training = plan.recipe.training
        result = RunResult(
            **({} if tuning is None else dict(tuning)),
            zero_points_rounded_after_training=(
                True if training is not None and training.zero_points == "float" else None
            ),
            calibration_images=plan.recipe.calibration.images,
            layers_quantized=low_bit,
            layers_float=sum(len(part.plan.layers) for part in parts) - low_bit,
            bytes_before=bytes_before,
            bytes_after=sum(path.stat().st_size for path in folder.rglob(FILE_NAME)),
            seconds=round(time.monotonic() - start, 2),
            peak_rss_bytes=peak_rss_bytes(),
        )
        write_manifest(folder, manifest_of(plan, parts, files, result, model_classes))
    return result


def _share(
    plan: CallsPlan,
    files: Mapping[str, str],
    accelerator: Any,
    folder: Path,
    resume: bool,
    progress: ProgressCallback,
) -> tuple[Sequence[DenoiserPlan], dict[str, QuantizedDenoiser], FineTuneResult | None]:
    """Calibrate, convert and fine-tune: the part that every process runs.

    Returns:
        The plans and the quantised denoisers, on the CPU, and the measurements of the fine-tuning
        (None without one).
    """
    fingerprint = _fingerprint(plan, files)
    plan = with_transforms_of_calls(plan, progress)
    parts, tables = calibrate(plan, progress)
    quantized = {part.name: converted(plan, part, tables[part.name]) for part in parts}
    if plan.recipe.training is None:
        return parts, quantized, None
    pipeline, moved = plan.source.pipeline, accelerator.device.type != "cpu"
    if moved:
        pipeline.to(accelerator.device)
    tuning = fine_tune_calls(
        CalledTuning(
            plan,
            parts,
            quantized,
            accelerator,
            folder / CHECKPOINTS,
            fingerprint,
            resume,
            progress,
        )
    )
    if moved:
        pipeline.to("cpu")
    return parts, quantized, tuning


def _fingerprint(plan: CallsPlan, files: Mapping[str, str]) -> str:
    """Hash of model, calls and recipe, which the checkpoints of a run record."""
    # Checkpoints of earlier versions were made without this section.
    recipe = plan.recipe.model_dump_json().replace(',"blockwise":null', "")
    digest = hashlib.sha256(recipe.encode())
    digest.update(json.dumps(dict(files), sort_keys=True).encode())
    for part in plan.denoisers:
        digest.update("\n".join(repr(layer) for layer in part.plan.layers).encode())
        if scales_attention(plan.recipe, part.plan.layers):
            digest.update(b"scaled attention")
    for lora in plan.loras:
        digest.update(repr(lora).encode())
    for call in plan.calls:
        _add_call(digest, call)
    return digest.hexdigest()


def _add_call(digest: Any, call: UserCall) -> None:
    """Add the arguments of a call to a hash, with the contents of tensors and images."""
    tensors: dict[str, Any] = {}
    objects: dict[str, Any] = {}
    for name in sorted(call.arguments):
        entry = flatten_value(call.arguments[name], name, tensors, objects)
        digest.update(json.dumps([name, entry], sort_keys=True).encode())
    for value in tensors.values():
        assert isinstance(value, Tensor)
        digest.update(
            value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        )
    for text, value in objects.items():
        digest.update(text.encode())
        if hasattr(value, "tobytes"):
            # The pixels of an image.
            digest.update(np.asarray(value).tobytes())
