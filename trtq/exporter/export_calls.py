"""Export of a recorded pipeline, compared with torch inside the pipeline's own call."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trtq.artefact.contents import source_hashes
from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_file import made_from
from trtq.artefact.manifest_rows import FurtherRow, GraphRow, LayerRow, RecordedRow, SourceRow
from trtq.artefact.opened import Checkpoint, Opened
from trtq.calls.pipeline import RecordedPipeline
from trtq.calls.stored import CALL_FOLDER, save_call
from trtq.calls.survey import survey
from trtq.calls.user_call import UserCall
from trtq.checkpoint.components import denoisers_of
from trtq.checkpoint.layout import parse_size, parse_sizes
from trtq.diffusion.folder import save_pipeline_parts, skeleton
from trtq.diffusion.loading import open_pipeline
from trtq.engine.ort import OrtEngine
from trtq.engine.recorded import CallGraph, RecordedDenoiser
from trtq.errors import GateError
from trtq.exporter.call_graphs import ExportedDenoiser, RecordedGraph, write_call_graphs
from trtq.exporter.call_parity import form_parity, named_parities
from trtq.exporter.parity import StepParity
from trtq.exporter.step_check import PARITY_DB
from trtq.graph.file import MODEL_FILE
from trtq.quant import layer_kind, quantizable_layers
from trtq.runs.folder import open_run
from trtq.runs.given_calls import user_calls
from trtq.snr import EXACT_DB

__all__ = ["ExportedCalls", "export_calls", "float_rows", "sized_calls"]


@dataclass(frozen=True)
class _Source:
    """The pipeline to export.

    Attributes:
        source: the pipeline in torch, with the user's call.
        denoisers: the denoisers.
        manifest: manifest without graphs, options and metrics.
    """

    source: RecordedPipeline
    denoisers: Sequence[ExportedDenoiser]
    manifest: Manifest


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


def float_rows(denoiser: Any) -> list[LayerRow]:
    """Rows of the manifest for the layers of a float model."""
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


def _source_of(opened: Opened, changes: Mapping[str, Any], *, packed: bool) -> _Source:
    if isinstance(opened, Checkpoint):
        return _float_source(opened, changes)
    run = open_run(opened)
    source = run.source(packed=packed)
    assert isinstance(source, RecordedPipeline)
    source.call = source.call.updated(changes)
    source.call.check(source.pipeline)
    denoisers = [
        ExportedDenoiser(
            part.name, part.argument, row, part.stored.layers, part.table, part.float_skeleton
        )
        for part, row in zip(run.denoisers, run.manifest.denoisers, strict=True)
    ]
    manifest = run.manifest.model_copy(
        update={"kind": "onnx", "source": made_from(run.folder, run.manifest)}
    )
    return _Source(source, denoisers, manifest)


def _float_source(opened: Checkpoint, changes: Mapping[str, Any]) -> _Source:
    """A float checkpoint whose pipeline is called with the user's call, or with the default call."""
    loaded = open_pipeline(opened.place, opened.config, recorded=True)
    pipeline = loaded.pipeline
    (call,) = user_calls(loaded, inputs=changes)
    modules = denoisers_of(pipeline)
    denoisers = []
    for name, calls in survey(pipeline, modules, call).items():
        module = modules[name]
        recorded = RecordedRow(
            timestep=calls.argument, calls=len(calls.timesteps), model=type(module).__name__
        )
        row = FurtherRow(denoiser=name, layers=float_rows(module), recorded=recorded)
        fresh = partial(copy.deepcopy, module)
        denoisers.append(ExportedDenoiser(name, calls.argument, row, {}, None, fresh))
    source = RecordedPipeline(loaded.name, loaded.folder, pipeline, denoisers[0].name, call)
    files = source_hashes(loaded.folder) if loaded.folder is not None else {}
    first, *further = (part.row for part in denoisers)
    manifest = Manifest(
        kind="onnx",
        source=SourceRow(name=loaded.name, files=files),
        denoiser=first.denoiser,
        layers=first.layers,
        recorded=first.recorded,
        further=further,
    )
    return _Source(source, denoisers, manifest)


@dataclass(frozen=True)
class ExportedCalls:
    """Graphs that were written and compared with torch.

    Attributes:
        manifest: manifest without options and metrics.
        rows: agreement at each denoiser call of the real run.
        varied: agreement at one call that varies batch, prompt and size as far as the graphs allow.
    """

    manifest: Manifest
    rows: Sequence[StepParity]
    varied: Sequence[StepParity]

    def as_dict(self) -> dict[str, Any]:
        """The fields `parity_*` of `ExportResult`."""
        return {
            "parity_db_min": min(row.db for row in self.rows),
            "parity_db": [row.db for row in self.rows],
            "parity_db_pooled_min": min(row.pooled_db for row in self.rows),
            "parity_ties": sum(row.ties for row in self.rows) / len(self.rows),
            "parity_floor_db": [row.floor_db for row in self.rows],
            "parity_largest_db": min(row.db for row in self.varied),
        }


def export_calls(
    opened: Opened,
    folder: Path,
    *,
    size: str | None,
    precision: str,
    target: str,
    packed: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> ExportedCalls:
    """Write the graphs of a pipeline, and compare them with torch inside the pipeline's call.

    Args:
        opened: a recorded run, or a checkpoint as the float baseline.
        folder: new folder of the artefact.
        size: image size or range of sizes, see `sized_calls`.
        precision: see `trtq.exporter.export.export`.
        target: see `trtq.exporter.export.export`.
        packed: see `trtq.exporter.memory.keeps_packed`.
        changes: arguments of the call, in addition to the recorded ones.

    Returns:
        The manifest, and the agreement of graphs and torch.

    Raises:
        GateError: the SNR of a graph against torch is too low.
        LegalityError: a denoiser cannot be traced; the message says why.
    """
    origin = _source_of(opened, changes or {}, packed=packed)
    pipeline = origin.source.pipeline
    call, largest = sized_calls(origin.source.call, size)
    graphs, forms = write_call_graphs(
        folder,
        origin.denoisers,
        pipeline,
        call,
        largest,
        half=precision == "fp16",
        target=target,
    )
    names = [part.name for part in origin.denoisers]
    save_pipeline_parts(origin.source, folder, denoisers=names)
    save_call(call, folder / CALL_FOLDER)
    modules = {name: getattr(pipeline, name) for name in names}
    exported = {
        part.name: _opened(
            folder,
            part.row,
            [graph.row for graph in graphs if graph.denoiser == part.name],
            packed=packed,
        )
        for part in origin.denoisers
    }
    named = named_parities(pipeline, exported, call)
    rows = [row for _, row in named]
    others = [
        form_parity(name, modules[name], exported[name], form, _highest_floor(name, named))
        for name in names
        for form in forms
        if form.denoiser == name
    ]
    _check_parity([*rows, *others], PARITY_DB[precision])
    return ExportedCalls(_with_graphs(origin.manifest, graphs), rows, others)


def _opened(
    folder: Path, part: FurtherRow, rows: Sequence[GraphRow], *, packed: bool
) -> RecordedDenoiser:
    """A denoiser that runs on graphs that were just written."""
    graphs = [
        CallGraph(OrtEngine(folder / row.folder / MODEL_FILE, low_memory=True, packed=packed), row)
        for row in rows
    ]
    adapters = part.structure
    model = skeleton(folder, part.denoiser, adapters.ip_adapter, adapters.ip_adapter_scales)
    return RecordedDenoiser(part.denoiser, model, graphs)


def _highest_floor(denoiser: str, rows: Sequence[tuple[str, StepParity]]) -> float:
    """The highest floor of a denoiser's calls, in dB; above all values if no floor was measured."""
    floors = [row.floor_db for name, row in rows if name == denoiser]
    return max((db for db in floors if db < EXACT_DB), default=EXACT_DB)


def _check_parity(rows: Sequence[StepParity], min_db: float) -> None:
    if all(row.holds(min_db) for row in rows):
        return
    raise GateError(
        f"the exported graph agrees with torch to only {min(row.db for row in rows):.1f} dB; "
        f"{min_db:g} dB are required, or the SNR of torch against itself with layer inputs changed by "
        "their last bit; per call: "
        + ", ".join(f"{row.db:.1f} ({row.floor_db:.1f})" for row in rows)
    )


def _with_graphs(manifest: Manifest, graphs: Sequence[RecordedGraph]) -> Manifest:
    """The manifest with the graphs of every denoiser."""
    rows = []
    for row in manifest.denoisers:
        its_graphs = [graph.row for graph in graphs if graph.denoiser == row.denoiser]
        recorded = row.recorded.model_copy(update={"graphs": its_graphs})
        rows.append(row.model_copy(update={"recorded": recorded}))
    return manifest.model_copy(update={"recorded": rows[0].recorded, "further": rows[1:]})
