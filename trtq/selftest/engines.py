"""Stage 5: engines of the digits model, and onnxruntime's GPU providers, against its CPU provider."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from trtq.engine.bound_graphs import VARIABLE
from trtq.engine.ort import GPU_PROVIDERS, check_provider
from trtq.engine.tensorrt.backends import BACKENDS, CURRENT, Backend
from trtq.errors import UsageError
from trtq.exporter.build import build
from trtq.exporter.export import export
from trtq.pipelines.open import open_any
from trtq.plugins.device import Gpu, current_device
from trtq.processes import Child
from trtq.runs.quantize import quantize
from trtq.selftest.agreement import compare_denoiser
from trtq.selftest.torch_gpu import require_torch
from trtq.selftest.trials import Options, Outcome, SkippedError, Trial

__all__ = ["MODEL", "RECIPE", "TARGETS", "Artefacts", "make_artefacts", "trials"]

MODEL = "digits"
RECIPE: dict[str, Any] = {
    "method": "minmax",
    "bits": "w4a8",
    "steps": 4,
    "calibration": {"images": 16},
}
TARGETS = ("qdq", "plugin")
_PROVIDER_INSTALLS = {
    "cuda": "pip install onnxruntime-gpu",
    "tensorrt": "pip install onnxruntime-gpu, and TensorRT 10",
    "tensorrt-rtx": "pip install onnxruntime onnxruntime-ep-nv-tensorrt-rtx",
}
_SECOND_SECONDS = 600
"""Time limit of the second process."""


@dataclass(frozen=True)
class Artefacts:
    """The folders of this stage.

    Attributes:
        folder: folder of everything below.
        timesteps: the calibrated timesteps.
    """

    folder: Path
    timesteps: list[float]

    def onnx(self, target: str) -> Path:
        """The ONNX folder of a form of the graph."""
        return self.folder / f"onnx-{target}"

    def engine(self, target: str, backend: str) -> Path:
        """The engine folder of a form of the graph."""
        return self.folder / f"{backend}-{target}"


@cache
def make_artefacts(folder: Path) -> Artefacts:
    """Quantise the model and export both forms of the graph, unless an earlier process did."""
    complete = folder / "complete"
    if not complete.exists():
        quantize(MODEL, RECIPE, folder / "run", overwrite=True)
        for target in TARGETS:
            out = folder / f"onnx-{target}"
            export(folder / "run", out, target=target, precision="fp16", overwrite=True)
        complete.touch()
    source = open_any(folder / "run")
    return Artefacts(folder, source.schedule(RECIPE["steps"]).timesteps.tolist())


@cache
def _reference(folder: Path) -> Any:
    return open_any(folder, "cpu")


def trials(options: Options) -> Iterator[Trial]:
    """Export, then the trials of each engine builder and of each provider."""
    folder = Path(options.scratch)
    yield Trial("export", partial(_export, folder))
    for backend in BACKENDS.values():
        if not backend.installed:
            yield Trial(f"engines of {backend.name}", partial(_skip, backend))
            continue
        for target in TARGETS:
            name = f"{backend.name}, {target}"
            yield Trial(f"build {name}", partial(_build, folder, backend, target))
            yield Trial(f"run {name}", partial(_run, folder, backend, target))
            yield Trial(f"second process {name}", partial(_second, folder, backend, target))
    for provider in GPU_PROVIDERS:
        try:
            check_provider(provider)
        except UsageError:
            yield Trial(f"onnxruntime {provider}", partial(_no_provider, provider))
            continue
        for graphs in (False, True):
            name = f"onnxruntime {provider}" + ", CUDA graphs" * graphs
            yield Trial(name, partial(_provider, folder, provider, graphs=graphs))


def _skip(backend: Backend) -> None:
    raise SkippedError(f"{backend.name} is not installed: {backend.install}")


def _no_provider(provider: str) -> None:
    raise SkippedError(f"onnxruntime has no provider {provider!r}: {_PROVIDER_INSTALLS[provider]}")


def _export(folder: Path) -> Outcome:
    start = time.monotonic()
    artefacts = make_artefacts(folder)
    seconds = round(time.monotonic() - start, 1)
    return Outcome({"model": MODEL, "steps": len(artefacts.timesteps), "seconds": seconds})


def _build(folder: Path, backend: Backend, target: str) -> Outcome:
    artefacts = make_artefacts(folder)
    Gpu()
    architecture = current_device().architecture
    known = architecture in backend.architectures
    result = build(
        artefacts.onnx(target),
        artefacts.engine(target, backend.name),
        backend=backend.name,
        architectures=[architecture if known else CURRENT],
        use_cache=False,
    )
    (engine,) = result.engines
    detail = {
        "version": result.version,
        "seconds": result.seconds,
        "bytes": result.engine_bytes,
        "plugins": engine.plugins,
        "warnings": engine.warnings[:2],
    }
    return Outcome(detail)


def _built(artefacts: Artefacts, backend: Backend, target: str) -> Path:
    """The engine folder.

    Raises:
        SkippedError: building failed.
    """
    place = artefacts.engine(target, backend.name)
    if not place.is_dir():
        raise SkippedError(f"there is no engine: building with {backend.name} failed")
    return place


def _run(folder: Path, backend: Backend, target: str) -> Outcome:
    artefacts = make_artefacts(folder)
    opened = open_any(_built(artefacts, backend, target))
    reference = _reference(artefacts.onnx(target))
    return compare_denoiser(reference, opened.denoiser, artefacts.timesteps)


def _second(folder: Path, backend: Backend, target: str) -> Outcome:
    """Open the engine in another process, which has the cache that the first one kept."""
    artefacts = make_artefacts(folder)
    timesteps = ",".join(f"{timestep!r}" for timestep in artefacts.timesteps)
    places = (_built(artefacts, backend, target), artefacts.onnx(target))
    with Child("trtq.selftest.second", *places, timesteps) as child:
        answer = child.answer(_SECOND_SECONDS)
    return Outcome(answer["detail"], answer["fault"])


def _provider(folder: Path, provider: str, *, graphs: bool) -> Outcome:
    """Run the graph on a provider, on request with captured CUDA graphs."""
    if graphs:
        require_torch()
    artefacts = make_artefacts(folder)
    os.environ[VARIABLE] = "1" if graphs else "0"
    try:
        opened = open_any(artefacts.onnx("qdq"), provider)
        reference = _reference(artefacts.onnx("qdq"))
        return compare_denoiser(reference, opened.denoiser, artefacts.timesteps)
    finally:
        del os.environ[VARIABLE]
