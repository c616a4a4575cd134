"""An ONNX folder to TensorRT engines, one per graph."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from trtq.artefact.folder import check_output, claims_output, new_artefact
from trtq.artefact.manifest import MANIFEST_NAME, Manifest
from trtq.artefact.manifest_file import made_from, write_manifest
from trtq.artefact.opened import Opened, open_folder
from trtq.artefact.options import EngineOptions, Metrics
from trtq.engine.profile import axis_ranges, profile_of
from trtq.engine.tensorrt.backends import CURRENT, Backend, check_architectures, find_backend
from trtq.engine.tensorrt.compile import Compiled, compile_engine
from trtq.engine.tensorrt.job import Job, Profile
from trtq.engine.trial import TRIAL_SECONDS
from trtq.errors import LegalityError, MissingDependencyError, UsageError
from trtq.exporter.result import BuildResult, BuiltEngine
from trtq.graph.file import DATA_NAME, ENGINE_FILE, MODEL_FILE, graphs_of
from trtq.graph.runtimes.legality import check
from trtq.graph.runtimes.prepare import load_graph, prepare
from trtq.progress import ProgressCallback, silent

__all__ = ["build"]

logger = logging.getLogger(__name__)

_NO_FLOAT32 = "sm75"
"""TensorRT-RTX compiles no float32 product for Turing."""


@claims_output
def build(
    artefact: str | Path | Opened,
    out: str | Path,
    *,
    backend: str | None = None,
    architectures: Sequence[str] = (),
    batch: tuple[int, int] | None = None,
    weight_streaming: bool = False,
    refit: bool = False,
    workspace_bytes: int | None = None,
    use_cache: bool = True,
    overwrite: bool = False,
    timeout: float = TRIAL_SECONDS,
    progress: ProgressCallback = silent,
) -> BuildResult:
    """Build an engine of every graph in an ONNX folder.

    The profiles take the batch and sizes that the folder was exported for; the denoiser's twice as many
    items where guidance doubles them.

    Args:
        artefact: an ONNX folder, or the opened one.
        out: the engine folder: the same layout, `model.engine` in place of `model.onnx`.
        backend: `tensorrt-rtx` or `tensorrt`; None: the first that is installed.
        architectures: e.g. `sm86`; by default those of current RTX cards, or the GPU that is there.
        batch: smallest and largest number of images, instead of the export's.
        weight_streaming: let weights stay on the host, for models larger than the GPU's memory.
        refit: let weights be exchanged in the finished engine; needs a GPU while building.
        workspace_bytes: most device memory for one operator's scratch.
        use_cache: look for engines that were built before, and keep these.
        overwrite: replace an engine folder that is already there.
        timeout: max seconds for opening and calling one graph in onnxruntime before it is built.
        progress: called with the stage's name, the work done and the total.

    Returns:
        Sizes and durations, together and for each engine.

    Raises:
        UsageError: the backend cannot do what is asked, or there is no artefact.
        ArtefactError: it is no ONNX folder, damaged, or onnxruntime cannot open it.
        LegalityError: the backend would refuse a layer, or compute it wrongly.
        BuildError: the builder refused, crashed or was killed.
    """
    start = time.monotonic()
    chosen = find_backend(backend)
    targets = check_architectures(chosen, list(architectures))
    if refit and chosen.architectures and CURRENT not in targets:
        raise UsageError(
            "refit engines can only be built where there is a GPU; pass --arch current there"
        )
    final = check_output(Path(out), overwrite=overwrite, source=artefact, kind="engine")
    if not isinstance(artefact, Opened) and not (Path(artefact) / MANIFEST_NAME).is_file():
        raise UsageError(
            f"{artefact} is not an ONNX folder; make one first: trtq export RUN -o ONNX"
        )
    opened = open_folder(artefact, "onnx")
    folder, manifest = opened.folder, opened.manifest
    if weight_streaming and manifest.options.target == "plugin":
        raise UsageError(
            "TensorRT streams no weights of plugins, and these are in 4 or 8 bits already; leave out "
            "--weight-streaming, or export with --target qdq"
        )
    _check_opened(folder, manifest, timeout, progress)
    graphs = graphs_of(manifest)
    rows: list[BuiltEngine] = []
    profiles = {}
    with new_artefact(final, kind="engine", overwrite=overwrite) as partial:
        for index, name in enumerate(graphs):
            progress("build", index, len(graphs))
            # Beside the result, where there is room: the temporary folder may lie in memory.
            with tempfile.TemporaryDirectory(prefix=".trtq-graph-", dir=partial) as scratch:
                graph = Path(scratch) / MODEL_FILE
                profile, floats = _prepare(folder, name, graph, manifest, chosen, targets, batch)
                profiles[name] = profile
                job = Job(
                    module=chosen.module,
                    graph=graph,
                    engine=partial / name / ENGINE_FILE,
                    architectures=targets,
                    profiles=[profile],
                    weight_streaming=weight_streaming,
                    refit=refit,
                    workspace_bytes=workspace_bytes,
                )
                job.engine.parent.mkdir()
                rows.append(_row(name, compile_engine(chosen, job, use_cache=use_cache), floats))
        progress("build", len(graphs), len(graphs))
        _copy_parts(folder, manifest, partial)
        result = BuildResult(
            engine_bytes=sum(row.engine_bytes for row in rows),
            seconds=round(time.monotonic() - start, 2),
            peak_rss_bytes=max((row.peak_rss_bytes for row in rows if not row.cached), default=0),
            backend=chosen.name,
            version=chosen.version,
            architectures=targets,
            engines=rows,
        )
        options = {
            **manifest.options.to_json(),
            "backend": chosen.name,
            "version": chosen.version,
            "architectures": targets,
            "weight_streaming": weight_streaming,
            "refit": refit,
            "workspace_bytes": workspace_bytes,
            "profiles": profiles,
            "graph_metadata": dict(
                load_graph(folder / manifest.denoiser / MODEL_FILE).metadata_props
            ),
        }
        if batch is not None:
            options["batch"] = batch
        update = {
            "kind": "engine",
            "source": made_from(folder, manifest),
            "options": EngineOptions(**options),
            "metrics": Metrics(**result.to_json()),
        }
        write_manifest(partial, manifest.model_copy(update=update))
    return result


def _check_opened(
    folder: Path, manifest: Manifest, timeout: float, progress: ProgressCallback
) -> None:
    """Refuse what onnxruntime cannot open, before a builder spends minutes on it.

    Raises:
        ArtefactError: there is such a graph.
    """
    from trtq.exporter.graph_check import require_graphs  # It takes the ranges of axes from here.

    try:
        require_graphs(folder, manifest, progress, seconds=timeout)
    except MissingDependencyError as err:
        logger.warning("the graphs are built without having been opened before: %s", err)


def _prepare(
    folder: Path,
    name: str,
    out: Path,
    manifest: Manifest,
    backend: Backend,
    targets: Sequence[str],
    batch: tuple[int, int] | None,
) -> tuple[Profile, int | None]:
    """Write a graph as the backend takes it.

    Returns:
        The ranges of its inputs, and how many of the manifest's layers stay in float; None where there
        are no others.

    Raises:
        LegalityError: the backend would refuse a layer, or compute it wrongly.
        UsageError: one of the architectures cannot compute it.
    """
    import onnx_ir as ir

    model = load_graph(folder / name / MODEL_FILE)
    denoiser = name == manifest.denoiser
    floats = None
    if denoiser:
        prepare(model, backend.name)
        fatal = [finding for finding in check(model, backend.name) if finding.fatal]
        if fatal:
            first = fatal[0]
            raise LegalityError(
                f"{backend.name} does not take {first.layer!r}: {first.rule}; {first.fix}"
            )
        floats = sum(row.activation_bits is None for row in manifest.layers)
    if _NO_FLOAT32 in targets and _computes_in_float32(model):
        raise UsageError(
            f"{_NO_FLOAT32} has no products in float32, and {name} has some; leave it out, or export a "
            "model without text encoders and autoencoder with --precision fp16"
        )
    ranges = axis_ranges(folder, name, manifest, model, batch)
    profile = profile_of(model, ranges)
    ir.save(model, out, external_data=DATA_NAME)
    return profile, floats


def _computes_in_float32(model: Any) -> bool:
    """Whether a product has a constant weight in float32."""
    return any(
        value is not None and value.const_value is not None and value.dtype.name == "FLOAT"
        for node in model.graph
        if node.op_type in ("Conv", "MatMul", "Gemm")
        for value in node.inputs[1:2]
    )


def _row(name: str, compiled: Compiled, floats: int | None) -> BuiltEngine:
    answer = compiled.answer
    return BuiltEngine(
        name=name,
        engine_bytes=compiled.engine_bytes,
        layers=answer.layers,
        float_layers=floats,
        parse_seconds=round(answer.parse_seconds, 2),
        build_seconds=round(answer.build_seconds, 2),
        peak_rss_bytes=answer.peak_rss_bytes,
        cached=compiled.cached,
        warnings=answer.warnings,
        plugins=answer.plugins,
    )


def _copy_parts(folder: Path, manifest: Manifest, out: Path) -> None:
    """Everything of a pipeline that is no graph: configurations, tokenizers, the scheduler."""
    for name in manifest.files:
        if PurePosixPath(name).name in (MODEL_FILE, DATA_NAME):
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)
