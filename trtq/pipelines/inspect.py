"""Contents of an artefact: layers, bits, tables, sizes and origin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_rows import AxisRow, FurtherRow, GraphRow, LayerRow
from trtq.artefact.opened import EngineFolder, GraphFolder, Opened, StoredArtefact, open_artefact
from trtq.calls.form import CallForm
from trtq.diffusion.loading import open_pipeline
from trtq.engine.tensorrt.run import obstacle, open_tensorrt
from trtq.errors import UsageError
from trtq.graph.file import ENGINE_FILE, MODEL_FILE, graphs_of, model_file
from trtq.graph.runtimes.prepare import load_graph
from trtq.pipelines.graph_view import graph_view
from trtq.pipelines.result import (
    CheckpointLayer,
    InspectedArtefact,
    InspectedCheckpoint,
    InspectedDenoiser,
    InspectedEngines,
    InspectedGraph,
    InspectedLayer,
    InspectResult,
)
from trtq.quant import precision_text, quantizable_layers
from trtq.quant.plan import LowBitTensors
from trtq.runs.folder import open_run

__all__ = ["inspect"]


def inspect(artefact: str | Path | Opened | Any, *, graphs: bool = False) -> InspectResult:
    """Verify an artefact, and return its layers, bits, tables, sizes and origin.

    Args:
        artefact: a run, an ONNX or engine folder, a float checkpoint, or one of them opened.
        graphs: whether to show each graph or engine by polygraphy's inspector, too.

    Returns:
        An `InspectedCheckpoint`, an `InspectedArtefact`, or `InspectedEngines`.

    Raises:
        ArtefactError: the artefact cannot be read, or does not match its manifest.
        UsageError: the graphs of an artefact without graphs are requested.
        MissingDependencyError: polygraphy is not installed.
    """
    opened = open_artefact(artefact)
    if graphs and not isinstance(opened, GraphFolder):
        raise UsageError(
            f"{opened.place} has no graphs; give an ONNX folder or engines to --graphs"
        )
    if not isinstance(opened, StoredArtefact):
        return _checkpoint(opened.place, opened.config)
    folder, manifest = opened.folder, opened.manifest
    graph = folder / manifest.denoiser / MODEL_FILE
    if manifest.kind == "onnx" and graph.is_file():
        manifest.check_graph(load_graph(graph).metadata_props)
    stored = open_run(opened).stored.layers if manifest.kind == "run" else {}
    result = InspectedArtefact(
        kind=manifest.kind,
        source=manifest.source.name,
        bytes=sum((folder / name).stat().st_size for name in manifest.files),
        precisions=_precisions(manifest.layers),
        recipe=_recipe(manifest),
        timesteps=manifest.timesteps,
        layers=[_layer(row, stored.get(row.name)) for row in manifest.layers],
        options=manifest.options.to_json(),
        metrics=manifest.metrics.to_json(),
        packages=manifest.packages,
        denoisers=[_denoiser(row) for row in manifest.denoisers] or None,
        graphs=_graphs(opened) if graphs else None,
    )
    return _with_engine(result, opened) if isinstance(opened, EngineFolder) else result


def _graphs(opened: StoredArtefact) -> dict[str, str]:
    """Each graph or engine as polygraphy's inspector shows it."""
    backend = opened.backend if isinstance(opened, EngineFolder) else None
    reason = None if backend is None else obstacle(backend)
    if reason is not None:
        raise UsageError(f"polygraphy loads engines on a GPU to inspect them: {reason}")
    file = MODEL_FILE if backend is None else ENGINE_FILE
    folders = graphs_of(opened.manifest, file)
    return {name: graph_view(opened.folder / name / file, backend) for name in folders}


def _recipe(manifest: Manifest) -> dict[str, Any] | None:
    """The recipe; `training.split_scale` also has its former key `split_step` for one release."""
    if manifest.recipe is None:
        return None
    recipe = manifest.recipe.to_json()
    training = recipe.get("training") or {}
    for key, other in (("split_step", "split_scale"), ("split_scale", "split_step")):
        if other in training:
            training.setdefault(key, training[other])
    return recipe


def _layer(row: LayerRow, tensors: LowBitTensors | None) -> InspectedLayer:
    """A layer of the manifest, with its tables if the artefact is a run."""
    if tensors is None:
        return InspectedLayer(**row.model_dump())
    operands = tensors.operands
    return InspectedLayer(
        **row.model_dump(),
        scale={name: operand.scale.tolist() for name, operand in operands.items()},
        zero_points=sorted({-int(z) for operand in operands.values() for z in operand.low})
        if row.format == "int"
        else [],
    )


def _with_engine(result: InspectedArtefact, opened: EngineFolder) -> InspectedEngines:
    """Add the layers of the denoiser's engine, if a GPU can load the engine."""
    reason = obstacle(opened.backend)
    layers = None
    if reason is None:
        layers = open_tensorrt(
            model_file(opened.folder / opened.denoiser), opened.backend
        ).describe()
    known = {entry.name: getattr(result, entry.name) for entry in fields(result)}
    built = opened.manifest.metrics.engines
    counts = next((row.precisions for row in built if row.name == opened.denoiser), None)
    return InspectedEngines(
        **known, engine_layers=layers, engine_layers_missing=reason, low_bit_layers=counts or None
    )


def _precisions(layers: Sequence[LayerRow]) -> dict[str, int]:
    """Number of layers by precision."""
    return dict(
        Counter(
            precision_text(row.weight_bits, row.activation_bits, row.right_bits, row.format)
            for row in layers
        )
    )


def _denoiser(row: FurtherRow) -> InspectedDenoiser:
    """A recorded denoiser of the manifest."""
    recorded = row.recorded
    return InspectedDenoiser(
        name=row.denoiser,
        model=recorded.model,
        timestep=recorded.timestep,
        calls=recorded.calls,
        timesteps=row.timesteps,
        precisions=_precisions(row.layers),
        graphs=[_graph(graph) for graph in recorded.graphs],
    )


def _graph(row: GraphRow) -> InspectedGraph:
    def text(axis: AxisRow) -> str:
        limit = f"{axis.low} or more" if axis.high is None else f"{axis.low} .. {axis.high}"
        return f"axis {axis.axis}: {limit} ({axis.varies})"

    return InspectedGraph(
        folder=row.folder,
        inputs=CallForm(row.template).names,
        free={name: [text(axis) for axis in axes] for name, axes in row.free.items()},
        fixed=row.fixed,
    )


def _checkpoint(place: str | Path | Any, config: str | Path | None) -> InspectedCheckpoint:
    source = open_pipeline(place, config, recorded=True)
    layers = quantizable_layers(source.denoiser)
    return InspectedCheckpoint(
        kind="checkpoint",
        source=source.name,
        denoiser=type(source.denoiser).__name__,
        parameters=sum(p.numel() for p in source.denoiser.parameters()),
        scheduler=type(source.pipeline.scheduler).__name__,
        precisions={"float": len(layers)},
        layers=[
            CheckpointLayer(name=name, shape=list(module.get_parameter("weight").shape))
            for name, module in layers.items()
        ],
    )
