"""Run or checkpoint to ONNX, with the check that both say the same."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from trtq.artefact.contents import source_hashes
from trtq.artefact.folder import check_output, claims_output, new_artefact
from trtq.artefact.graph_metadata import LAYERS_KEY, SIZES_KEY, TIMESTEPS_KEY
from trtq.artefact.manifest import LayerRow, Manifest, SourceRow
from trtq.artefact.manifest_file import made_from, write_manifest
from trtq.artefact.opened import DEFAULT_STEPS, Checkpoint, Opened, open_artefact
from trtq.artefact.options import ExportOptions, Metrics
from trtq.diffusion.folder import save_pipeline_parts
from trtq.diffusion.layout import parse_sizes
from trtq.diffusion.pipeline import LoadedPipeline, load_source
from trtq.documents import shown
from trtq.engine.prepared import keep_prepared
from trtq.errors import GateError, UsageError
from trtq.exporter.component_graphs import export_components
from trtq.exporter.component_worker import Parts, exporting_parts
from trtq.exporter.result import ExportResult
from trtq.exporter.step_check import PARITY_DB, step_parities
from trtq.exporter.trace import trace
from trtq.graph.file import MODEL_FILE, save_graph
from trtq.graph.nodes import LOW_BIT_OPERATORS
from trtq.graph.passes import (
    BroadcastTimestep,
    CastLayerNormToFloat64,
    DecomposeGroupNorm,
    DecomposeSilu,
    DecomposeTimestepEmbedding,
    DropNoopSqueeze,
    ExpandLowBitToQdq,
    LowBitToPlugins,
)
from trtq.limits import MAX_BATCH, parse_whole
from trtq.progress import ProgressCallback, silent
from trtq.quant import layer_kind, quantizable_layers
from trtq.resources import peak_rss_bytes
from trtq.runs.folder import OpenRun, open_run
from trtq.seeds import seeded_generator
from trtq.torch_settings import with_own_settings

__all__ = ["PARITY_DB", "export", "parse_batch", "write_graph"]

Target = Literal["qdq", "plugin"]
TARGETS: tuple[Target, ...] = get_args(Target)
Precision = Literal["fp32", "fp16"]

_TRACED_BATCH = 2
_SERVED_WITHOUT_TORCH = ("UNet2DModel",)
"""What a server opens without the means to rewrite a graph: it is done at once, once."""
_PRODUCTS = ("LowBitMatMul",)


def parse_batch(text: str) -> tuple[int, int]:
    """`1:8` -> (1, 8), the batch sizes an engine is to take; `4` -> (4, 4).

    Raises:
        UsageError: not of that form.
    """
    low, _, high = text.partition(":")
    try:
        bounds = parse_whole(low), parse_whole(high or low)
    except ValueError:
        bounds = 0, 0
    if not 1 <= bounds[0] <= bounds[1] <= MAX_BATCH:
        raise UsageError(
            f"--batch {shown(text)} is not understood; write MIN:MAX, each 1 .. {MAX_BATCH}, e.g. 1:8"
        )
    return bounds


def _rows(denoiser: nn.Module) -> list[LayerRow]:
    return [
        LayerRow(
            name=name,
            kind=layer_kind(module) or "linear",
            weight_bits=None,
            activation_bits=None,
            reason="exported from a float checkpoint",
        )
        for name, module in quantizable_layers(denoiser).items()
    ]


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
    overwrite: bool = False,
    progress: ProgressCallback = silent,
) -> ExportResult:
    """Write the ONNX folder of a run, or of a plain checkpoint as the float baseline.

    The denoiser keeps diffusers' inputs and takes one timestep per batch item, or one for all. After
    writing, torch and onnxruntime are compared, see `trtq.exporter.step_check.step_parities`.

    Args:
        artefact: a run, a diffusers folder, the name of a shipped model or a hub id, or one of them
            opened.
        out: the ONNX folder, in the pipeline's own layout.
        target: form of the low-bit layers: `qdq`, which every runtime takes, or `plugin`, which our
            kernels run in TensorRT with 4-bit weights in memory (other runtimes convert it to `qdq`).
        precision: `fp32` or `fp16`, for everything that is not an integer.
        batch: minimum and maximum batch size of the engines that are built from the folder.
        size: image size `HEIGHTxWIDTH` in pixels, or a range `SMALLEST:LARGEST`; by default the size
            that the run was calibrated at.
        overwrite: replace an existing ONNX folder.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        SNR of the graph against torch, sizes and durations.

    Raises:
        GateError: the graph is further from torch than `PARITY_DB` allows; nothing is left.
        TrtqError: see `trtq.errors`.
    """
    start = time.monotonic()
    if target not in TARGETS:
        raise UsageError(f"unknown target {target!r}; choose one of {', '.join(TARGETS)}")
    if precision not in PARITY_DB:
        raise UsageError(f"unknown precision {precision!r}; choose one of {', '.join(PARITY_DB)}")
    final = check_output(Path(out), overwrite=overwrite, source=artefact, kind="onnx")
    opened = open_artefact(artefact, verify=False)
    progress("export", 1, 3)
    with (
        new_artefact(final, kind="onnx", overwrite=overwrite) as folder,
        exporting_parts(Path(opened.place), folder) as parts,
    ):
        source, traced, run, manifest = _load(opened, precision)
        name = source.denoiser_name
        smallest, largest = _sizes(source, size)
        # What torch cannot be compared along in the end is refused before the graph is made.
        source.schedule(opened.steps or DEFAULT_STEPS)
        half = precision == "fp16"
        write_graph(folder / name, traced, source, run, largest, half=half, target=target)
        # Its codes are in the graph and in the denoiser now, and take memory a third time.
        del run, traced
        save_pipeline_parts(source, folder, graphs=True)
        progress("export", 2, 3)
        made = parts() if parts else Parts(export_components(source, folder, progress), 0)
        # The second process has ended; what follows is in this one alone.
        both = peak_rss_bytes() + made.peak_rss_bytes
        parity = _held_to_torch(
            source, folder / name / MODEL_FILE, manifest, (smallest, largest), PARITY_DB[precision]
        )
        result = ExportResult(
            **parity,
            parity_parts_db=made.parity,
            bytes=sum(path.stat().st_size for path in (folder / name).iterdir()),
            seconds=round(time.monotonic() - start, 2),
            peak_rss_bytes=max(both, peak_rss_bytes()),
        )
        options = ExportOptions(
            target=target,
            precision=precision,
            batch=batch,
            size=smallest if smallest == largest else f"{smallest}:{largest}",
        )
        update = {"options": options, "metrics": Metrics(**result.to_json())}
        write_manifest(folder, manifest.model_copy(update=update))
        if source.model_class in _SERVED_WITHOUT_TORCH:
            keep_prepared(folder / name / MODEL_FILE)
    progress("export", 3, 3)
    return result


def _load(
    opened: Opened, precision: str
) -> tuple[LoadedPipeline, nn.Module, OpenRun | None, Manifest]:
    """The pipeline, the denoiser to trace, the run if there is one, and the manifest's beginnings."""
    if isinstance(opened, Checkpoint):
        source = load_source(opened.place)
        # Tracing in half precision changes the model, and the comparison needs the original.
        traced = source.denoiser if precision == "fp32" else load_source(opened.place).denoiser
        return source, traced, None, _float_manifest(source)
    run = open_run(opened)
    return run.source(), run.float_skeleton(), run, _run_manifest(run)


def _sizes(source: LoadedPipeline, size: str | None) -> tuple[str, str]:
    """Smallest and largest image size of the graph; the source then works on the smallest.

    Raises:
        UsageError: the model cannot draw them, or one graph cannot take several.
    """
    smallest, largest = parse_sizes("x".join(map(str, source.image_size)) if size is None else size)
    if smallest != largest and not source.family.free_size:
        raise UsageError(
            f"a graph of a {source.model_class} takes images of one size, since its positions are part "
            "of it; export once for each size"
        )
    source.latents_of(largest)
    source.resize(smallest)
    return smallest, largest


def _float_manifest(source: LoadedPipeline) -> Manifest:
    files = source_hashes(source.folder) if source.folder is not None else {}
    return Manifest(
        kind="onnx",
        source=SourceRow(name=source.name, files=files),
        denoiser=source.denoiser_name,
        layers=_rows(source.denoiser),
    )


def _run_manifest(run: OpenRun) -> Manifest:
    source = made_from(run.folder, run.manifest)
    return run.manifest.model_copy(update={"kind": "onnx", "source": source})


def write_graph(
    folder: Path,
    denoiser: nn.Module,
    source: LoadedPipeline,
    run: OpenRun | None,
    largest: str,
    *,
    half: bool,
    target: Target = "qdq",
) -> None:
    """Trace a denoiser and write its graph, unchecked.

    Args:
        folder: new; gets the graph and its external data.
        denoiser: the float model, or the skeleton of a run's; changed in place.
        source: its pipeline, at the (smallest) size of the graph.
        run: the numbers of its low-bit layers; None: it stays float.
        largest: image size `HEIGHTxWIDTH`; another than the source's makes a graph for the range.
        half: everything that is not an integer in half precision.
        target: the form of its low-bit layers.
    """
    layers = run.stored.layers if run else {}
    conditions = source.draw_conditions(_TRACED_BATCH, seeded_generator(0, "traced conditions"))
    x = torch.zeros(_TRACED_BATCH, *source.sample_shape)
    low, high = source.latent_size, source.latents_of(largest)
    cell = None if low == high else source.coarsest
    model = trace(denoiser, x, conditions, set(layers), half=half, cell=cell)
    if cell is not None:
        model.metadata_props[SIZES_KEY] = json.dumps({"low": low, "high": high, "cell": cell})
    BroadcastTimestep()(model)
    DropNoopSqueeze()(model)
    DecomposeGroupNorm()(model)
    CastLayerNormToFloat64()(model)
    DecomposeSilu()(model)
    DecomposeTimestepEmbedding()(model)
    if run is not None:
        operators = _PRODUCTS if target == "plugin" else LOW_BIT_OPERATORS
        ExpandLowBitToQdq(layers, run.table, operators)(model)
        LowBitToPlugins(layers, run.table)(model)
        model.metadata_props[TIMESTEPS_KEY] = json.dumps(run.table.timesteps.tolist())
        model.metadata_props[LAYERS_KEY] = json.dumps(run.manifest.layer_kinds())
    save_graph(model, folder)


def _held_to_torch(
    source: LoadedPipeline, model: Path, manifest: Manifest, sizes: tuple[str, str], min_db: float
) -> dict[str, Any]:
    """Compare a graph with torch at its smallest and its largest size.

    Raises:
        GateError: it is further from torch than `min_db` allows.
    """
    smallest, largest = sizes
    parity = step_parities(source, model, manifest)
    checked = list(parity)
    if smallest != largest:
        source.resize(largest)
        checked += step_parities(source, model, manifest)
        source.resize(smallest)
    least = min(row.db for row in checked)
    if not all(row.holds(min_db) for row in checked):
        raise GateError(
            f"the exported graph is only {least:.1f} dB from torch, {min_db:g} dB are required, or "
            "what torch keeps when the inputs of its layers move by the last bit; per step: "
            + ", ".join(f"{row.db:.1f} ({row.floor_db:.1f})" for row in checked)
        )
    return {
        "parity_db_min": least,
        "parity_db": [row.db for row in parity],
        "parity_db_pooled_min": min(row.pooled_db for row in parity),
        "parity_ties": sum(row.ties for row in parity) / len(parity),
        "parity_floor_db": [row.floor_db for row in parity],
        "parity_largest_db": min(row.db for row in checked[len(parity) :] or parity),
    }
