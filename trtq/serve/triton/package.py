"""A Triton Inference Server model repository of an ONNX folder or of engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from trtq.artefact.files import sha256
from trtq.artefact.folder import check_output, claims_output, new_artefact
from trtq.artefact.listing import write_listing
from trtq.artefact.manifest import MANIFEST_NAME, Manifest
from trtq.artefact.manifest_file import find_origin
from trtq.artefact.opened import (
    DEFAULT_STEPS,
    EngineFolder,
    Opened,
    Run,
    StoredArtefact,
    open_folder,
)
from trtq.artefact.options import EngineOptions
from trtq.engine.base import TensorSpec, graph_specs
from trtq.engine.trial import TRIAL_SECONDS
from trtq.errors import ArtefactError, UsageError
from trtq.exporter.graph_check import require_graphs
from trtq.graph.file import DATA_NAME, ENGINE_FILE, MODEL_FILE, graphs_of
from trtq.graph.runtimes.prepare import load_graph
from trtq.pipelines.open import engine_source
from trtq.progress import ProgressCallback, silent
from trtq.results import Result
from trtq.serve.triton import model as triton_model
from trtq.serve.triton.engine import ServedGraph, TritonEngine
from trtq.serve.triton.pipeline import Settings, request_input

__all__ = ["CHECKSUMS_NAME", "PackagedModel", "TritonPackageResult", "package_triton"]

CHECKSUMS_NAME = "SHA256SUMS"
ARTEFACT_NAME = "artefact.json"
"""The manifest of what was packaged: its layers, timesteps, LoRAs, hashes and versions."""
DENOISER, PIPELINE = "denoiser", "pipeline"
_KIND = "triton"
_PLAN = "model.plan"
_INSTANCES = 4
"""Of the pipeline. While the call of one runs, those of the others wait and are put together; of two
instances, one waits alone."""
_QUEUE_MICROSECONDS = 500
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "bool": "TYPE_BOOL",
}
_ONE_BATCH = ("batch", "timesteps")
"""Names of first axes that grow with the number of items."""
_RTX_NOTE = (
    "these engines are of TensorRT-RTX; the tensorrt backend of NVIDIA's own server images reads "
    "engines of full TensorRT (trtq build --backend tensorrt, on the GPU that serves)"
)


@dataclass(frozen=True, kw_only=True)
class PackagedModel(Result):
    """One model of the repository.

    Attributes:
        backend: Triton backend that runs it.
        max_batch_size: maximum batch size; 0 if the server must not batch.
        files: its files.
    """

    backend: str
    max_batch_size: int
    files: list[str]


@dataclass(frozen=True, kw_only=True)
class TritonPackageResult(Result):
    """A finished model repository.

    Attributes:
        output: its folder.
        models: its models by name.
        bytes: size of all files.
        notes: sentences for the reader.
    """

    output: str
    models: dict[str, PackagedModel]
    bytes: int
    notes: list[str]


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

    The pipeline's model is Python: the denoising loop, with calls to the others. Its step index is one
    per item, so the server may put denoiser calls of different requests, at different steps, together.

    Args:
        artefact: an ONNX folder, whose graphs the onnxruntime backend runs, or an engine folder.
        out: the repository; new.
        onnx: the ONNX folder that engines were built from, if it no longer lies beside them.
        overwrite: replace a repository of ours that is already there.
        timeout: max seconds for opening and calling one graph in onnxruntime before it is packaged.
        progress: called with the stage's name, the work done and the total.

    Raises:
        UsageError: it is neither, or something is in the way.
        ArtefactError: it is damaged, onnxruntime does not open its graphs, or the ONNX folder of engines
            is not to be found.
    """
    opened = _open(artefact)
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


def _open(place: str | Path | Opened) -> StoredArtefact:
    """The ONNX or engine folder to package."""
    if not isinstance(place, Opened) and not (Path(place) / MANIFEST_NAME).is_file():
        raise UsageError(
            f"{place} is no artefact of trtq; make an ONNX folder first: trtq export RUN -o ONNX"
        )
    opened = open_folder(place)
    if isinstance(opened, Run):
        raise UsageError(
            f"{opened.folder} is a run, which no server loads; export it first: trtq export "
            f"{opened.folder} -o ONNX"
        )
    return opened


def _onnx_of(engines: EngineFolder, given: str | Path | None) -> StoredArtefact:
    """The ONNX folder of engines, which describes their inputs."""
    folder = find_origin(engines.folder, engines.manifest, given)
    if folder is None:
        raise ArtefactError(
            f"the ONNX folder that {engines.folder} was built from "
            f"({engines.manifest.source.name!r}) is not beside it and unchanged; say where it is with "
            "--onnx"
        )
    return open_folder(folder, "onnx")


def _write_graph(
    folder: Path, graph: Path, manifest: Manifest, out: Path
) -> tuple[ServedGraph, PackagedModel]:
    """One graph as a model."""
    name = graph.name
    model = load_graph(graph / MODEL_FILE)
    inputs, outputs = graph_specs(model.graph.inputs), graph_specs(model.graph.outputs)
    batched = all(spec.shape and spec.shape[0] in _ONE_BATCH for spec in inputs.values())
    shown = DENOISER if name == manifest.denoiser else name
    served = ServedGraph(shown, inputs, outputs, dict(model.metadata_props), batched)
    most = _max_items(name, manifest) if batched else 0
    version = out / shown / "1"
    version.mkdir(parents=True)
    engine = manifest.kind == "engine"
    if engine:
        shutil.copyfile(folder / name / ENGINE_FILE, version / _PLAN)
    else:
        for file in (MODEL_FILE, DATA_NAME):
            if (graph / file).is_file():
                shutil.copyfile(graph / file, version / file)
    lines = [f"name: {_text(shown)}"]
    lines += ['platform: "tensorrt_plan"'] if engine else ['backend: "onnxruntime"']
    lines += _engine_lines(manifest) if engine else [f"default_model_filename: {_text(MODEL_FILE)}"]
    lines.append(f"max_batch_size: {most}")
    lines += [_tensor("input", key, spec, batched=batched) for key, spec in inputs.items()]
    lines += [_tensor("output", key, spec, batched=batched) for key, spec in outputs.items()]
    if batched and name == manifest.denoiser:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {_QUEUE_MICROSECONDS} }}")
    _write_config(out / shown, lines)
    backend = "tensorrt" if engine else "onnxruntime"
    return served, _row(out / shown, backend, most)


def _max_items(name: str, manifest: Manifest) -> int:
    """Most items of one call: of an engine its profile's, else the export's, twice for guidance."""
    if isinstance(manifest.options, EngineOptions) and manifest.options.profiles:
        return min(int(shapes[2][0]) for shapes in manifest.options.profiles[name].values())
    most = _max_images(manifest)
    return 2 * most if name == manifest.denoiser else most


def _max_images(manifest: Manifest) -> int:
    return manifest.options.batch[1]


def _engine_lines(manifest: Manifest) -> list[str]:
    """The plan of each compute capability: TensorRT-RTX puts all into one file."""
    lines = [f"default_model_filename: {_text(_PLAN)}"]
    assert isinstance(manifest.options, EngineOptions)
    for architecture in manifest.options.architectures or ():
        digits = architecture.removeprefix("sm")
        if digits.isdigit():
            capability = f"{digits[:-1]}.{digits[-1]}"
            lines.append(f"cc_model_filenames {{ key: {_text(capability)} value: {_text(_PLAN)} }}")
    return lines


def _text(value: str) -> str:
    return json.dumps(value)


def _tensor(direction: str, name: str, spec: TensorSpec, *, batched: bool) -> str:
    """One `input` or `output`; the server leaves out the batch axis of a batched model."""
    shape = [size if isinstance(size, int) else -1 for size in spec.shape]
    sizes = shape[1:] if batched else shape
    reshaped = "" if sizes else " reshape { shape: [ ] }"
    dims = ", ".join(str(size) for size in sizes or [1])
    kind = _TYPES[spec.dtype.name]
    return f"{direction} {{ name: {_text(name)} data_type: {kind} dims: [ {dims} ]{reshaped} }}"


def _write_pipeline(
    graphs: Path, origin: Manifest, manifest: Manifest, served: Mapping[str, ServedGraph], out: Path
) -> PackagedModel:
    """The loop, and everything of the pipeline that is no graph."""
    parts = out / PIPELINE / "1" / "parts"
    for name in origin.files:
        if PurePosixPath(name).name not in (MODEL_FILE, DATA_NAME):
            (parts / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(graphs / name, parts / name)
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
    shutil.copyfile(str(triton_model.__file__), parts.parent / "model.py")
    lines = [f"name: {_text(PIPELINE)}", 'backend: "python"', "max_batch_size: 0"]
    lines += _request_lines(parts, manifest, served)
    lines.append(
        'output { name: "images" data_type: TYPE_UINT8 dims: [ -1, -1, -1, -1 ] }',
    )
    lines.append(f"instance_group {{ count: {_INSTANCES} kind: KIND_CPU }}")
    _write_config(out / PIPELINE, lines)
    return _row(out / PIPELINE, "python", 0)


def _request_lines(parts: Path, manifest: Manifest, served: Mapping[str, ServedGraph]) -> list[str]:
    """What a request says: prompts, classes or a number of images, and how to draw them."""
    source = engine_source(
        parts,
        manifest.denoiser,
        manifest.options.size,
        lambda name: TritonEngine(served[name], None) if name in served else None,
    )
    name = request_input(source)
    kind = "TYPE_STRING" if name == "prompt" else "TYPE_INT64"
    size = 1 if name == "count" else -1
    first = f"input {{ name: {_text(name)} data_type: {kind} dims: [ {size} ] }}"
    options = {"seed": "TYPE_INT64", "steps": "TYPE_INT32", "guidance": "TYPE_FP32"}
    return [first] + [
        f"input {{ name: {_text(name)} data_type: {kind} dims: [ 1 ] optional: true }}"
        for name, kind in options.items()
    ]


def _write_config(folder: Path, lines: list[str]) -> None:
    (folder / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(folder: Path, backend: str, most: int) -> PackagedModel:
    files = sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
    )
    return PackagedModel(backend=backend, max_batch_size=most, files=files)


def _write_checksums(folder: Path) -> None:
    """As `sha256sum --check SHA256SUMS` reads them."""
    lines = [
        f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n"
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
    (folder / CHECKSUMS_NAME).write_text("".join(lines), encoding="utf-8")
