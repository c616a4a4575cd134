"""An ONNX folder to TensorRT engines, one per graph."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtq.diffusion.source import parse_size, parse_sizes
from trtq.engine.denoiser import SIZES_KEY
from trtq.engine.tensorrt.backends import Backend, check_architectures, find_backend
from trtq.engine.tensorrt.compile import (
    ENGINE_FILE,
    Compiled,
    compile_engine,
    estimated_peak_bytes,
)
from trtq.engine.tensorrt.job import Job, Profile
from trtq.errors import LegalityError, UsageError
from trtq.export.legality import check
from trtq.export.targets import load_graph, prepare
from trtq.manifest import (
    MANIFEST_NAME,
    Manifest,
    SourceRow,
    check_output,
    new_artefact,
    read_manifest,
    sha256,
    write_manifest,
)
from trtq.progress import Reporter, silent
from trtq.resources import available_bytes
from trtq.stages.graph_file import DATA_NAME, MODEL_FILE

__all__ = ["build_engines", "profile_of"]

logger = logging.getLogger(__name__)

Range = tuple[int, int, int]
_TOKENS: Range = (1, 77, 512)
"""Lengths of texts, for encoders that take any."""


def build_engines(
    path: str | Path,
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
    report: Reporter = silent,
) -> dict[str, Any]:
    """Build an engine of every graph in an ONNX folder.

    The profiles take the batch and sizes that the folder was exported for; the denoiser's twice as many
    items where guidance doubles them.

    Args:
        path: an ONNX folder.
        out: the engine folder: the same layout, `model.engine` in place of `model.onnx`.
        backend: `tensorrt-rtx` or `tensorrt`; None: the first that is installed.
        architectures: e.g. `sm86`; by default those of current RTX cards, or the GPU that is there.
        batch: smallest and largest number of images, instead of the export's.
        weight_streaming: let weights stay on the host, for models larger than the GPU's memory.
        refit: let weights be exchanged in the finished engine; needs a GPU while building.
        workspace_bytes: most device memory for one operator's scratch.
        use_cache: look for engines that were built before, and keep these.
        overwrite: replace an engine folder that is already there.
        report: called as work goes on.

    Returns:
        `engine_bytes` (all together), `seconds`, `peak_rss_bytes` (of the builder's processes, the
        largest), `backend`, `version`, `architectures`, and `engines`: per graph `name`, `engine_bytes`,
        `layers`, `parse_seconds`, `build_seconds`, `peak_rss_bytes`, `cached`, `warnings`, `float` (how
        many of its layers stay in float).

    Raises:
        UsageError: the backend cannot do what is asked, or the folder is no ONNX folder.
        LegalityError: the backend would refuse a layer, or compute it wrongly.
        BuildError: the builder refused, crashed or was killed.
    """
    start = time.monotonic()
    folder, final = Path(path), Path(out)
    chosen = find_backend(backend)
    targets = check_architectures(chosen, list(architectures))
    if refit and chosen.architectures and "current" not in targets:
        raise UsageError(
            "refit engines can only be built where there is a GPU; pass --arch current there"
        )
    check_output(final, overwrite=overwrite, source=path)
    if not (folder / MANIFEST_NAME).is_file():
        raise UsageError(f"{path} is not an ONNX folder; make one first: trtq export RUN -o ONNX")
    manifest = read_manifest(folder, "onnx")
    graphs = sorted(file.parent.name for file in folder.glob(f"*/{MODEL_FILE}"))
    rows = []
    with new_artefact(final, overwrite=overwrite) as partial:
        for index, name in enumerate(graphs):
            report(f"build {name}", index + 1, len(graphs))
            with tempfile.TemporaryDirectory(prefix="trtq-graph-") as scratch:
                graph = Path(scratch) / MODEL_FILE
                profile, floats = _prepare(folder, name, graph, manifest, chosen, batch)
                _warn_of_memory(name, graph)
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
        _copy_parts(folder, partial)
        result = {
            "engine_bytes": sum(row["engine_bytes"] for row in rows),
            "seconds": round(time.monotonic() - start, 2),
            "peak_rss_bytes": max(row["peak_rss_bytes"] for row in rows),
            "backend": chosen.name,
            "version": chosen.version,
            "architectures": targets,
            "engines": rows,
        }
        options = manifest.options | {
            "backend": chosen.name,
            "version": chosen.version,
            "architectures": targets,
            "weight_streaming": weight_streaming,
            "refit": refit,
        }
        if batch is not None:
            options["batch"] = list(batch)
        source = SourceRow(
            name=folder.name,
            files={MANIFEST_NAME: sha256(folder / MANIFEST_NAME)} | manifest.files,
        )
        write_manifest(
            partial,
            manifest.model_copy(
                update={"kind": "engine", "source": source, "options": options, "metrics": result}
            ),
        )
    return result


def _prepare(
    folder: Path,
    name: str,
    out: Path,
    manifest: Manifest,
    backend: Backend,
    batch: tuple[int, int] | None,
) -> tuple[Profile, int]:
    """Write a graph as the backend takes it.

    Returns:
        The ranges of its inputs, and how many of its layers the backend would leave in float.

    Raises:
        LegalityError: the backend would refuse a layer, or compute it wrongly.
    """
    import onnx_ir as ir

    model = load_graph(folder / name / MODEL_FILE)
    denoiser = name == manifest.denoiser
    floats = 0
    if denoiser:
        prepare(model, backend.name)
        findings = check(model, backend.name)
        fatal = [finding for finding in findings if finding.fatal]
        if fatal:
            first = fatal[0]
            raise LegalityError(
                f"{backend.name} does not take {first.layer!r}: {first.rule}; {first.mend}"
            )
        floats = len({finding.layer for finding in findings})
        floats += sum(row.activation_bits is None for row in manifest.layers)
    ranges = _axis_ranges(folder, manifest, model, batch, denoiser=denoiser)
    profile = profile_of(model, ranges)
    ir.save(model, out, external_data=DATA_NAME)
    return profile, floats


def _axis_ranges(
    folder: Path,
    manifest: Manifest,
    model: Any,
    batch: tuple[int, int] | None,
    *,
    denoiser: bool,
) -> dict[str, Range]:
    """Smallest, most frequent and largest length of every free axis, by its name."""
    low, high = batch or tuple(manifest.options.get("batch", (1, 1)))
    # With guidance the pipeline gives the denoiser both halves in one batch.
    guided = denoiser and (manifest.recipe or {}).get("guidance", 2.0) not in (None, 1.0)
    often, high = (2 * low, 2 * high) if guided else (low, high)
    ranges: dict[str, Range] = {"batch": (low, often, high), "timesteps": (1, often, high)}
    ranges["tokens"] = _TOKENS
    sizes = model.metadata_props.get(SIZES_KEY)
    if sizes is not None:
        found = json.loads(sizes)
        for axis, name in enumerate(("height", "width")):
            ranges[name] = (found["low"][axis], found["low"][axis], found["high"][axis])
    elif manifest.options.get("size") is not None:
        smallest, largest = (parse_size(text) for text in parse_sizes(manifest.options["size"]))
        factor = _upscaling(model)
        for axis, name in enumerate(("height", "width")):
            least, most = smallest[axis] // factor, largest[axis] // factor
            ranges[name] = (least, least, most)
    return ranges


def _upscaling(model: Any) -> int:
    """How many pixels a decoder makes of a latent's side; 1 for what takes pixels."""
    side = str(model.graph.outputs[0].shape[-1]) if model.graph.outputs[0].shape else ""
    factor, times, _ = side.replace(" ", "").partition("*")
    return int(factor) if times and factor.isdigit() else 1


def profile_of(model: Any, ranges: dict[str, Range]) -> Profile:
    """The ranges of a graph's inputs, from those of its free axes.

    Raises:
        UsageError: an axis is free of which nothing is known.
    """
    profile: Profile = {}
    for value in model.graph.inputs:
        shapes: tuple[list[int], list[int], list[int]] = ([], [], [])
        for size in value.shape:
            axis = size if isinstance(size, int) else str(size)
            if isinstance(axis, str) and axis not in ranges:
                raise UsageError(
                    f"the input {value.name!r} has a free axis {axis!r} of unknown range; export the "
                    "model again with this version"
                )
            three = (axis,) * 3 if isinstance(axis, int) else ranges[axis]
            for shape, length in zip(shapes, three, strict=True):
                shape.append(length)
        profile[value.name] = shapes
    return profile


def _warn_of_memory(name: str, graph: Path) -> None:
    """Say beforehand that building may not fit."""
    needed, free = estimated_peak_bytes(graph), available_bytes()
    if 0 < free < needed:
        logger.warning(
            "building the engine of %s is likely to take %.1f GiB, and %.1f GiB are free",
            name,
            needed / (1 << 30),
            free / (1 << 30),
        )


def _row(name: str, compiled: Compiled, floats: int) -> dict[str, Any]:
    answer = compiled.answer
    return {
        "name": name,
        "engine_bytes": compiled.engine_bytes,
        "layers": answer.layers,
        "float": floats,
        "parse_seconds": round(answer.parse_seconds, 2),
        "build_seconds": round(answer.build_seconds, 2),
        "peak_rss_bytes": answer.peak_rss_bytes,
        "cached": compiled.cached,
        "warnings": answer.warnings,
    }


def _copy_parts(folder: Path, out: Path) -> None:
    """Everything of a pipeline that is no graph: configurations, tokenizers, the scheduler."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_dir() or path.name in (MODEL_FILE, DATA_NAME, MANIFEST_NAME):
            continue
        (out / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / relative)
