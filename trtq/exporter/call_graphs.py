"""Graphs of recorded denoisers: one per form of a denoiser's call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trtq.artefact.graph_metadata import LAYERS_KEY, TIMESTEPS_KEY
from trtq.artefact.manifest_rows import AxisRow, FurtherRow, GraphRow, layer_kinds
from trtq.calls.form import flatten_value
from trtq.calls.processors import described_processors, with_processors
from trtq.calls.user_call import UserCall
from trtq.calls.variations import VariedForm, varied_forms
from trtq.errors import LegalityError
from trtq.exporter.trace_call import TracedCall, trace_call
from trtq.graph.file import save_graph
from trtq.graph.nodes import LOW_BIT_OPERATORS, WITHOUT_PLUGIN
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
from trtq.quant import TimestepTable
from trtq.quant.convert import deploy_timesteps
from trtq.quant.plan import LowBitTensors

__all__ = ["ExportedDenoiser", "RecordedGraph", "write_call_graphs"]

_MAX_FORMS = 8
"""Maximum number of graphs of one denoiser; pipelines need one or two."""


@dataclass(frozen=True)
class ExportedDenoiser:
    """A denoiser to export.

    Attributes:
        name: name of the component.
        argument: path of the timestep in the denoiser's call.
        row: entry of the denoiser in the manifest, without graphs.
        layers: tensors of the low-bit layers by path; empty for a float model.
        table: the calibrated timesteps; None for a float model.
        fresh: function that returns a float model, or the float skeleton of a run, to be changed.
    """

    name: str
    argument: str
    row: FurtherRow
    layers: Mapping[str, LowBitTensors]
    table: TimestepTable | None
    fresh: Callable[[], nn.Module]


@dataclass(frozen=True)
class RecordedGraph:
    """A written graph.

    Attributes:
        denoiser: name of the component.
        row: entry of the graph in the manifest.
    """

    denoiser: str
    row: GraphRow


def write_call_graphs(
    folder: Path,
    denoisers: Sequence[ExportedDenoiser],
    pipeline: Any,
    call: UserCall,
    largest: tuple[int, int] | None,
    *,
    half: bool,
    target: str,
) -> tuple[list[RecordedGraph], list[VariedForm]]:
    """Write the graphs of every denoiser of a pipeline, without checks.

    Args:
        folder: folder of the artefact; each graph gets a folder in it.
        denoisers: the denoisers.
        pipeline: the pipeline in torch.
        call: the user's call, at the smallest size.
        largest: largest height and width in pixels; None: one size.
        half: whether everything except integers is in half precision.
        target: form of the low-bit layers, see `trtq.exporter.export.export`.

    Returns:
        The graphs, and the forms of the calls in the same order.

    Raises:
        LegalityError: a denoiser cannot be traced, or is called with another structure at each step.
    """
    modules = {part.name: getattr(pipeline, part.name) for part in denoisers}
    fixed: dict[str, str] = {}
    while True:
        forms = varied_forms(pipeline, modules, call, largest=largest, fixed=fixed)
        traced, newly_fixed = _trace_all(denoisers, forms, half=half)
        if not newly_fixed:
            break
        fixed |= newly_fixed
    graphs = []
    for part in denoisers:
        for index, (form, graph) in enumerate(traced[part.name]):
            place = part.name if index == 0 else f"{part.name}.form{index + 1}"
            row = _write(folder / place, part, form, graph, target=target)
            graphs.append(RecordedGraph(part.name, row))
    return graphs, forms


_Traced = dict[str, list[tuple[VariedForm, TracedCall]]]


def _trace_all(
    denoisers: Sequence[ExportedDenoiser], forms: Sequence[VariedForm], *, half: bool
) -> tuple[_Traced, dict[str, str]]:
    """Trace every form of every denoiser.

    torch fixes an axis to its size in the example if the model's code depends on the size, or fails. The
    example is not the user's call, so it must be traced again without that variation.

    Returns:
        The graphs by denoiser, and the reason why something cannot vary, as in `VariedForm.fixed`; the
        graphs are of use only if there is no such reason.

    Raises:
        LegalityError: a denoiser cannot be traced with fixed axes either.
    """
    traced: _Traced = {}
    for part in denoisers:
        its_forms = [form for form in forms if form.denoiser == part.name]
        _check_forms(part.name, its_forms)
        traced[part.name] = []
        for form in its_forms:
            try:
                graph = _trace(part, form, half=half)
            except LegalityError as err:
                varied = {axis.varies for axes in form.free.values() for axis in axes}
                if not varied:
                    raise
                return {}, dict.fromkeys(varied, str(err))
            traced[part.name].append((form, graph))
    newly_fixed = {
        what
        for rows in traced.values()
        for form, graph in rows
        for what in _fixed_by_torch(form, graph.free)
    }
    return traced, dict.fromkeys(newly_fixed, "the model's code fixes it while it is traced")


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


def _trace(part: ExportedDenoiser, form: VariedForm, *, half: bool) -> TracedCall:
    model = part.fresh()
    if part.layers:
        deploy_timesteps(model)
    with with_processors(model, form.processors):
        return trace_call(
            model,
            form.form,
            form.tensors,
            set(part.layers),
            free={path: [axis.axis for axis in axes] for path, axes in form.free.items()},
            half=half,
            full_precision=[part.argument],
        )


def _write(
    folder: Path, part: ExportedDenoiser, form: VariedForm, traced: TracedCall, *, target: str
) -> GraphRow:
    layers = part.layers
    graph = traced.model
    for rewrite in (
        DropNoopSqueeze(),
        DecomposeGroupNorm(),
        CastLayerNormToFloat64(),
        DecomposeSilu(),
        DecomposeTimestepEmbedding(),
    ):
        rewrite(graph)
    if part.table is not None:
        step = StepInput(part.argument, per_item=False)
        operators = WITHOUT_PLUGIN if target == "plugin" else LOW_BIT_OPERATORS
        ExpandLowBitToQdq(layers, part.table, operators, timestep=step)(graph)
        LowBitToPlugins(layers, part.table, timestep=step)(graph)
        graph.metadata_props[TIMESTEPS_KEY] = json.dumps(part.table.timesteps.tolist())
        graph.metadata_props[LAYERS_KEY] = json.dumps(layer_kinds(part.row.layers))
    save_graph(graph, folder)
    free = {path: [AxisRow(**asdict(axis)) for axis in axes] for path, axes in form.free.items()}
    return GraphRow(
        folder=folder.name,
        template=form.form.template,
        output=_output_template(traced.outputs),
        free=free,
        fixed=form.fixed,
        processors=described_processors(form.processors),
    )


def _fixed_by_torch(form: VariedForm, free: Mapping[str, Sequence[int]]) -> set[str]:
    """Variations with an axis that torch fixed to its size in the example."""
    return {
        axis.varies
        for path, axes in form.free.items()
        for axis in axes
        if axis.axis not in free.get(path, ())
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
