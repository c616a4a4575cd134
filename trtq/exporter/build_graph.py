"""Rewriting of one graph for a builder of engines, and the ranges of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_rows import FurtherRow, GraphRow
from trtq.artefact.opened import StoredArtefact
from trtq.calls.stored import CALL_FOLDER, load_call
from trtq.engine.call_profile import call_profile
from trtq.engine.profile import axis_ranges, profile_of
from trtq.engine.tensorrt.backends import Backend
from trtq.engine.tensorrt.job import Profile
from trtq.errors import LegalityError, UsageError
from trtq.exporter.build_targets import planned_precisions
from trtq.graph.file import DATA_NAME, MODEL_FILE
from trtq.graph.runtimes.format_rules import architecture_findings
from trtq.graph.runtimes.legality import check
from trtq.graph.runtimes.prepare import load_graph, prepare

__all__ = ["PreparedGraph", "denoiser_metadata", "prepare_graph"]

_NO_FLOAT32 = "sm75"
"""Architecture (Turing) for which TensorRT-RTX compiles no float32 products."""


@dataclass(frozen=True)
class PreparedGraph:
    """A graph that was rewritten for the backend.

    Attributes:
        profile: profile of the graph.
        floats: number of the manifest's layers that stay in float; None for a component that is float
            altogether.
        plan: planned precision of the low-bit layers.
    """

    profile: Profile
    floats: int | None
    plan: dict[str, str]


def prepare_graph(
    opened: StoredArtefact,
    name: str,
    out: Path,
    *,
    backend: Backend,
    architectures: Sequence[str],
    batch: tuple[int, int] | None,
    fuse: bool = True,
) -> PreparedGraph:
    """Rewrite a graph for the backend, and write it to a file.

    Args:
        opened: the ONNX folder.
        name: name of the graph's folder in it.
        out: file of the rewritten graph.
        backend: builder of the engine.
        architectures: GPU architectures to build for.
        batch: minimum and maximum batch size, in images; None: the batch sizes of the export.
        fuse: see `trtq.exporter.build.build`.

    Raises:
        LegalityError: the backend would refuse a layer, or compute it wrongly.
        UsageError: one of the architectures cannot compute the graph, or the range of an input is
            unknown.
    """
    import onnx_ir as ir

    folder, manifest = opened.folder, opened.manifest
    model = load_graph(folder / name / MODEL_FILE)
    part, row = _denoiser_of(manifest, name)
    floats: int | None = None
    plan: dict[str, str] = {}
    if part is not None:
        prepare(model, backend.name, fuse=fuse)
        findings = check(model, backend.name)
        fatal = [finding for finding in findings if finding.fatal]
        fatal += architecture_findings(model, architectures)
        if fatal:
            first = fatal[0]
            raise LegalityError(
                f"{backend.name} does not support the layer {first.layer!r}: {first.rule}; {first.fix}"
            )
        floats = sum(layer.activation_bits is None for layer in part.layers)
        plan = planned_precisions(part.layers, model, findings)
    if _NO_FLOAT32 in architectures and _computes_in_float32(model):
        raise UsageError(
            f"{_NO_FLOAT32} has no products in float32, and {name} has some; leave it out, or export a "
            "model without text encoders and autoencoder with --precision fp16"
        )
    if row is None:
        profile = profile_of(model, axis_ranges(folder, name, manifest, model, batch))
    else:
        images = load_call(folder / CALL_FOLDER).images
        profile = call_profile(row, model, batch or manifest.options.batch, images)
    ir.save(model, out, external_data=DATA_NAME)
    return PreparedGraph(profile, floats, plan)


def _denoiser_of(
    manifest: Manifest, name: str
) -> tuple[Manifest | FurtherRow | None, GraphRow | None]:
    """The denoiser that a graph belongs to, and the graph's entry if its call was recorded."""
    if manifest.recorded is None:
        return (manifest if name == manifest.denoiser else None), None
    for part in manifest.denoisers:
        for row in part.recorded.graphs:
            if row.folder == name:
                return part, row
    return None, None


def denoiser_metadata(opened: StoredArtefact) -> dict[str, dict[str, str]]:
    """Metadata of the denoisers' graphs by folder; an engine has none."""
    parts = opened.manifest.denoisers
    names = [row.folder for part in parts for row in part.recorded.graphs] or [opened.denoiser]
    return {
        name: dict(load_graph(opened.folder / name / MODEL_FILE).metadata_props) for name in names
    }


def _computes_in_float32(model: Any) -> bool:
    """Whether a product has a constant weight in float32."""
    return any(
        value is not None and value.const_value is not None and value.dtype.name == "FLOAT"
        for node in model.graph
        if node.op_type in ("Conv", "MatMul", "Gemm")
        for value in node.inputs[1:2]
    )
