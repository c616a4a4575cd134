"""Building of TensorRT engines from an ONNX folder, one per graph."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trtq.artefact.folder import check_output, claims_output, new_artefact
from trtq.artefact.manifest_file import made_from, write_manifest
from trtq.artefact.opened import Opened, StoredArtefact, open_onnx
from trtq.artefact.options import EngineOptions, Metrics
from trtq.artefact.recorded import is_recorded
from trtq.engine.tensorrt.backends import CURRENT, Backend, check_architectures, find_backend
from trtq.engine.tensorrt.compile import Compiled, compile_engine
from trtq.engine.tensorrt.job import Job, Profile
from trtq.engine.trial import TRIAL_SECONDS
from trtq.errors import MissingDependencyError, UsageError
from trtq.exporter.build_graph import denoiser_metadata, prepare_graph
from trtq.exporter.build_targets import check_plan, suitable_architectures
from trtq.exporter.graph_check import refuse_problems, require_graphs
from trtq.exporter.parts import copy_parts
from trtq.exporter.result import BuildResult, BuiltEngine
from trtq.exporter.verify_recorded import call_graph_problems
from trtq.graph.file import ENGINE_FILE, MODEL_FILE, graphs_of
from trtq.progress import ProgressCallback, silent

__all__ = ["build"]

logger = logging.getLogger(__name__)


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
    fuse: bool = True,
    use_cache: bool = True,
    overwrite: bool = False,
    timeout: float = TRIAL_SECONDS,
    progress: ProgressCallback = silent,
) -> BuildResult:
    """Build an engine of every graph in an ONNX folder.

    The profiles allow the batch and image sizes that the folder was exported for. If guidance doubles
    the denoiser's batch, its profile allows twice as many items.

    Args:
        artefact: an ONNX folder, or an opened one.
        out: the engine folder, in the same layout with `model.engine` in place of `model.onnx`.
        backend: `tensorrt-rtx` or `tensorrt`; None: the first installed backend.
        architectures: GPU architectures, e.g. `sm86`; by default those of current RTX cards, or the
            architecture of the GPU in this machine.
        batch: minimum and maximum batch size, in images; by default the batch sizes of the export.
        weight_streaming: let weights stay on the host, for models larger than the GPU's memory.
        refit: let weights be exchanged in the finished engine; needs a GPU while building.
        workspace_bytes: maximum scratch memory on the device for one operator; None: no limit.
        fuse: let the plugins of TensorRT-RTX engines compute what stands before and behind their layers.
        use_cache: reuse engines that were built before, and keep the new ones.
        overwrite: replace an existing engine folder.
        timeout: time limit, in seconds, for opening and calling one graph in onnxruntime beforehand.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        Sizes and durations, in total and for each engine.

    Raises:
        UsageError: the backend does not support the options, or there is no artefact.
        ArtefactError: the folder is not an ONNX folder, is damaged, or onnxruntime cannot open a graph.
        LegalityError: the backend would refuse a layer, or compute it wrongly.
        BuildError: the builder refused, crashed or was killed, or a low-bit layer does not run in its
            planned precision.
    """
    start = time.monotonic()
    chosen = find_backend(backend)
    settings = _Settings(
        backend=chosen,
        architectures=check_architectures(chosen, list(architectures)),
        batch=batch,
        weight_streaming=weight_streaming,
        refit=refit,
        workspace_bytes=workspace_bytes,
        fuse=fuse,
        use_cache=use_cache,
    )
    settings.check()
    final = check_output(Path(out), overwrite=overwrite, source=artefact, kind="engine")
    opened = _open(artefact, settings)
    if not architectures:
        suitable = suitable_architectures(settings.architectures, opened.manifest)
        settings = replace(settings, architectures=suitable)
    _check_opened(opened, timeout, progress)
    with new_artefact(final, kind="engine", overwrite=overwrite) as partial:
        engines, profiles = _build_graphs(opened, settings, partial, progress)
        copy_parts(opened.folder, opened.manifest, partial)
        result = BuildResult(
            engine_bytes=sum(engine.engine_bytes for engine in engines),
            seconds=round(time.monotonic() - start, 2),
            peak_rss_bytes=max(
                (row.peak_rss_bytes for row in engines if not row.cached), default=0
            ),
            backend=chosen.name,
            version=chosen.version,
            architectures=settings.architectures,
            engines=engines,
        )
        update = {
            "kind": "engine",
            "source": made_from(opened.folder, opened.manifest),
            "options": _options(opened, settings, profiles),
            "metrics": Metrics(**result.to_json()),
        }
        write_manifest(partial, opened.manifest.model_copy(update=update))
    return result


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The arguments of `build`."""

    backend: Backend
    architectures: list[str]
    batch: tuple[int, int] | None
    weight_streaming: bool
    refit: bool
    workspace_bytes: int | None
    fuse: bool
    use_cache: bool

    def check(self) -> None:
        """Raise unless the backend can build with these settings on this machine.

        Raises:
            UsageError: `refit` is set and there is no GPU.
        """
        if self.refit and self.backend.architectures and CURRENT not in self.architectures:
            raise UsageError(
                "refit engines can only be built where there is a GPU; pass --arch current there"
            )


def _open(place: str | Path | Opened, settings: _Settings) -> StoredArtefact:
    """The ONNX folder to build from.

    Raises:
        UsageError: there is no ONNX folder, or the settings do not suit it.
    """
    opened = open_onnx(place)
    if settings.weight_streaming and opened.manifest.options.target == "plugin":
        raise UsageError(
            "TensorRT streams no weights of plugins, and these are in 4 or 8 bits already; leave out "
            "--weight-streaming, or export with --target qdq"
        )
    return opened


def _build_graphs(
    opened: StoredArtefact, settings: _Settings, out: Path, progress: ProgressCallback
) -> tuple[list[BuiltEngine], dict[str, Profile]]:
    """Build the engine of every graph.

    Args:
        opened: the ONNX folder.
        settings: arguments of `build`.
        out: folder of the engines.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        The engines, and their profiles by graph.
    """
    graphs = graphs_of(opened.manifest)
    engines: list[BuiltEngine] = []
    profiles: dict[str, Profile] = {}
    for index, name in enumerate(graphs):
        progress("build", index, len(graphs))
        # Next to the result, since the system's temporary folder may be a small one in memory.
        with tempfile.TemporaryDirectory(prefix=".trtq-graph-", dir=out) as scratch:
            graph = Path(scratch) / MODEL_FILE
            prepared = prepare_graph(
                opened,
                name,
                graph,
                backend=settings.backend,
                architectures=settings.architectures,
                batch=settings.batch,
                fuse=settings.fuse,
            )
            profiles[name] = prepared.profile
            job = Job(
                module=settings.backend.module,
                graph=graph,
                engine=out / name / ENGINE_FILE,
                architectures=settings.architectures,
                profiles=[profiles[name]],
                weight_streaming=settings.weight_streaming,
                refit=settings.refit,
                workspace_bytes=settings.workspace_bytes,
                plan=prepared.plan,
            )
            job.engine.parent.mkdir()
            compiled = compile_engine(settings.backend, job, use_cache=settings.use_cache)
            check_plan(settings.backend.name, name, compiled.answer)
            engines.append(_row(name, compiled, prepared.floats))
    progress("build", len(graphs), len(graphs))
    return engines, profiles


def _options(
    opened: StoredArtefact, settings: _Settings, profiles: Mapping[str, Profile]
) -> EngineOptions:
    """The options for the manifest: the options of the export and of the build."""
    metadata = denoiser_metadata(opened)
    recorded = is_recorded(opened)
    options = {
        **opened.manifest.options.to_json(),
        "backend": settings.backend.name,
        "version": settings.backend.version,
        "architectures": settings.architectures,
        "weight_streaming": settings.weight_streaming,
        "refit": settings.refit,
        "workspace_bytes": settings.workspace_bytes,
        "fuse": settings.fuse,
        "profiles": dict(profiles),
        "graph_metadata": {} if recorded else metadata[opened.denoiser],
        "call_metadata": metadata if recorded else {},
    }
    if settings.batch is not None:
        options["batch"] = settings.batch
    return EngineOptions(**options)


def _check_opened(opened: StoredArtefact, timeout: float, progress: ProgressCallback) -> None:
    """Raise unless onnxruntime can open every graph, before a builder spends minutes on one.

    Raises:
        ArtefactError: onnxruntime cannot open a graph.
    """
    try:
        if is_recorded(opened):
            problems = call_graph_problems(opened, timeout, progress)
            refuse_problems(opened.folder, problems)
        else:
            require_graphs(opened.folder, opened.manifest, progress, seconds=timeout)
    except MissingDependencyError as err:
        logger.warning("the graphs are built without having been opened before: %s", err)


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
        precisions=answer.precisions,
        inspected=answer.inspected,
    )
