"""Is an artefact what its manifest says, may a runtime have it, and does it compute what torch does?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trtq.artefact.manifest import MANIFEST_NAME, Manifest, artefact_kind, read_manifest, sha256
from trtq.engine.trial import TRIAL_SECONDS
from trtq.errors import ArtefactError, UsageError
from trtq.exporter.graph_check import check_engines, check_graphs
from trtq.exporter.layer_outputs import layer_outputs
from trtq.exporter.parity import TIE_DB
from trtq.exporter.step_check import PARITY_DB, step_parities
from trtq.graph.file import MODEL_FILE
from trtq.graph.runtimes.legality import check
from trtq.graph.runtimes.prepare import RUNTIMES, load_graph, prepare
from trtq.pipelines.open import open_any
from trtq.progress import ProgressCallback, silent
from trtq.quant.deployed import DeployedLayer, DeployedProduct
from trtq.runs.folder import OpenRun, open_run
from trtq.seeds import seeded_generator
from trtq.snr import snr_db

__all__ = ["verify"]


def verify(
    path: str | Path,
    *,
    against: str | Path | None = None,
    runtimes: Sequence[str] = RUNTIMES,
    layers: bool = False,
    timeout: float = TRIAL_SECONDS,
    progress: ProgressCallback = silent,
) -> dict[str, Any]:
    """Check files against the manifest, open graphs in the runtime, check its rules, compare with torch.

    Each graph is opened and called once by onnxruntime, in a process of its own with a limit of time and
    memory, so a graph that crashes, never ends or takes all memory is a failed check and nothing more.

    Args:
        path: a run, an ONNX folder or engines; without a GPU of engines only the files can be checked.
        against: the run that an ONNX folder was exported from; compared at every calibrated step.
        runtimes: those of `trtq.graph.runtimes.prepare.RUNTIMES` whose rules are checked.
        layers: compare the output of every low-bit layer too, at one mixed batch.
        timeout: seconds that opening and calling one graph may take.
        progress: called with the stage's name, the work done and the total.

    Returns:
        `kind`, `files` (how many were hashed), `ok`; for an ONNX folder and for engines `graphs`: by
        component what is wrong with its graph or engine, None where nothing is; and for an ONNX folder
        `runtimes`: by name `legal` and `findings` (`layer`, `rule`, `fix`, `fatal`), empty where a
        graph cannot be opened. With `against`, `parity_db` (per step,
        cleanest first, last the mixed batch), `parity_db_min` and `parity_required_db`; with
        `layers`, rows of `name`, `snr_db` and `first` (the first one below `TIE_DB`).

    Raises:
        UsageError: the options do not fit the artefact.
        ArtefactError: it is damaged, or `against` is not what it was made from.
    """
    folder = Path(path)
    kind = artefact_kind(folder) if folder.is_dir() else None
    if kind is None:
        raise UsageError(f"{path} is no artefact of trtq; give a run, an ONNX folder or engines")
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown:
        raise UsageError(f"unknown runtime {unknown[0]!r}; choose one of {', '.join(RUNTIMES)}")
    if layers and against is None:
        raise UsageError("--layers compares with torch; name the run with --against RUN")
    manifest = read_manifest(folder)
    result: dict[str, Any] = {"kind": kind, "files": len(manifest.files), "ok": True}
    if kind != "onnx":
        if against is not None:
            raise UsageError(f"{path} is of kind {kind!r}; --against is for ONNX folders")
        if kind == "run":
            # Its other files, too: what it is drawn with.
            open_any(folder)
        else:
            result["graphs"] = check_engines(folder, manifest)
            result["ok"] = not any(result["graphs"].values())
        return result
    result["graphs"] = check_graphs(folder, manifest, seconds=timeout, progress=progress)
    result["runtimes"] = {}
    model = folder / manifest.denoiser / MODEL_FILE
    if any(result["graphs"].values()):
        return result | {"ok": False}
    manifest.check_graph(load_graph(model).metadata_props)
    result["runtimes"] = {name: _legality(model, name) for name in runtimes}
    result["ok"] = all(found["legal"] for found in result["runtimes"].values())
    if against is None:
        return result
    run = _origin(Path(against), manifest)
    source = run.source()
    progress("compare with torch", 1, 2)
    sizes = str(manifest.options.get("size") or "").partition(":")[0]
    if sizes:
        source = source.sized(sizes)
    required = PARITY_DB[manifest.options.get("precision", "fp32")]
    rows = step_parities(source, model, run.manifest, thorough=True)
    result |= {
        "parity_db": [row.db for row in rows],
        "parity_db_min": min(row.db for row in rows),
        "parity_required_db": required,
    }
    result["ok"] &= all(row.holds(required) for row in rows)
    if layers:
        result["layers"] = _layers(source, model, run)
        result["first"] = next(
            (row["name"] for row in result["layers"] if row["snr_db"] < TIE_DB), None
        )
    progress("compare with torch", 2, 2)
    return result


def _legality(model: Path, runtime: Any) -> dict[str, Any]:
    findings = check(prepare(load_graph(model), runtime), runtime)
    return {
        "legal": not any(finding.fatal for finding in findings),
        # `mend` is the former name of `fix`, for one release.
        "findings": [asdict(finding) | {"mend": finding.fix} for finding in findings],
    }


def _origin(against: Path, manifest: Manifest) -> OpenRun:
    """The run that a graph was exported from.

    Raises:
        ArtefactError: it is another one.
    """
    run = open_run(against)
    made_from = manifest.source.files.get(MANIFEST_NAME)
    if made_from != sha256(against / MANIFEST_NAME):
        raise ArtefactError(
            f"the ONNX folder was not exported from {against} as it is now, but from "
            f"{manifest.source.name!r}; export it again, or give that run"
        )
    return run


@torch.no_grad()
def _layers(source: Any, model: Path, run: OpenRun) -> list[dict[str, Any]]:
    """Every low-bit layer's output in torch and in the graph, in the order of execution."""
    steps = len(run.table)
    images = min(4, steps)
    generator = seeded_generator(0, "layer parity")
    x = torch.randn(images, *source.sample_shape, generator=generator)
    timestep = run.table.timesteps[torch.arange(images) * steps // images]
    conditions = source.draw_conditions(images, generator)
    arguments = conditions.family.arguments(x, timestep, conditions.conditional | conditions.shared)
    expected: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, __, output: expected.update({name: output})

    denoiser: nn.Module = source.denoiser
    wrapped = getattr(denoiser, "denoiser", denoiser)
    handles = [
        module.register_forward_hook(keep(name))
        for name, module in wrapped.named_modules()
        if isinstance(module, DeployedLayer | DeployedProduct)
    ]
    try:
        denoiser(**arguments, return_dict=False)
    finally:
        for handle in handles:
            handle.remove()
    flat = conditions.family.flatten(arguments)
    found = layer_outputs(model, list(expected), {k: torch.as_tensor(v) for k, v in flat.items()})
    return [
        {"name": name, "snr_db": snr_db(expected[name], found[name].reshape(expected[name].shape))}
        for name in expected
    ]
