"""Export of a run or checkpoint to ONNX, and comparison of the graph with torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

from torch import nn

from trtq.artefact.contents import source_hashes
from trtq.artefact.folder import check_output, claims_output, new_artefact
from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_file import made_from, write_manifest
from trtq.artefact.manifest_rows import SourceRow
from trtq.artefact.opened import (
    DEFAULT_STEPS,
    Checkpoint,
    Opened,
    open_artefact,
)
from trtq.artefact.options import ExportOptions, Metrics
from trtq.checkpoint.layout import parse_sizes
from trtq.diffusion.folder import save_pipeline_parts
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.documents import shown
from trtq.engine.prepared import keep_prepared
from trtq.errors import GateError, UsageError
from trtq.exporter.comfy import export_comfy
from trtq.exporter.component_graphs import export_components
from trtq.exporter.component_worker import Parts, exporting_parts
from trtq.exporter.export_calls import export_calls, float_rows
from trtq.exporter.graph import TARGETS, Target, write_graph
from trtq.exporter.memory import keeps_packed
from trtq.exporter.result import ComfyResult, ExportResult
from trtq.exporter.step_check import PARITY_DB, step_parities
from trtq.graph.file import MODEL_FILE
from trtq.limits import MAX_BATCH, parse_whole
from trtq.pipelines.called import is_called
from trtq.progress import ProgressCallback, silent
from trtq.resources import peak_rss_bytes, return_freed_memory
from trtq.runs.folder import OpenRun, open_run
from trtq.runs.memory import parse_memory
from trtq.torch_settings import with_own_settings

__all__ = ["PARITY_DB", "export", "parse_batch"]


_SERVED_WITHOUT_TORCH = ("UNet2DModel",)
"""Models that a server opens without torch, whose graphs are prepared for the runtimes at export."""


def parse_batch(text: str) -> tuple[int, int]:
    """Parse a range of batch sizes: `1:8` -> (1, 8); `4` -> (4, 4).

    Returns:
        Minimum and maximum batch size.

    Raises:
        UsageError: the text is not a range of batch sizes.
    """
    low, _, high = text.partition(":")
    try:
        bounds = parse_whole(low), parse_whole(high or low)
    except ValueError:
        bounds = 0, 0
    if not 1 <= bounds[0] <= bounds[1] <= MAX_BATCH:
        raise UsageError(
            f"--batch-range {shown(text)} is not a range; "
            f"write MIN:MAX, each in 1 .. {MAX_BATCH}, e.g. 1:8"
        )
    return bounds


@overload
def export(  # type: ignore[overload-overlap]
    artefact: str | Path | Opened,
    out: str | Path,
    *,
    target: Literal["comfy"],
    precision: str = "fp32",
    memory: str | None = None,
    overwrite: bool = False,
    progress: ProgressCallback = silent,
) -> ComfyResult: ...
@overload
def export(
    artefact: str | Path | Opened,
    out: str | Path,
    *,
    target: str = "qdq",
    precision: str = "fp32",
    batch: tuple[int, int] = (1, 8),
    size: str | None = None,
    call: Mapping[str, Any] | None = None,
    memory: str | None = None,
    overwrite: bool = False,
    progress: ProgressCallback = silent,
) -> ExportResult: ...
@claims_output
@with_own_settings
def export(
    artefact: str | Path | Opened,
    out: str | Path,
    *,
    target: str = "qdq",
    precision: str = "fp32",
    batch: tuple[int, int] = (1, 8),
    size: str | None = None,
    call: Mapping[str, Any] | None = None,
    memory: str | None = None,
    overwrite: bool = False,
    progress: ProgressCallback = silent,
) -> ExportResult | ComfyResult:
    """Write the ONNX folder of a run, or of a plain checkpoint as the float baseline.

    The graph of the denoiser has diffusers' inputs and accepts one timestep per batch item, or one for
    all items. After writing, torch and onnxruntime are compared, see
    `trtq.exporter.step_check.step_parities`.

    Args:
        artefact: a run, a diffusers folder, the name of a shipped model or a hub id, or one of them
            opened.
        out: the ONNX folder, in the pipeline's own layout.
        target: form of the low-bit layers: `qdq`, which every runtime accepts, or `plugin`, which runs
            on trtq's kernels in TensorRT with 4-bit weights in memory (converted to `qdq` for other
            runtimes); or `comfy`, a file for ComfyUI instead of the folder, see
            `trtq.exporter.comfy.export_comfy`.
        precision: `fp32` or `fp16`, for everything except integers.
        batch: minimum and maximum batch size, in images, of engines that are built from the folder.
        size: image size `HEIGHTxWIDTH` in pixels, or a range `SMALLEST:LARGEST`; by default the size
            that the run was calibrated at.
        call: other values for arguments of the recorded call, inside which the graphs are traced; only
            for a run that was recorded inside its pipeline's call.
        memory: memory to use, e.g. `24GB`; only for a run. If the export needs more, the codes of torch
            and onnxruntime stay packed in their files, see `trtq.exporter.memory`; the graph is the
            same. None: only if it needs more than 80 % of the available memory.
        overwrite: replace an existing ONNX folder.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        SNR of the graph against torch, sizes and durations.

    Raises:
        GateError: the SNR of the graph against torch is below `PARITY_DB`; no output is left.
        TrtqError: see `trtq.errors`.
    """
    start = time.monotonic()
    limit = None if memory is None else parse_memory(memory)
    if target == "comfy":
        if size is not None or call is not None:
            raise UsageError("a file for ComfyUI has no image size and no call; leave them out")
        return export_comfy(
            artefact,
            out,
            precision=precision,
            memory=limit,
            overwrite=overwrite,
            progress=progress,
        )
    if target not in TARGETS:
        raise UsageError(f"unknown target {target!r}; choose one of {', '.join(TARGETS)}, comfy")
    if precision not in PARITY_DB:
        raise UsageError(f"unknown precision {precision!r}; choose one of {', '.join(PARITY_DB)}")
    final = check_output(Path(out), overwrite=overwrite, source=artefact, kind="onnx")
    opened = open_artefact(artefact, verify=False)
    packed = keeps_packed(opened, final, limit, target=target, precision=precision)
    if packed:
        return_freed_memory()
    progress("export", 1, 3)
    if is_called(opened):
        return _export_recorded(
            opened, final, start, target, precision, batch, size, call, packed, overwrite, progress
        )
    if call is not None:
        raise UsageError(
            f"{opened.place} was not recorded inside its pipeline's call, so --call and --input have no "
            "effect; give them to trtq quantize"
        )
    with (
        new_artefact(final, kind="onnx", overwrite=overwrite) as folder,
        exporting_parts(Path(opened.place), folder) as parts,
    ):
        source, manifest, sizes = _write_denoiser(
            opened, folder, precision, target, size, packed=packed
        )
        model = folder / source.denoiser_name / MODEL_FILE
        save_pipeline_parts(source, folder, graphs=True)
        progress("export", 2, 3)
        made = parts() if parts else Parts(export_components(source, folder, progress), 0)
        # The second process has ended, so its memory no longer counts in what follows.
        both = peak_rss_bytes() + made.peak_rss_bytes
        result = ExportResult(
            **_compare_with_torch(
                source, model, manifest, sizes, PARITY_DB[precision], packed=packed
            ),
            parity_parts_db=made.parity,
            bytes=sum(path.stat().st_size for path in model.parent.iterdir()),
            seconds=round(time.monotonic() - start, 2),
            peak_rss_bytes=max(both, peak_rss_bytes()),
        )
        options = ExportOptions(
            target=target,
            precision=precision,
            batch=batch,
            size=sizes[0] if sizes[0] == sizes[1] else ":".join(sizes),
        )
        update = {"options": options, "metrics": Metrics(**result.to_json())}
        write_manifest(folder, manifest.model_copy(update=update))
        if source.model_class in _SERVED_WITHOUT_TORCH:
            keep_prepared(model)
    progress("export", 3, 3)
    return result


def _export_recorded(
    opened: Opened,
    final: Path,
    start: float,
    target: str,
    precision: str,
    batch: tuple[int, int],
    size: str | None,
    call: Mapping[str, Any] | None,
    packed: bool,
    overwrite: bool,
    progress: ProgressCallback,
) -> ExportResult:
    """Write the ONNX folder of a run that was recorded inside the pipeline's call; see `export`."""
    with new_artefact(final, kind="onnx", overwrite=overwrite) as folder:
        exported = export_calls(
            opened,
            folder,
            size=size,
            precision=precision,
            target=target,
            packed=packed,
            changes=call,
        )
        manifest = exported.manifest
        graphs = [row.folder for part in manifest.denoisers for row in part.recorded.graphs]
        result = ExportResult(
            **exported.as_dict(),
            parity_parts_db={},
            bytes=sum(
                path.stat().st_size for graph in graphs for path in (folder / graph).iterdir()
            ),
            seconds=round(time.monotonic() - start, 2),
            peak_rss_bytes=peak_rss_bytes(),
        )
        options = ExportOptions(target=target, precision=precision, batch=batch, size=size)
        update = {"options": options, "metrics": Metrics(**result.to_json())}
        write_manifest(folder, manifest.model_copy(update=update))
    progress("export", 3, 3)
    return result


def _write_denoiser(
    opened: Opened,
    folder: Path,
    precision: str,
    target: Target,
    size: str | None,
    *,
    packed: bool = False,
) -> tuple[LoadedPipeline, Manifest, tuple[str, str]]:
    """Write the denoiser's graph without checks.

    Args:
        opened: the run or checkpoint.
        folder: the ONNX folder.
        precision: see `export`.
        target: see `export`.
        size: see `export`.
        packed: see `trtq.exporter.memory.keeps_packed`.

    Returns:
        The pipeline to compare with, the initial manifest, and the smallest and largest image size of
        the graph. The run's integers and the traced model are released.
    """
    source, traced, run, manifest = _load(opened, precision, packed=packed)
    smallest, largest = _sizes(source, size)
    source = source.sized(smallest)
    # Raise for a number of steps that torch cannot run, before the graph is traced.
    source.schedule(opened.steps or DEFAULT_STEPS)
    place = folder / source.denoiser_name
    write_graph(place, traced, source, run, largest, half=precision == "fp16", target=target)
    return source, manifest, (smallest, largest)


def _load(
    opened: Opened, precision: str, *, packed: bool
) -> tuple[LoadedPipeline, nn.Module, OpenRun | None, Manifest]:
    """The pipeline, the denoiser to trace, the run if there is one, and the initial manifest."""
    if isinstance(opened, Checkpoint):
        source = open_pipeline(opened.place, opened.config)
        # Tracing in half precision changes the model, and the comparison needs the original.
        traced = source.denoiser
        if precision != "fp32":
            traced = open_pipeline(opened.place, opened.config).denoiser
        return source, traced, None, _float_manifest(source)
    run = open_run(opened)
    return run.source(packed=packed), run.float_skeleton(), run, _run_manifest(run)


def _sizes(source: LoadedPipeline, size: str | None) -> tuple[str, str]:
    """Smallest and largest image size of the graph.

    Raises:
        UsageError: the model cannot generate these sizes, or one graph cannot take several.
    """
    smallest, largest = parse_sizes("x".join(map(str, source.image_size)) if size is None else size)
    if smallest != largest and not source.family.free_size:
        raise UsageError(
            f"a graph of a {source.model_class} takes images of one size, since its positions are part "
            "of it; export once for each size"
        )
    source.latents_of(largest)
    return smallest, largest


def _float_manifest(source: LoadedPipeline) -> Manifest:
    files = source_hashes(source.folder) if source.folder is not None else {}
    return Manifest(
        kind="onnx",
        source=SourceRow(name=source.name, files=files),
        denoiser=source.denoiser_name,
        layers=float_rows(source.denoiser),
    )


def _run_manifest(run: OpenRun) -> Manifest:
    source = made_from(run.folder, run.manifest)
    return run.manifest.model_copy(update={"kind": "onnx", "source": source})


def _compare_with_torch(
    source: LoadedPipeline,
    model: Path,
    manifest: Manifest,
    sizes: tuple[str, str],
    min_db: float,
    *,
    packed: bool,
) -> dict[str, Any]:
    """Compare a graph with torch at its smallest and its largest size.

    Returns:
        The fields `parity_*` of `ExportResult`.

    Raises:
        GateError: the SNR of the graph against torch is below `min_db`.
    """
    smallest, largest = sizes
    parity = step_parities(source, model, manifest, packed=packed)
    checked = list(parity)
    if smallest != largest:
        checked += step_parities(source.sized(largest), model, manifest, packed=packed)
    minimum = min(row.db for row in checked)
    if not all(row.holds(min_db) for row in checked):
        raise GateError(
            f"the exported graph agrees with torch to only {minimum:.1f} dB; {min_db:g} dB are "
            "required, or the SNR of torch against itself with layer inputs changed by their last bit; "
            "per step: " + ", ".join(f"{row.db:.1f} ({row.floor_db:.1f})" for row in checked)
        )
    return {
        "parity_db_min": minimum,
        "parity_db": [row.db for row in parity],
        "parity_db_pooled_min": min(row.pooled_db for row in parity),
        "parity_ties": sum(row.ties for row in parity) / len(parity),
        "parity_floor_db": [row.floor_db for row in parity],
        "parity_largest_db": min(row.db for row in checked[len(parity) :] or parity),
    }
