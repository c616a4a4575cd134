"""Export of a recorded run: one graph per form of a denoiser's call, compared inside the real run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtq.artefact.graph_metadata import LAYERS_KEY, TIMESTEPS_KEY
from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_file import made_from
from trtq.artefact.manifest_rows import AxisRow, FurtherRow, GraphRow, layer_kinds
from trtq.artefact.opened import StoredArtefact
from trtq.calls.form import flatten_value
from trtq.calls.pipeline import RecordedPipeline
from trtq.calls.stored import CALL_FOLDER, save_call
from trtq.calls.user_call import UserCall
from trtq.calls.variations import VariedForm, varied_forms
from trtq.diffusion.folder import save_pipeline_parts, skeleton
from trtq.diffusion.layout import parse_size, parse_sizes
from trtq.engine.ort import OrtEngine
from trtq.engine.recorded import CallGraph, RecordedDenoiser
from trtq.errors import GateError, LegalityError
from trtq.exporter.call_parity import call_parities, form_parity
from trtq.exporter.parity import StepParity
from trtq.exporter.step_check import PARITY_DB
from trtq.exporter.trace_call import trace_call
from trtq.graph.file import MODEL_FILE, save_graph
from trtq.graph.nodes import LOW_BIT_OPERATORS
from trtq.graph.passes import (
    CastLayerNormToFloat64,
    DecomposeGroupNorm,
    DecomposeSilu,
    DecomposeTimestepEmbedding,
    DropNoopSqueeze,
    ExpandLowBitToQdq,
    LowBitToPlugins,
)
from trtq.graph.passes.step_lookup import StepInput
from trtq.quant.convert import deploy_timesteps
from trtq.runs.folder import OpenRun, RunDenoiser, open_run

__all__ = ["RecordedGraph", "export_calls", "sized_calls", "write_call_graphs"]

_MAX_FORMS = 8
"""Maximum number of graphs of one denoiser; pipelines need one or two."""
_PRODUCTS = ("LowBitMatMul",)


@dataclass(frozen=True)
class RecordedGraph:
    """A written graph.

    Attributes:
        denoiser: name of the component.
        row: entry of the graph in the manifest.
    """

    denoiser: str
    row: GraphRow


def sized_calls(call: UserCall, size: str | None) -> tuple[UserCall, tuple[int, int] | None]:
    """The user's call at the smallest size, and the largest size of a range.

    Args:
        call: the user's call.
        size: `HEIGHTxWIDTH` in pixels, or a range `SMALLEST:LARGEST`; None: the size of the call.

    Raises:
        UsageError: the size cannot be parsed.
    """
    if size is None:
        return call, None
    smallest, largest = parse_sizes(size)
    height, width = parse_size(smallest)
    sized = call.updated({"height": height, "width": width})
    return sized, None if smallest == largest else parse_size(largest)


def write_call_graphs(
    folder: Path,
    run: OpenRun,
    pipeline: Any,
    call: UserCall,
    largest: tuple[int, int] | None,
    *,
    half: bool,
    target: str,
) -> tuple[list[RecordedGraph], list[VariedForm]]:
    """Write the graphs of every denoiser of a recorded run, without checks.

    Args:
        folder: folder of the artefact; each graph gets a folder in it.
        run: the run.
        pipeline: the run's pipeline in torch.
        call: the user's call, at the smallest size.
        largest: largest height and width in pixels; None: one size.
        half: whether everything except integers is in half precision.
        target: form of the low-bit layers, see `trtq.exporter.export.export`.

    Returns:
        The graphs, and the forms of the calls in the same order.

    Raises:
        LegalityError: a denoiser cannot be traced, or is called with another structure at each step.
    """
    modules = {part.name: getattr(pipeline, part.name) for part in run.denoisers}
    forms = varied_forms(pipeline, modules, call, largest=largest)
    graphs = []
    for part, row in zip(run.denoisers, run.manifest.denoisers, strict=True):
        its_forms = [form for form in forms if form.denoiser == part.name]
        _check_forms(part.name, its_forms)
        for index, form in enumerate(its_forms):
            place = part.name if index == 0 else f"{part.name}.form{index + 1}"
            graph = _write(folder / place, part, row, form, half=half, target=target)
            graphs.append(RecordedGraph(part.name, graph))
    return graphs, forms


def _check_forms(name: str, forms: Sequence[VariedForm]) -> None:
    """Raise unless the denoiser is called in few forms that a file can describe."""
    for form in forms:
        if form.form.opaque:
            raise LegalityError(
                f"{name} is called with {form.form.opaque[0]}, which a graph cannot hold; the run works "
                "in torch"
            )
    if len(forms) > _MAX_FORMS:
        first, second = forms[0].form.template, forms[1].form.template
        changing = [key for key in first if first[key] != second.get(key)]
        raise LegalityError(
            f"{name} is called with {len(forms)} different structures during one call of the pipeline "
            f"({', '.join(changing) or 'its arguments'} change); a graph is needed for each, at most "
            f"{_MAX_FORMS}; the run works in torch"
        )


def _write(
    folder: Path, part: RunDenoiser, row: FurtherRow, form: VariedForm, *, half: bool, target: str
) -> GraphRow:
    model = part.float_skeleton()
    deploy_timesteps(model)
    layers = part.stored.layers
    traced = trace_call(
        model,
        form.form,
        form.tensors,
        set(layers),
        free={path: [axis.axis for axis in axes] for path, axes in form.free.items()},
        half=half,
        full_precision=[part.argument],
    )
    graph = traced.model
    for rewrite in (
        DropNoopSqueeze(),
        DecomposeGroupNorm(),
        CastLayerNormToFloat64(),
        DecomposeSilu(),
        DecomposeTimestepEmbedding(),
    ):
        rewrite(graph)
    step = StepInput(part.argument, per_item=False)
    operators = _PRODUCTS if target == "plugin" else LOW_BIT_OPERATORS
    ExpandLowBitToQdq(layers, part.table, operators, timestep=step)(graph)
    LowBitToPlugins(layers, part.table, timestep=step)(graph)
    graph.metadata_props[TIMESTEPS_KEY] = json.dumps(part.table.timesteps.tolist())
    graph.metadata_props[LAYERS_KEY] = json.dumps(layer_kinds(row.layers))
    save_graph(graph, folder)
    free = {
        path: [
            AxisRow(axis=axis.axis, varies=axis.varies, low=axis.low, high=axis.high)  # type: ignore[arg-type]
            for axis in axes
            if axis.axis in traced.free.get(path, ())
        ]
        for path, axes in form.free.items()
    }
    return GraphRow(
        folder=folder.name,
        template=form.form.template,
        output=_output_template(traced.outputs),
        free={path: axes for path, axes in free.items() if axes},
        fixed=form.fixed | _fixed_by_torch(form, traced.free),
    )


def _fixed_by_torch(form: VariedForm, free: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Variations of which no axis is free in the graph, since torch fixed all of them."""
    wanted: dict[str, list[bool]] = {}
    for path, axes in form.free.items():
        for axis in axes:
            wanted.setdefault(axis.varies, []).append(axis.axis in free.get(path, ()))
    return {
        what: "the model's code fixes it while it is traced"
        for what, kept in wanted.items()
        if not any(kept)
    }


def _output_template(outputs: Any) -> dict[str, Any]:
    """Nesting of a result whose tensors are names of the graph's outputs."""
    if isinstance(outputs, str):
        return {"tensor": outputs}
    if isinstance(outputs, list | tuple):
        kind = "list" if isinstance(outputs, list) else "tuple"
        return {kind: [_output_template(item) for item in outputs]}
    if isinstance(outputs, dict):
        return {"dict": {key: _output_template(item) for key, item in outputs.items()}}
    return flatten_value(outputs, "output", {}, {})


def export_calls(
    opened: StoredArtefact,
    folder: Path,
    *,
    size: str | None,
    precision: str,
    target: str,
    changes: Mapping[str, Any] | None = None,
) -> tuple[Manifest, dict[str, Any]]:
    """Write the graphs of a recorded run, and compare them with torch inside the pipeline's call.

    Args:
        opened: the run.
        folder: new folder of the artefact.
        size: image size or range of sizes, see `sized_calls`.
        precision: see `trtq.exporter.export.export`.
        target: see `trtq.exporter.export.export`.
        changes: other values for arguments of the recorded call.

    Returns:
        The manifest without options and metrics, and the fields `parity_*` of `ExportResult`.

    Raises:
        GateError: the SNR of a graph against torch is too low.
        LegalityError: a denoiser cannot be traced; the message says why.
    """
    run = open_run(opened)
    source = run.source()
    assert isinstance(source, RecordedPipeline)
    pipeline = source.pipeline
    changed = source.call.updated(changes or {})
    changed.check(pipeline)
    call, largest = sized_calls(changed, size)
    graphs, forms = write_call_graphs(
        folder, run, pipeline, call, largest, half=precision == "fp16", target=target
    )
    names = [part.name for part in run.denoisers]
    save_pipeline_parts(source, folder, denoisers=names)
    save_call(call, folder / CALL_FOLDER)
    modules = {name: getattr(pipeline, name) for name in names}
    exported = {
        name: _opened(folder, name, [graph.row for graph in graphs if graph.denoiser == name])
        for name in names
    }
    rows = call_parities(pipeline, exported, call)
    others = [
        form_parity(name, modules[name], exported[name], form.form, form.tensors)
        for name in names
        for form in forms
        if form.denoiser == name
    ]
    _check_parity([*rows, *others], PARITY_DB[precision])
    fields = {
        "parity_db_min": min(row.db for row in [*rows, *others]),
        "parity_db": [row.db for row in rows],
        "parity_db_pooled_min": min(row.pooled_db for row in [*rows, *others]),
        "parity_ties": sum(row.ties for row in rows) / len(rows),
        "parity_floor_db": [row.floor_db for row in rows],
        "parity_largest_db": min(row.db for row in others),
    }
    return _manifest(run, graphs), fields


def _opened(folder: Path, name: str, rows: Sequence[GraphRow]) -> RecordedDenoiser:
    """A denoiser that runs on graphs that were just written."""
    graphs = [
        CallGraph(OrtEngine(folder / row.folder / MODEL_FILE, low_memory=True), row) for row in rows
    ]
    return RecordedDenoiser(name, skeleton(folder, name), graphs)


def _check_parity(rows: Sequence[StepParity], min_db: float) -> None:
    if all(row.holds(min_db) for row in rows):
        return
    raise GateError(
        f"the exported graph agrees with torch to only {min(row.db for row in rows):.1f} dB; "
        f"{min_db:g} dB are required, or the SNR of torch against itself with layer inputs changed by "
        "their last bit; per call: "
        + ", ".join(f"{row.db:.1f} ({row.floor_db:.1f})" for row in rows)
    )


def _manifest(run: OpenRun, graphs: Sequence[RecordedGraph]) -> Manifest:
    """The manifest of the ONNX folder, without options and metrics."""
    source = made_from(run.folder, run.manifest)
    rows = [
        row.model_copy(
            update={
                "recorded": row.recorded.model_copy(
                    update={"graphs": [g.row for g in graphs if g.denoiser == row.denoiser]}
                )
            }
        )
        for row in run.manifest.denoisers
    ]
    return run.manifest.model_copy(
        update={
            "kind": "onnx",
            "source": source,
            "recorded": rows[0].recorded,
            "further": rows[1:],
        }
    )
