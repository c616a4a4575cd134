"""Checks of an ONNX folder that was recorded inside its pipeline's call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trtq.artefact.manifest_rows import GraphRow
from trtq.artefact.opened import StoredArtefact
from trtq.calls.pipeline import RecordedPipeline
from trtq.checkpoint.wording import one_line
from trtq.engine.trial import try_graph
from trtq.errors import ArtefactError, TrtqError
from trtq.exporter.call_parity import call_parities
from trtq.exporter.graph_check import refuse_damaged
from trtq.exporter.result import RuleFinding, RuntimeRules, VerifyResult
from trtq.exporter.step_check import PARITY_DB
from trtq.graph.file import MODEL_FILE
from trtq.graph.runtimes.legality import check
from trtq.graph.runtimes.prepare import load_graph, prepare
from trtq.pipelines.open import open_any
from trtq.progress import ProgressCallback
from trtq.runs.folder import OpenRun

__all__ = ["call_graph_problems", "compare_recorded", "verify_recorded"]


def call_graph_problems(
    opened: StoredArtefact, timeout: float, progress: ProgressCallback
) -> dict[str, str | None]:
    """Open and call each graph once, at its smallest sizes, and load the pipeline.

    Args:
        opened: the ONNX folder, whose files were compared with the manifest.
        timeout: time limit for one graph, in seconds.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        Problem of each graph, in one line, by folder of the graph; None for a graph without a problem.
    """
    rows = [row for part in opened.manifest.denoisers for row in part.recorded.graphs]
    problems: dict[str, str | None] = {}
    for index, row in enumerate(rows):
        progress("open in the runtime", index, len(rows))
        problems[row.folder] = _problem(opened, row, timeout)
    progress("open in the runtime", len(rows), len(rows))
    if not any(problems.values()):
        try:
            open_any(opened)
        except TrtqError as err:
            problems[rows[0].folder] = f"the pipeline cannot be loaded: {one_line(err)}"
    return problems


def verify_recorded(
    opened: StoredArtefact, runtimes: Sequence[str], timeout: float, progress: ProgressCallback
) -> VerifyResult:
    """Open and call each graph once, load the pipeline, and check the rules of the runtimes.

    Args:
        opened: the ONNX folder, whose files were compared with the manifest.
        runtimes: runtimes whose rules are checked.
        timeout: time limit for one graph, in seconds.
        progress: callback that receives the stage's name, the work done and the total.
    """
    folder, manifest = opened.folder, opened.manifest
    rows = [row for part in manifest.denoisers for row in part.recorded.graphs]
    graphs = call_graph_problems(opened, timeout, progress)
    rules: dict[str, RuntimeRules] = {}
    if not any(graphs.values()):
        models = [folder / row.folder / MODEL_FILE for row in rows]
        rules = {name: _rules(models, name) for name in runtimes}
    return VerifyResult(
        kind=opened.kind,
        files=len(manifest.files),
        ok=not any(graphs.values()) and all(checked.legal for checked in rules.values()),
        graphs=graphs,
        runtimes=rules,
    )


def _problem(opened: StoredArtefact, row: GraphRow, timeout: float) -> str | None:
    """The problem of a graph at its smallest sizes; None: the graph was opened and called."""
    file = opened.folder / row.folder / MODEL_FILE
    try:
        model = load_graph(file)
        refuse_damaged(model, row.folder, opened.manifest)
        sizes: dict[str, int] = {}
        for value in model.graph.inputs:
            free = {axis.axis: axis.low for axis in row.free.get(str(value.name), ())}
            for axis, length in enumerate(value.shape or ()):
                if isinstance(length, int):
                    continue
                if axis not in free:
                    raise ArtefactError(
                        f"the size of axis {axis} of its input {value.name!r} is not in the manifest"
                    )
                sizes[str(getattr(length, "value", length))] = free[axis]
    except (TrtqError, ValueError, AttributeError) as err:
        return one_line(err)
    return try_graph(file, sizes, "cpu", timeout).problem


def _rules(models: Sequence[Path], runtime: Any) -> RuntimeRules:
    """Check the graphs against the rules of a runtime."""
    findings = [
        finding
        for model in models
        for finding in check(prepare(load_graph(model), runtime), runtime)
    ]
    return RuntimeRules(
        legal=not any(finding.fatal for finding in findings),
        findings=[RuleFinding(**asdict(finding), former_fix=finding.fix) for finding in findings],
    )


def compare_recorded(
    result: VerifyResult, opened: StoredArtefact, run: OpenRun, progress: ProgressCallback
) -> VerifyResult:
    """Add the comparison of the graphs with the run, at every call of its denoisers.

    Args:
        result: result of `verify_recorded`.
        opened: the ONNX folder.
        run: the run that the folder was exported from.
        progress: callback that receives the stage's name, the work done and the total.
    """
    progress("compare with torch", 1, 2)
    exported = open_any(opened)
    assert isinstance(exported, RecordedPipeline)
    source = run.source()
    names = [part.name for part in run.denoisers]
    graphs = {name: getattr(exported.pipeline, name) for name in names}
    rows = call_parities(source.pipeline, graphs, exported.call)
    required = PARITY_DB[opened.precision]
    progress("compare with torch", 2, 2)
    return replace(
        result,
        ok=result.ok and all(row.holds(required) for row in rows),
        parity_db=[row.db for row in rows],
        parity_db_min=min(row.db for row in rows),
        parity_required_db=required,
    )
