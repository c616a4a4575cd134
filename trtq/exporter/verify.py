"""Verify an artefact: file hashes, runtime restrictions, and parity with torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trtq.artefact.files import sha256
from trtq.artefact.manifest import MANIFEST_NAME, Manifest
from trtq.artefact.opened import Opened, Run, StoredArtefact, open_artefact, stored
from trtq.artefact.recorded import is_recorded, refuse_recorded
from trtq.engine.trial import TRIAL_SECONDS
from trtq.errors import ArtefactError, UsageError
from trtq.exporter.graph_check import check_engines, check_graphs
from trtq.exporter.layer_outputs import layer_outputs
from trtq.exporter.parity import TIE_DB
from trtq.exporter.result import LayerParity, RuleFinding, RuntimeRules, VerifyResult
from trtq.exporter.step_check import PARITY_DB, step_parities
from trtq.exporter.verify_recorded import compare_recorded, verify_recorded
from trtq.graph.file import MODEL_FILE
from trtq.graph.runtimes.legality import check
from trtq.graph.runtimes.prepare import RUNTIMES, load_graph, prepare
from trtq.pipelines.open import open_any
from trtq.progress import ProgressCallback, silent
from trtq.quant.formats import DEPLOYED_FORMS
from trtq.quant.hooks import captured_outputs
from trtq.runs.folder import OpenRun, open_run
from trtq.seeds import seeded_generator
from trtq.snr import snr_db

__all__ = ["verify"]


def verify(
    artefact: str | Path | Opened,
    *,
    against: str | Path | Opened | None = None,
    runtimes: Sequence[str] = RUNTIMES,
    layers: bool = False,
    timeout: float = TRIAL_SECONDS,
    progress: ProgressCallback = silent,
) -> VerifyResult:
    """Check an artefact's files, its graphs in the runtime, and on request its agreement with torch.

    onnxruntime opens and calls each graph once, in a separate process with limits on time and memory, so
    a graph that crashes, never ends or takes all memory only fails its check.

    Args:
        artefact: a run, an ONNX folder or an engine folder, or one of them opened; without a GPU only
            the files of engines can be checked.
        against: the run that an ONNX folder was exported from; compared at every calibrated step.
        runtimes: runtimes whose rules are checked, from `trtq.graph.runtimes.prepare.RUNTIMES`.
        layers: compare the output of every low-bit layer too, at one mixed batch.
        timeout: time limit for opening and calling one graph, in seconds.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        The outcome of every check; `ok` is False if one failed.

    Raises:
        UsageError: the options do not fit the artefact.
        ArtefactError: the artefact is damaged, or was not exported from the run `against`.
    """
    opened = stored(open_artefact(artefact, verify=False))
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown:
        raise UsageError(f"unknown runtime {unknown[0]!r}; choose one of {', '.join(RUNTIMES)}")
    if layers and against is None:
        raise UsageError("--layers compares with torch; name the run with --run RUN")
    opened = opened.verified()
    if opened.kind != "onnx":
        if against is not None:
            raise UsageError(
                f"{opened.place} is of kind {opened.kind!r}; --run is for ONNX folders"
            )
        return _verify_run(opened) if isinstance(opened, Run) else _verify_engines(opened)
    if is_recorded(opened):
        if layers:
            refuse_recorded(opened, "--layers", "leave it out; --run compares every call")
        result = verify_recorded(opened, runtimes, timeout, progress)
        if against is None or any((result.graphs or {}).values()):
            return result
        return compare_recorded(result, opened, _origin(against, opened.manifest), progress)
    result = _verify_graphs(opened, runtimes, timeout, progress)
    if against is None or any((result.graphs or {}).values()):
        return result
    return _compare(result, opened, against, layers=layers, progress=progress)


def _verify_run(opened: Run) -> VerifyResult:
    """Open a run and every component that image generation needs."""
    open_any(opened)
    return VerifyResult(kind=opened.kind, files=len(opened.manifest.files), ok=True)


def _verify_engines(opened: StoredArtefact) -> VerifyResult:
    """Check the engines' files, and open the engines if there is a GPU."""
    graphs = check_engines(opened.folder, opened.manifest)
    files, ok = len(opened.manifest.files), not any(graphs.values())
    return VerifyResult(kind=opened.kind, files=files, ok=ok, graphs=graphs)


def _verify_graphs(
    opened: StoredArtefact,
    runtimes: Sequence[str],
    timeout: float,
    progress: ProgressCallback,
) -> VerifyResult:
    """Open and call the graphs of an ONNX folder, and check the rules of the runtimes."""
    folder, manifest = opened.folder, opened.manifest
    graphs = check_graphs(folder, manifest, seconds=timeout, progress=progress)
    rules: dict[str, RuntimeRules] = {}
    if not any(graphs.values()):
        model = folder / manifest.denoiser / MODEL_FILE
        manifest.check_graph(load_graph(model).metadata_props)
        rules = {name: _rules(model, name) for name in runtimes}
    return VerifyResult(
        kind=opened.kind,
        files=len(manifest.files),
        ok=not any(graphs.values()) and all(checked.legal for checked in rules.values()),
        graphs=graphs,
        runtimes=rules,
    )


def _compare(
    result: VerifyResult,
    opened: StoredArtefact,
    against: str | Path | Opened,
    *,
    layers: bool,
    progress: ProgressCallback,
) -> VerifyResult:
    """Add the comparison of the denoiser's graph with the run that it was exported from."""
    model = opened.folder / opened.denoiser / MODEL_FILE
    run = _origin(against, opened.manifest)
    source = run.source()
    progress("compare with torch", 1, 2)
    if opened.smallest_size is not None:
        source = source.sized(opened.smallest_size)
    required = PARITY_DB[opened.precision]
    steps = step_parities(source, model, run.manifest, thorough=True)
    parities = _layers(source, model, run) if layers else None
    progress("compare with torch", 2, 2)
    return replace(
        result,
        ok=result.ok and all(step.holds(required) for step in steps),
        parity_db=[step.db for step in steps],
        parity_db_min=min(step.db for step in steps),
        parity_required_db=required,
        layers=parities,
        first=next((layer.name for layer in parities or () if layer.snr_db < TIE_DB), None),
    )


def _rules(model: Path, runtime: Any) -> RuntimeRules:
    """Check the denoiser's graph against the rules of a runtime."""
    findings = check(prepare(load_graph(model), runtime), runtime)
    return RuntimeRules(
        legal=not any(finding.fatal for finding in findings),
        findings=[RuleFinding(**asdict(finding), former_fix=finding.fix) for finding in findings],
    )


def _origin(against: str | Path | Opened, manifest: Manifest) -> OpenRun:
    """The run that a graph was exported from.

    Raises:
        ArtefactError: `against` is another run.
    """
    run = open_run(against)
    made_from = manifest.source.files.get(MANIFEST_NAME)
    if made_from != sha256(run.folder / MANIFEST_NAME):
        raise ArtefactError(
            f"the ONNX folder was not exported from {run.folder} as it is now, but from "
            f"{manifest.source.name!r}; export it again, or give that run"
        )
    return run


@torch.no_grad()
def _layers(source: Any, model: Path, run: OpenRun) -> list[LayerParity]:
    """Every low-bit layer's output in torch and in the graph, in the order of execution."""
    steps = len(run.table)
    images = min(4, steps)
    generator = seeded_generator(0, "layer parity")
    x = torch.randn(images, *source.sample_shape, generator=generator)
    timestep = run.table.timesteps[torch.arange(images) * steps // images]
    conditions = source.draw_conditions(images, generator)
    arguments = conditions.family.arguments(x, timestep, conditions.conditional | conditions.shared)
    denoiser: nn.Module = source.denoiser
    wrapped = getattr(denoiser, "denoiser", denoiser)
    low_bit = {
        name for name, module in wrapped.named_modules() if isinstance(module, DEPLOYED_FORMS)
    }
    with captured_outputs(wrapped, low_bit) as expected:
        denoiser(**arguments, return_dict=False)
    flat = conditions.family.flatten(arguments)
    outputs = layer_outputs(model, list(expected), {k: torch.as_tensor(v) for k, v in flat.items()})
    return [
        LayerParity(name=name, snr_db=snr_db(value, outputs[name].reshape(value.shape)))
        for name, value in expected.items()
    ]
