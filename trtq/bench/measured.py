"""Loading of an artefact for measurements, and what is measured alike for all artefacts."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trtq._optional import require
from trtq.artefact.manifest_file import artefact_kind
from trtq.bench.device import GpuMemory, Nvml
from trtq.bench.turns import calls_per_turn, time_call, time_calls
from trtq.checkpoint.components import denoisers_of
from trtq.checkpoint.resolve import resolve_model
from trtq.diffusion.folder import import_classes
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.engine.denoiser import EngineDenoiser
from trtq.engine.ort import GPU_PROVIDERS
from trtq.engine.recorded import RecordedDenoiser
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.resources import forget_peak_rss, peak_rss_bytes, rss_bytes

__all__ = ["DENOISER", "Measured", "TimedCall"]

DENOISER = "denoiser"
TimedCall = Callable[[], object]


class Measured:
    """A loaded artefact. Every public method returns JSON values."""

    def __init__(self) -> None:
        self._nvml = Nvml()
        self._on_gpu = False
        self._gpu_before = self._gpu_loaded = GpuMemory()
        self._calls = 1

    def _load(
        self, path: str, provider: str, threads: int, opener: Callable[[], LoadedPipeline]
    ) -> dict[str, Any]:
        """Load the artefact.

        Args:
            path: artefact or checkpoint.
            provider: runtime.
            threads: number of threads per operator in torch.
            opener: function that loads the artefact.

        Returns:
            `load_seconds`; `memory`: `libraries_bytes` (resident before loading), `weights_bytes` (added
            by loading), `load_peak_bytes`; `weight_bytes` of the denoisers if torch holds their weights;
            `device` of the denoisers, `gpu` or `cpu`.

        Raises:
            TrtqError: the artefact cannot be opened.
        """
        torch.set_num_threads(threads)
        _import_libraries(path, provider)
        libraries = rss_bytes()
        self._gpu_before = self._nvml.memory
        start = time.perf_counter()
        self.source = opener()
        seconds = time.perf_counter() - start
        self._loaded = rss_bytes()
        peak = peak_rss_bytes()
        self._forgot = forget_peak_rss()
        self._gpu_loaded = self._nvml.memory
        denoisers = denoisers_of(self.source.pipeline).values()
        self._on_gpu = any(_on_gpu(denoiser) for denoiser in denoisers)
        return {
            "load_seconds": seconds,
            "memory": {
                "libraries_bytes": libraries,
                "weights_bytes": max(self._loaded - libraries, 0),
                "load_peak_bytes": peak,
            },
            "device": "gpu" if self._on_gpu else "cpu",
            "weight_bytes": sum(
                value.numel() * value.element_size()
                for denoiser in denoisers
                for value in denoiser.state_dict().values()
            ),
        }

    def _warm_up(self, call: TimedCall) -> dict[str, Any]:
        """Call a part twice; return `first_call_seconds` and `calls` per timing round."""
        self._call = call
        first, second = time_call(call), time_call(call)
        self._calls = calls_per_turn(second)
        return {"first_call_seconds": first, "calls": self._calls}

    @torch.no_grad()
    def time(self) -> dict[str, Any]:
        """Time one round of the prepared part; return `seconds` of each call."""
        return {"seconds": time_calls(self._call, self._calls)}

    def _timed(self, function: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
        """Call a function once.

        Returns:
            Its result; and its duration in `seconds` with the GPU's energy in `joules`, None if not
            reported.
        """
        before = self._nvml.joules if self._on_gpu else None
        start = time.perf_counter()
        result = function()
        seconds = time.perf_counter() - start
        after = self._nvml.joules if before is not None else None
        joules = None if before is None or after is None else after - before
        return result, {"seconds": seconds, "joules": joules}

    def memory(self) -> dict[str, Any]:
        """Report the peak resident memory and the GPU memory.

        Returns:
            `activations_bytes`, the maximum added by calls (None if the system cannot reset its peak
            counter); `run_peak_bytes`, the peak since loading; on a GPU also `gpu_weights_bytes`
            (added by loading) and `gpu_bytes` (in use now), None if the driver does not report them.
        """
        peak = peak_rss_bytes()
        memory: dict[str, Any] = {
            "activations_bytes": max(peak - self._loaded, 0) if self._forgot else None,
            "run_peak_bytes": peak,
        }
        if self._on_gpu:
            memory["gpu_weights_bytes"] = self._gpu_loaded.added_to(self._gpu_before)
            memory["gpu_bytes"] = self._nvml.memory.process
        return memory


def _on_gpu(denoiser: nn.Module) -> bool:
    """Whether a loaded denoiser is on a GPU; a run uses the GPU only if there is one."""
    if isinstance(denoiser, EngineDenoiser):
        return denoiser.engine.provider in GPU_PROVIDERS
    if isinstance(denoiser, RecordedDenoiser):
        return any(engine.provider in GPU_PROVIDERS for engine in denoiser.engines)
    return any(value.is_cuda for value in denoiser.state_dict().values())


def _import_libraries(path: str, provider: str) -> None:
    """Import the libraries in advance, so that their time and memory are not attributed to the model."""
    from diffusers import DiffusionPipeline  # noqa: F401

    place = Path(path) if Path(path).is_dir() else resolve_model(path)
    kind = artefact_kind(place) if isinstance(place, Path) else None
    if kind == "onnx":
        import trtq.graph.passes  # noqa: F401

        require("onnxruntime")
    elif kind == "engine":
        import_module(BACKENDS[provider].module)
    if isinstance(place, Path):
        import_classes(place)
