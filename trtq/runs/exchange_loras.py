"""Exchange of the LoRAs in a run's weights: tables are kept, codes recomputed, nothing is fine-tuned."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trtq.artefact.contents import changed_source_file
from trtq.artefact.folder import check_output, claims_output, new_artefact
from trtq.artefact.manifest_file import write_manifest
from trtq.artefact.opened import Opened, open_artefact
from trtq.artefact.options import LoraRecord
from trtq.calls.stored import CALL_FOLDER, load_call, save_call
from trtq.diffusion.folder import save_pipeline_parts
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.sampling import at_once, predict, seeded_noise, spread
from trtq.errors import ArtefactError, QuantizationError, UsageError
from trtq.lora import LoraRequest, merge_loras
from trtq.progress import ProgressCallback, silent
from trtq.quant import (
    LowBitTensors,
    ProductTensors,
    QuantizedDenoiser,
    Structure,
    apply_structure,
    convert,
    merge,
    scale_channels,
    transform_layer,
)
from trtq.resources import peak_rss_bytes
from trtq.runs.call_snr import KeptCall, calls_snr_db, keep_calls
from trtq.runs.folder import OpenRun, layer_plans, open_run
from trtq.runs.result import RunResult
from trtq.runs.trained import TRAINED_NAME, restore_trained, save_trained
from trtq.runs.weights import FILE_NAME, save_denoiser
from trtq.seeds import seeded_generator
from trtq.snr import snr_db
from trtq.torch_settings import with_own_settings

__all__ = ["requantize"]

_IMAGES = 16


def _float_source(run: OpenRun, model: str | Path | None) -> LoadedPipeline:
    """Load the float checkpoint that a run was made from.

    Raises:
        ArtefactError: the checkpoint was moved or changed, or the run's version is too old.
    """
    if not (run.folder / TRAINED_NAME).is_file():
        raise ArtefactError(
            f"{run.folder} holds no {TRAINED_NAME}; make it again with this version"
        )
    name = model or run.manifest.source.name
    try:
        source = open_pipeline(name, recorded=run.manifest.recorded is not None)
    except ArtefactError as err:
        raise ArtefactError(
            f"{run.folder} was made from {run.manifest.source.name!r}, whose float weights are "
            f"required: {err}. Give its path with --base"
        ) from err
    recorded = run.manifest.source.files
    changed = source.folder and changed_source_file(source.folder, recorded, all_there=False)
    if changed:
        raise ArtefactError(
            f"{name} is not the checkpoint that {run.folder} was made from (its files have changed: "
            f"{changed}); give the path of the original with --base, or quantise this checkpoint"
        )
    return source


@torch.no_grad()
def _snr(source: LoadedPipeline, denoiser: Any, teacher: Any, steps: int) -> float:
    """SNR in dB of low-bit predictions against float predictions, at points of a whole trajectory."""
    schedule = source.schedule(steps)
    images = at_once(source.sample_shape, _IMAGES)
    conditions = source.draw_conditions(images, seeded_generator(0, "requantize"))
    noise = seeded_noise(source.sample_shape, 0, 0, images)
    x, timestep = spread(teacher, schedule, noise, conditions)
    expected = predict(teacher, x, timestep, conditions)
    return snr_db(expected, predict(denoiser, x, timestep, conditions))


def _merge(
    source: LoadedPipeline, run: OpenRun, loras: Sequence[LoraRequest]
) -> list[dict[str, Any]]:
    """Merge LoRAs into a float checkpoint, in place, and return their rows of the manifest.

    Raises:
        UsageError: the run already has exactly these LoRAs.
        ArtefactError: a LoRA does not fit the checkpoint.
    """
    components = {
        name: component
        for name, component in source.pipeline.components.items()
        if isinstance(component, torch.nn.Module)
    }
    merged = [lora.as_dict() for lora in merge_loras(components, loras, source.denoiser_name)]

    present = {(lora.sha256, lora.scale) for lora in run.manifest.loras}
    if {(row["sha256"], row["scale"]) for row in merged} == present:
        names = ", ".join(f"{row['file']} at {row['scale']:g}" for row in merged)
        raise UsageError(f"{run.folder} has these LoRAs already merged: {names}; nothing to do")
    source.forget_prompts()
    return merged


def _quantize_again(source: LoadedPipeline, run: OpenRun) -> dict[str, QuantizedDenoiser]:
    """Quantise the denoisers of a float checkpoint with the run's layers, tables and trained tensors."""
    manifest = run.manifest
    training = manifest.recipe.training if manifest.recipe is not None else None
    denoisers = {}
    for index, part in enumerate(run.denoisers):
        row = manifest.denoisers[index] if manifest.denoisers else manifest
        module = getattr(source.pipeline, part.name)
        apply_structure(module, Structure(tuple(row.structure.attention), row.structure.splits))
        _transform_again(module, part.stored.layers)
        quantized = convert(
            module,
            layer_plans(row),
            part.table,
            rank=training.rank if training else 0,
            base=training.base if training else "fp",
            timestep=part.argument,
            per_item=part.per_item,
        )
        restore_trained(
            _place(run.folder, run, index) / TRAINED_NAME, quantized, part.stored.layers
        )
        denoisers[part.name] = quantized
    return denoisers


def _transform_again(module: torch.nn.Module, layers: Mapping[str, LowBitTensors]) -> None:
    """Apply the transforms of a run's layers to a float denoiser, in place.

    Raises:
        ArtefactError: a transform does not fit the denoiser.
    """
    # The quantisation scales the channels of attention first, see `trtq.runs.input_transforms`.
    transforms = sorted(
        ((name, layer) for name, layer in layers.items() if layer.transform is not None),
        key=lambda pair: not isinstance(pair[1], ProductTensors),
    )
    for name, layer in transforms:
        assert layer.transform is not None
        try:
            if isinstance(layer, ProductTensors):
                scale_channels(module, name, layer.transform)
            else:
                transform_layer(module.get_submodule(name), layer.transform)
        except QuantizationError as err:
            raise ArtefactError(f"the run does not fit its checkpoint: {err}") from err


def _place(folder: Path, run: OpenRun, index: int) -> Path:
    """The folder of a denoiser's tensors in a run."""
    return folder if index == 0 else folder / run.denoisers[index].name


def _keep_calls(source: LoadedPipeline, run: OpenRun) -> list[KeptCall]:
    """The calls of the float denoisers inside the recorded call of a run."""
    call = load_call(run.folder / CALL_FOLDER)
    return keep_calls(source.pipeline, [part.name for part in run.denoisers], call)


def _check_recorded(run: OpenRun) -> None:
    """Raise if a denoiser of a recorded run has tensors that its checkpoint does not hold.

    Raises:
        UsageError: a denoiser has an IP-Adapter.
    """
    if any(row.structure.ip_adapter for row in run.manifest.denoisers):
        raise UsageError(
            f"{run.folder} was made with an IP-Adapter, which its checkpoint does not hold; quantise "
            "the pipeline again with --lora"
        )


@claims_output
@with_own_settings
def requantize(
    artefact: str | Path | Opened,
    loras: Sequence[LoraRequest],
    out: str | Path,
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
    progress: ProgressCallback = silent,
) -> RunResult:
    """Make a run with exactly these LoRAs from a run with others or none.

    Args:
        artefact: the opened run, or its folder.
        loras: files and strengths; LoRAs of the run are dropped unless they are given again.
        out: folder of the new run.
        base: path of the float checkpoint, if it differs from the path in the run's manifest.
        overwrite: replace an existing run.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        Sizes, durations and SNR of the new run.

    Raises:
        UsageError: the run already has exactly these LoRAs.
        ArtefactError: a LoRA or the checkpoint does not fit the run.
    """
    start = time.monotonic()
    final = check_output(Path(out), overwrite=overwrite, source=artefact, kind="run")
    opened = open_artefact(artefact, verify=False)
    run = open_run(opened)
    manifest = run.manifest
    recorded = manifest.recorded is not None
    if recorded:
        _check_recorded(run)
    progress("merge LoRAs", 1, 3)
    source = _float_source(run, base)
    assert manifest.recipe is not None
    assert manifest.recipe.steps is not None
    steps = manifest.recipe.steps
    rows = [*manifest.layers, *(row for part in manifest.further for row in part.layers)]
    low_bit = sum(row.activation_bits is not None for row in rows)
    if recorded:
        built = {part.name: part.build() for part in run.denoisers}
        before = calls_snr_db(_keep_calls(source, run), built)
    else:
        before = _snr(source, run.denoiser(), source.denoiser, steps)
    merged = _merge(source, run, loras)
    progress("quantise", 2, 3)
    # Converting the float model changes it.
    kept = _keep_calls(source, run) if recorded else []
    quantized = _quantize_again(source, run)
    if recorded:
        after = calls_snr_db(kept, quantized)
    else:
        (student,) = quantized.values()
        after = _snr(source, student, student.teacher, steps)
    with new_artefact(final, kind="run", overwrite=overwrite) as folder:
        _write(folder, source, run, quantized)
        result = RunResult(
            layers_quantized=low_bit,
            layers_float=len(rows) - low_bit,
            bytes_before=manifest.metrics.bytes_before or 0,
            bytes_after=sum(path.stat().st_size for path in folder.rglob(FILE_NAME)),
            snr_db_before=before,
            snr_db_after=after,
            loras=merged,
            seconds=round(time.monotonic() - start, 2),
            peak_rss_bytes=peak_rss_bytes(),
        )
        update = {
            "loras": [LoraRecord(**row) for row in merged],
            "metrics": manifest.metrics.updated(result.to_json()),
        }
        write_manifest(folder, manifest.model_copy(update=update))
    progress("quantise", 3, 3)
    return result


def _write(
    folder: Path,
    source: LoadedPipeline,
    run: OpenRun,
    quantized: Mapping[str, QuantizedDenoiser],
) -> None:
    """Write everything of a run except its manifest."""
    for index, part in enumerate(run.denoisers):
        place = _place(folder, run, index)
        place.mkdir(exist_ok=True)
        save_denoiser(place / FILE_NAME, quantized[part.name], merge(quantized[part.name]))
        save_trained(place / TRAINED_NAME, quantized[part.name])
    if run.manifest.recorded is None:
        save_pipeline_parts(source, folder)
        return
    save_pipeline_parts(source, folder, denoisers=[part.name for part in run.denoisers])
    save_call(load_call(run.folder / CALL_FOLDER), folder / CALL_FOLDER)
