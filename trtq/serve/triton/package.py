"""Package an ONNX folder or engines as a model repository for Triton Inference Server."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from trtq.artefact.files import sha256
from trtq.artefact.folder import check_output, claims_output, new_artefact
from trtq.artefact.listing import write_listing
from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_file import find_origin
from trtq.artefact.opened import (
    DEFAULT_STEPS,
    EngineFolder,
    Opened,
    StoredArtefact,
    open_folder,
)
from trtq.artefact.options import EngineOptions
from trtq.engine.base import graph_specs
from trtq.engine.trial import TRIAL_SECONDS
from trtq.errors import ArtefactError
from trtq.exporter.graph_check import require_graphs
from trtq.exporter.parts import copy_parts
from trtq.graph.file import DATA_NAME, ENGINE_FILE, MODEL_FILE, graphs_of
from trtq.graph.runtimes.prepare import load_graph
from trtq.pipelines.open import engine_source
from trtq.progress import ProgressCallback, silent
from trtq.serve.triton.config import PLAN_NAME, write_graph_config, write_pipeline_config
from trtq.serve.triton.engine import ServedGraph, TritonEngine
from trtq.serve.triton.packaged import open_packaged
from trtq.serve.triton.pipeline import Settings, request_input
from trtq.serve.triton.result import PackagedModel, TritonPackageResult
from trtq.serve.triton.v1 import MODEL_PY

__all__ = ["CHECKSUMS_NAME", "package_triton"]

CHECKSUMS_NAME = "SHA256SUMS"
ARTEFACT_NAME = "artefact.json"
"""File name of the artefact's manifest: layers, timesteps, LoRAs, hashes and versions."""
DENOISER, PIPELINE = "denoiser", "pipeline"
_KIND = "triton"
_BATCH_AXES = ("batch", "timesteps")
"""Names of first axes whose size is the number of items."""
_RTX_NOTE = (
    "these engines are for TensorRT-RTX; the tensorrt backend of NVIDIA's server images needs engines "
    "of full TensorRT (trtq build --backend tensorrt, on the GPU of the server)"
)


@claims_output
def package_triton(
    artefact: str | Path | Opened,
    out: str | Path,
    *,
    onnx: str | Path | None = None,
    overwrite: bool = False,
    timeout: float = TRIAL_SECONDS,
    progress: ProgressCallback = silent,
) -> TritonPackageResult:
    """Write a model repository: one model per graph, and one for the whole pipeline.

    The pipeline's model is a Python model: the denoising loop, which calls the other models. Each item
    has its own step index, so the server may batch denoiser calls of different requests at different
    steps.

    Args:
        artefact: an ONNX folder, whose graphs the onnxruntime backend runs, or an engine folder.
        out: folder of the new repository.
        onnx: ONNX folder that the engines were built from; None: the folder that the manifest names.
        overwrite: whether to replace an existing repository made by trtq.
        timeout: maximum time for opening and calling one graph in onnxruntime, in seconds.
        progress: callback with the stage's name, the completed work and the total.

    Raises:
        UsageError: the artefact is neither an ONNX folder nor an engine folder, or `out` is in use.
        ArtefactError: the artefact is damaged, onnxruntime does not open its graphs, or the ONNX folder
            of the engines is missing.
    """
    opened = open_packaged(artefact)
    folder, manifest = opened.folder, opened.manifest
    final = check_output(Path(out), overwrite=overwrite, source=artefact, kind=_KIND)
    exported = _onnx_of(opened, onnx) if isinstance(opened, EngineFolder) else opened
    graphs, origin = exported.folder, exported.manifest
    require_graphs(graphs, origin, progress, seconds=timeout)
    names = graphs_of(origin)
    with new_artefact(final, kind=_KIND, overwrite=overwrite) as partial:
        served, models = {}, {}
        for index, name in enumerate(names):
            progress("package", index, len(names) + 1)
            served[name], models[served[name].model] = _write_graph(
                folder, graphs / name, manifest, partial
            )
        models[PIPELINE] = _write_pipeline(graphs, origin, manifest, served, partial)
        write_listing(partial, _KIND, unhashed=[CHECKSUMS_NAME])
        _write_checksums(partial)
        total = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    progress("package", len(names) + 1, len(names) + 1)
    rtx = isinstance(opened, EngineFolder) and opened.backend == "tensorrt-rtx"
    notes = [_RTX_NOTE] if rtx else []
    return TritonPackageResult(output=str(final), models=models, bytes=total, notes=notes)


def _onnx_of(engines: EngineFolder, given: str | Path | None) -> StoredArtefact:
    """Open the ONNX folder of engines, whose graphs describe their inputs.

    Raises:
        ArtefactError: the folder is missing or has changed.
    """
    folder = find_origin(engines.folder, engines.manifest, given)
    if folder is None:
        raise ArtefactError(
            f"the ONNX folder that {engines.folder} was built from "
            f"({engines.manifest.source.name!r}) is missing or has changed; give its path with --onnx"
        )
    return open_folder(folder, "onnx")


def _write_graph(
    folder: Path, graph: Path, manifest: Manifest, out: Path
) -> tuple[ServedGraph, PackagedModel]:
    """Write the model of one graph and describe it."""
    name = graph.name
    model = load_graph(graph / MODEL_FILE)
    inputs, outputs = graph_specs(model.graph.inputs), graph_specs(model.graph.outputs)
    batched = all(spec.shape and spec.shape[0] in _BATCH_AXES for spec in inputs.values())
    model_name = DENOISER if name == manifest.denoiser else name
    served = ServedGraph(model_name, inputs, outputs, dict(model.metadata_props), batched)
    max_items = _max_items(name, manifest) if batched else 0
    version = out / model_name / "1"
    version.mkdir(parents=True)
    if manifest.kind == "engine":
        backend = "tensorrt"
        shutil.copyfile(folder / name / ENGINE_FILE, version / PLAN_NAME)
    else:
        backend = "onnxruntime"
        for file in (MODEL_FILE, DATA_NAME):
            if (graph / file).is_file():
                shutil.copyfile(graph / file, version / file)
    write_graph_config(
        out / model_name,
        served,
        manifest,
        max_items=max_items,
        dynamic_batching=batched and name == manifest.denoiser,
    )
    return served, _row(out / model_name, backend, max_items)


def _max_items(name: str, manifest: Manifest) -> int:
    """Maximum number of items per call by profile or export, doubled for guidance."""
    if isinstance(manifest.options, EngineOptions) and manifest.options.profiles:
        return min(int(shapes[2][0]) for shapes in manifest.options.profiles[name].values())
    max_images = _max_images(manifest)
    return 2 * max_images if name == manifest.denoiser else max_images


def _max_images(manifest: Manifest) -> int:
    return manifest.options.batch[1]


def _write_pipeline(
    graphs: Path, origin: Manifest, manifest: Manifest, served: Mapping[str, ServedGraph], out: Path
) -> PackagedModel:
    """Write the pipeline's model: the denoising loop and the components that are not graphs."""
    parts = out / PIPELINE / "1" / "parts"
    copy_parts(graphs, origin, parts)
    recipe = manifest.recipe
    settings = Settings(
        denoiser=manifest.denoiser,
        size=manifest.options.size,
        steps=(recipe.steps if recipe else None) or DEFAULT_STEPS,
        guidance=recipe.guidance if recipe else None,
        max_images=_max_images(manifest),
        graphs={name: graph.to_json() for name, graph in served.items()},
    )
    settings.write(parts)
    (parts / ARTEFACT_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (parts.parent / "model.py").write_text(MODEL_PY, encoding="utf-8")
    write_pipeline_config(out / PIPELINE, PIPELINE, _input_name(parts, manifest, served))
    return _row(out / PIPELINE, "python", 0)


def _input_name(parts: Path, manifest: Manifest, served: Mapping[str, ServedGraph]) -> str:
    """Name of the conditioning input: prompts, classes or a number of images."""
    source = engine_source(
        parts,
        manifest.denoiser,
        manifest.options.size,
        lambda name: TritonEngine(served[name], None) if name in served else None,
    )
    return request_input(source)


def _row(folder: Path, backend: str, max_items: int) -> PackagedModel:
    files = sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
    )
    return PackagedModel(backend=backend, max_batch_size=max_items, files=files)


def _write_checksums(folder: Path) -> None:
    """Write the hash of each file in the format of `sha256sum --check SHA256SUMS`."""
    lines = [
        f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n"
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
    (folder / CHECKSUMS_NAME).write_text("".join(lines), encoding="utf-8")
