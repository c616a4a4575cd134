"""Any artefact or checkpoint as a diffusers pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trtq.artefact.manifest import artefact_kind, peek_manifest, read_manifest
from trtq.diffusion.folder import load_pipeline_parts, skeleton
from trtq.diffusion.loading import DENOISERS, open_pipeline
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.engine.base import Engine
from trtq.engine.denoiser import EngineDenoiser
from trtq.engine.open import open_engine
from trtq.engine.ort import PROVIDERS
from trtq.engine.profile import exported_profile
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.engine.tensorrt.job import Profile
from trtq.engine.torch_gpu import GpuDenoiser
from trtq.errors import ArtefactError, UsageError
from trtq.graph.file import model_file
from trtq.pipelines.components import load_component
from trtq.plugins.driver import cuda_text, driver_cuda
from trtq.quant.stand_in import StandIn
from trtq.runs.folder import OpenRun, check_calibrated, open_run
from trtq.torch_settings import with_own_settings

__all__ = ["artefact_guidance", "calibrated_steps", "engine_source", "load", "open_any"]

logger = logging.getLogger(__name__)

TORCH = "torch"


@with_own_settings
def open_any(
    path: str | Path | Any, provider: str | None = None, threads: int | None = None
) -> LoadedPipeline:
    """Open a run, an ONNX or engine folder or a float checkpoint.

    Args:
        path: the folder, a shipped model's name, a hub id or a pipeline object.
        provider: `torch` for runs and checkpoints (their default; a run that asks for it by name is
            computed by our kernels, in half precision, where torch sees an NVIDIA GPU); `cpu`,
            `openvino` or `cuda` for ONNX folders (default `cpu`); engines run on the backend that built
            them.
        threads: threads of one operator, for ONNX folders.

    Raises:
        UsageError: the provider cannot run this kind of artefact.
        ArtefactError: it cannot be read, or is not what its manifest says.
    """
    known = tuple(dict.fromkeys((TORCH, *PROVIDERS, *BACKENDS)))
    if provider is not None and provider not in known:
        raise UsageError(f"unknown provider {provider!r}; choose one of {', '.join(known)}")
    folder = Path(path) if isinstance(path, str | Path) else None
    kind = artefact_kind(folder) if folder is not None and folder.is_dir() else None
    if folder is None or kind not in ("onnx", "engine"):
        if provider not in (None, TORCH):
            what = "a run" if kind == "run" else "a float checkpoint"
            raise UsageError(
                f"{path} is {what}, which only torch runs; make an ONNX folder of it first: "
                f"trtq export {path} -o ONNX"
            )
        if folder is None or kind is None:
            return open_pipeline(path)
        run = open_run(folder)
        return run.source(_on_gpu(run) if provider == TORCH else None)
    manifest = read_manifest(folder, kind)
    allowed = list(PROVIDERS) if kind == "onnx" else [str(manifest.options["backend"])]
    chosen = provider or allowed[0]
    if chosen not in allowed:
        what = "an ONNX folder" if kind == "onnx" else "a folder of engines"
        raise UsageError(f"{path} is {what}; run it with {' or '.join(allowed)}, not {chosen}")
    metadata = manifest.options.get("graph_metadata", {})

    def open_graph(name: str) -> Engine | None:
        file = model_file(folder / name)
        own = metadata if name == manifest.denoiser else {}

        def profile() -> Profile:
            return exported_profile(folder, name, manifest)

        if f"{name}/{file.name}" not in manifest.files:
            return None
        engine = open_engine(file, chosen, threads, own, profile)
        if name == manifest.denoiser:
            manifest.check_graph(engine.metadata)
        return engine

    source = engine_source(folder, manifest.denoiser, manifest.options.get("size"), open_graph)
    check_calibrated(source, manifest)
    return source


def _on_gpu(run: OpenRun) -> nn.Module | None:
    """The denoiser on our kernels, where torch sees an NVIDIA GPU."""
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
    """A pipeline whose graphs are run by engines.

    Args:
        folder: what is no graph, in the layout of an ONNX folder.
        denoiser: name of that component.
        size: image size in pixels, or a range; None: the model's own.
        open_graph: the engine of a graph by its folder's name; None if there is none.

    Raises:
        ArtefactError: a part is missing, or cannot be read.
    """
    model: Any = skeleton(folder, denoiser)
    engine = open_graph(denoiser)
    if engine is None:
        raise ArtefactError(f"{folder} has no graph of its denoiser {denoiser!r}")
    pipeline = load_pipeline_parts(
        folder,
        denoiser,
        EngineDenoiser(engine, model.config, type(model)),
        lambda name, cls: load_component(folder, name, cls, open_graph),
    )
    source = LoadedPipeline(str(folder), folder, pipeline, denoiser)
    if size is not None:
        source = source.sized(size.partition(":")[0])
    return source


def load(folder: str | Path | Any, provider: str | None = None) -> Any:
    """A diffusers pipeline whose denoiser is the low-bit one.

    Args:
        folder: a run, an ONNX or engine folder, or a float checkpoint for comparison.
        provider: see `open_any`.

    Returns:
        A `DiffusionPipeline`: call it as diffusers' own.

    Raises:
        TrtqError: see `trtq.errors`.
    """
    pipeline = open_any(folder, provider).pipeline
    name = next((name for name in DENOISERS if hasattr(pipeline, name)), None)
    if name is not None and isinstance(getattr(pipeline, name), StandIn):
        # diffusers would leave out what it does not know, with a line in the log.
        pipeline.save_pretrained = partial(_refuse_to_save, str(folder))
    return pipeline


def _refuse_to_save(folder: str, *_: Any, **__: Any) -> None:
    raise UsageError(
        f"a low-bit pipeline is not saved in diffusers' format; copy its folder {folder}"
    )


def calibrated_steps(path: str | Path | Any) -> int | None:
    """The number of denoising steps an artefact was calibrated for; None for a float checkpoint."""
    folder = Path(path) if isinstance(path, str | Path) else None
    if folder is None or not folder.is_dir() or artefact_kind(folder) is None:
        return None
    recipe = peek_manifest(folder).recipe
    return int(recipe["steps"]) if recipe else None


def artefact_guidance(path: str | Path | Any) -> float | None:
    """The guidance an artefact was calibrated with; None for a float checkpoint."""
    folder = Path(path) if isinstance(path, str | Path) else None
    if folder is None or not folder.is_dir() or artefact_kind(folder) is None:
        return None
    guidance = (peek_manifest(folder).recipe or {}).get("guidance")
    return None if guidance is None else float(guidance)
