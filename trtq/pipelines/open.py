"""Loading any artefact or checkpoint as a diffusers pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trtq.artefact.graph_metadata import check_layers, check_timesteps
from trtq.artefact.manifest_rows import GraphRow, layer_kinds
from trtq.artefact.opened import Checkpoint, EngineFolder, GraphFolder, Opened, open_artefact
from trtq.calls.pipeline import RecordedPipeline
from trtq.calls.stored import CALL_FOLDER, load_call
from trtq.checkpoint.components import DENOISERS
from trtq.diffusion.folder import load_pipeline_parts, skeleton
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.engine.base import Engine
from trtq.engine.call_profile import exported_call_profile, within_profile
from trtq.engine.denoiser import EngineDenoiser
from trtq.engine.open import open_engine
from trtq.engine.ort import PROVIDERS
from trtq.engine.profile import exported_profile
from trtq.engine.recorded import CallGraph, RecordedDenoiser
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.engine.tensorrt.job import Profile
from trtq.engine.torch_gpu import GpuDenoiser
from trtq.errors import ArtefactError, UsageError
from trtq.graph.file import model_file
from trtq.pipelines.components import load_component, move_to_graphs
from trtq.plugins.driver import cuda_text, driver_cuda
from trtq.quant.stand_in import StandIn
from trtq.runs.folder import OpenRun, check_calibrated, open_run
from trtq.torch_settings import with_own_settings

__all__ = ["TORCH", "engine_source", "load", "open_any"]

logger = logging.getLogger(__name__)

TORCH = "torch"


@with_own_settings
def open_any(
    artefact: str | Path | Opened | Any, provider: str | None = None, threads: int | None = None
) -> LoadedPipeline:
    """Load a run, an ONNX or engine folder or a float checkpoint as a pipeline.

    Args:
        artefact: a folder, the name of a shipped model, a hub id, a pipeline object, or one of them
            opened.
        provider: `torch` for runs and checkpoints (their default; a run with an explicit `torch` runs
            on trtq's kernels, in half precision, if torch sees an NVIDIA GPU); `cpu`, `openvino` or
            `cuda` for ONNX folders (default `cpu`); engines run on the backend that built them.
        threads: threads of one operator, for ONNX folders.

    Returns:
        The pipeline with its denoiser.

    Raises:
        UsageError: the provider cannot run this kind of artefact.
        ArtefactError: the artefact cannot be read, or does not match its manifest.
    """
    known = tuple(dict.fromkeys((TORCH, *PROVIDERS, *BACKENDS)))
    if provider is not None and provider not in known:
        raise UsageError(f"unknown provider {provider!r}; choose one of {', '.join(known)}")
    opened = open_artefact(artefact, verify=False)
    if isinstance(opened, GraphFolder):
        return _open_graphs(opened, provider, threads)
    if provider not in (None, TORCH):
        what = "a float checkpoint" if isinstance(opened, Checkpoint) else "a run"
        raise UsageError(
            f"{opened.place} is {what}, which only torch runs; make an ONNX folder of it first: "
            f"trtq export {opened.place} -o ONNX"
        )
    if isinstance(opened, Checkpoint):
        return open_pipeline(opened.place, opened.config)
    run = open_run(opened)
    return run.source(_on_gpu(run) if provider == TORCH else None)


def _open_graphs(opened: GraphFolder, provider: str | None, threads: int | None) -> LoadedPipeline:
    """Load an ONNX or engine folder as a pipeline; see `open_any`."""
    opened = opened.verified()
    folder, manifest = opened.folder, opened.manifest
    engines = isinstance(opened, EngineFolder)
    allowed = [opened.backend] if isinstance(opened, EngineFolder) else list(PROVIDERS)
    chosen = provider or allowed[0]
    if chosen not in allowed:
        what = "a folder of engines" if engines else "an ONNX folder"
        raise UsageError(
            f"{opened.place} is {what}; run it with {' or '.join(allowed)}, not {chosen}"
        )

    def open_graph(name: str) -> Engine | None:
        file = model_file(folder / name)
        is_denoiser = name == manifest.denoiser
        metadata = opened.graph_metadata if is_denoiser else {}

        def profile() -> Profile:
            return exported_profile(folder, name, manifest)

        if f"{name}/{file.name}" not in manifest.files:
            return None
        engine = open_engine(file, chosen, threads, metadata, profile)
        if is_denoiser:
            manifest.check_graph(engine.metadata)
        return engine

    if manifest.recorded is not None:
        return _open_recorded(opened, chosen, threads)
    source = engine_source(folder, manifest.denoiser, opened.size, open_graph)
    check_calibrated(source, manifest)
    return source


def _open_recorded(opened: GraphFolder, provider: str, threads: int | None) -> RecordedPipeline:
    """Load a folder of recorded denoisers; everything else of the pipeline stays in torch."""
    folder, manifest = opened.folder, opened.manifest
    denoisers = {}
    for part in manifest.denoisers:
        graphs = []
        for row in part.recorded.graphs:
            graph = _open_call(opened, row, provider, threads)
            check_timesteps(graph.engine.metadata, part.timesteps)
            check_layers(graph.engine.metadata, layer_kinds(part.layers))
            graphs.append(graph)
        adapters = part.structure
        model = skeleton(folder, part.denoiser, adapters.ip_adapter, adapters.ip_adapter_scales)
        denoisers[part.denoiser] = RecordedDenoiser(part.denoiser, model, graphs)
    pipeline = load_pipeline_parts(folder, denoisers)
    move_to_graphs(pipeline, denoisers.values())
    call = load_call(folder / CALL_FOLDER)
    return RecordedPipeline(str(folder), folder, pipeline, manifest.denoiser, call)


def _open_call(opened: GraphFolder, row: GraphRow, provider: str, threads: int | None) -> CallGraph:
    """Open the graph or engine of a recorded call."""
    file = model_file(opened.folder / row.folder)
    if isinstance(opened, EngineFolder):
        metadata = opened.options.call_metadata.get(row.folder, {})
        limited = within_profile(row, opened.options.profiles.get(row.folder, {}))
        return CallGraph(open_engine(file, provider, threads, metadata), limited)
    profile = partial(exported_call_profile, opened.folder, row, opened.manifest)
    engine = open_engine(file, provider, threads, profile=profile)
    return CallGraph(engine, within_profile(row, profile()) if provider in BACKENDS else row)


def _on_gpu(run: OpenRun) -> nn.Module | None:
    """The denoiser on trtq's kernels if torch sees an NVIDIA GPU, else None."""
    if torch.cuda.is_available():
        return GpuDenoiser(run.denoiser(kernels=True))
    driver = driver_cuda()
    if driver is not None:
        logger.warning(
            "the run is computed on the CPU: there is an NVIDIA driver, %s, but torch %s sees no GPU; "
            "install torch for CUDA of that version, and see trtq doctor",
            cuda_text(driver),
            torch.__version__,
        )
    return None


def engine_source(
    folder: Path, denoiser: str, size: str | None, open_graph: Callable[[str], Engine | None]
) -> LoadedPipeline:
    """Assemble a pipeline whose graphs run on engines.

    Args:
        folder: folder of everything except the graphs, in the layout of an ONNX folder.
        denoiser: name of the denoiser component.
        size: image size `HEIGHTxWIDTH` in pixels, or a range `SMALLEST:LARGEST`; None: the default.
        open_graph: function from the name of a graph's folder to its engine, or None without a graph.

    Returns:
        The pipeline with its denoiser.

    Raises:
        ArtefactError: a component is missing, or cannot be read.
    """
    model: Any = skeleton(folder, denoiser)
    engine = open_graph(denoiser)
    if engine is None:
        raise ArtefactError(f"{folder} has no graph of its denoiser {denoiser!r}")
    pipeline = load_pipeline_parts(
        folder,
        {denoiser: EngineDenoiser(engine, model.config, type(model))},
        lambda name, cls: load_component(folder, name, cls, open_graph),
    )
    move_to_graphs(pipeline, [getattr(pipeline, denoiser)])
    source = LoadedPipeline(str(folder), folder, pipeline, denoiser)
    if size is not None:
        source = source.sized(size.partition(":")[0])
    return source


def load(artefact: str | Path | Opened | Any, provider: str | None = None) -> Any:
    """Load an artefact as a diffusers pipeline with the artefact's denoiser.

    Args:
        artefact: a run, an ONNX or engine folder, a float checkpoint for comparison, or one of them
            opened.
        provider: provider that runs the artefact, see `open_any`.

    Returns:
        A `DiffusionPipeline`, to be called like any pipeline of diffusers.

    Raises:
        TrtqError: see `trtq.errors`.
    """
    opened = open_artefact(artefact, verify=False)
    pipeline = open_any(opened, provider).pipeline
    names = [name for name in DENOISERS if hasattr(pipeline, name)]
    if any(isinstance(getattr(pipeline, name), StandIn) for name in names):
        # diffusers would save the pipeline without this denoiser, and only log a warning.
        pipeline.save_pretrained = partial(_refuse_to_save, str(opened.place))
    return pipeline


def _refuse_to_save(folder: str, *_: Any, **__: Any) -> None:
    raise UsageError(
        f"a low-bit pipeline is not saved in diffusers' format; copy its folder {folder}"
    )
