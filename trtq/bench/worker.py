"""Worker process of the benchmark: loads one artefact and answers requests to measure it."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trtq._optional import require
from trtq.artefact.manifest_file import artefact_kind
from trtq.bench.cost import count_operations
from trtq.bench.device import GpuMemory, Nvml, cpu_peak
from trtq.bench.process import answer_questions
from trtq.bench.turns import calls_per_turn, time_call, time_calls
from trtq.diffusion.components import AUTOENCODERS
from trtq.diffusion.folder import import_classes
from trtq.diffusion.loading import resolve_model
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.sampling import Conditions, predict, seeded_noise
from trtq.engine.denoiser import EngineDenoiser
from trtq.engine.ort import GPU_PROVIDERS
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.pipelines.draw import Conditioning, draw
from trtq.pipelines.open import TORCH, open_any
from trtq.resources import forget_peak_rss, peak_rss_bytes, rss_bytes
from trtq.seeds import seeded_generator

__all__ = ["MeasuredArtefact", "main"]

DENOISER, TEXT, DECODER = "denoiser", "text encoder", "VAE decoder"
_WARM_STEPS = 2
_MAX_PROMPTS = 64
_Call = Callable[[], object]


class MeasuredArtefact:
    """One artefact and the calls to its parts. Every public method returns JSON values."""

    def __init__(self) -> None:
        self._nvml = Nvml()
        self._on_gpu = False
        self._gpu_before = self._gpu_loaded = GpuMemory()
        self._calls = 1

    def open(self, path: str, provider: str, threads: int, size: str | None) -> dict[str, Any]:
        """Load the artefact.

        Args:
            path: artefact or checkpoint, see `open_any`.
            provider: runtime, see `open_any`.
            threads: number of threads per operator.
            size: image size, `HEIGHTxWIDTH`; None: the artefact's size.

        Returns:
            `load_seconds`; `memory`: `libraries_bytes` (resident before loading), `weights_bytes` (added
            by loading), `load_peak_bytes`; `shape` and `model_class` of the denoiser; `parts` to time;
            default `guidance`; calibration `prompts`, or None; `weight_bytes` of the denoiser if
            torch holds its weights; `device` of the denoiser, `gpu` or `cpu`.

        Raises:
            TrtqError: the artefact cannot be opened.
        """
        torch.set_num_threads(threads)
        _import_libraries(path, provider)
        libraries = rss_bytes()
        self._gpu_before = self._nvml.memory
        start = time.perf_counter()
        self.source: LoadedPipeline = open_any(
            path, provider, None if provider == TORCH else threads
        )
        seconds = time.perf_counter() - start
        if size is not None:
            self.source = self.source.sized(size)
        self._loaded = rss_bytes()
        peak = peak_rss_bytes()
        self._forgot = forget_peak_rss()
        self._gpu_loaded = self._nvml.memory
        self._on_gpu = _on_gpu(self.source.denoiser)
        return {
            "load_seconds": seconds,
            "memory": {
                "libraries_bytes": libraries,
                "weights_bytes": max(self._loaded - libraries, 0),
                "load_peak_bytes": peak,
            },
            "shape": list(self.source.sample_shape),
            "model_class": self.source.model_class,
            "parts": self._parts(),
            "guidance": self.source.guidance,
            "prompts": self._prompts(),
            "device": "gpu" if self._on_gpu else "cpu",
            "weight_bytes": sum(
                value.numel() * value.element_size()
                for value in self.source.denoiser.state_dict().values()
            ),
        }

    def _parts(self) -> list[str]:
        text = [] if self.source.prompts is None else [TEXT]
        return [DENOISER, *text, *([] if self._autoencoder() is None else [DECODER])]

    def _prompts(self) -> list[str] | None:
        if self.source.prompts is None:
            return None
        return list(self.source.prompts.calibration[:_MAX_PROMPTS])

    def _autoencoder(self) -> Any:
        models = (getattr(self.source.pipeline, name, None) for name in AUTOENCODERS)
        return next((model for model in models if model is not None), None)

    @torch.no_grad()
    def prepare(self, part: str, batch: int, steps: int, guidance: float) -> dict[str, Any]:
        """Create the inputs of a part and warm the part up.

        Args:
            part: name of a part, see `open`.
            batch: number of images; with guidance the denoiser gets twice as many rows.
            steps: number of denoising steps; the denoiser is timed at the middle step.
            guidance: classifier-free guidance scale; 1 disables it.

        Returns:
            `first_call_seconds`, which may include compilation, and `calls` per timing round.
        """
        makers: dict[str, Callable[[], _Call]] = {
            DENOISER: lambda: self._denoiser_call(batch, steps, guidance),
            TEXT: lambda: self._text_call(batch),
            DECODER: lambda: self._decoder_call(batch),
        }
        self._call = makers[part]()
        first, second = time_call(self._call), time_call(self._call)
        self._calls = calls_per_turn(second)
        return {"first_call_seconds": first, "calls": self._calls}

    def _denoiser_call(self, batch: int, steps: int, guidance: float) -> _Call:
        conditions = self.source.draw_conditions(batch, seeded_generator(0, "bench conditions"))
        x = seeded_noise(self.source.sample_shape, 0, 0, batch, "bench")
        timestep = self.source.timesteps(steps)[steps // 2]
        return lambda: predict(self.source.denoiser, x, timestep, conditions, guidance)

    def _text_call(self, batch: int) -> _Call:
        known = self._prompts() or [""]
        prompts = [known[index % len(known)] for index in range(batch)]
        return lambda: self.source.encode(prompts)

    def _decoder_call(self, batch: int) -> _Call:
        autoencoder = self._autoencoder()
        shape = (int(autoencoder.config.latent_channels), *self.source.latent_size)
        latents = seeded_noise(shape, 0, 0, batch, "bench latents")
        return lambda: autoencoder.decode(latents, return_dict=False)

    @torch.no_grad()
    def time(self) -> dict[str, Any]:
        """Time one round of the prepared part; return `seconds` of each call."""
        return {"seconds": time_calls(self._call, self._calls)}

    def draw(
        self,
        batch: int,
        steps: int,
        seed: int,
        guidance: float,
        prompts: list[str] | None,
        turn: int | None,
        out: str | None,
    ) -> dict[str, Any]:
        """Generate a batch of images; conditions and noise depend only on `seed` and `turn`.

        Args:
            batch: number of images B.
            steps: number of denoising steps.
            seed: seed of the initial noise.
            guidance: classifier-free guidance scale; 1 disables it.
            prompts: prompts to cycle through; None for a model without prompts.
            turn: index of the batch; None for a warm-up with few steps.
            out: output file for the images as a numpy array float32[B,C,H,W]; None: no file.

        Returns:
            `seconds` of the whole batch, and GPU energy in `joules` (None if not reported).
        """
        if turn is None:
            turn, steps = 0, min(steps, _WARM_STEPS)
        classes = self.source.classes
        places = range(batch * turn, batch * (turn + 1))
        conditioning = Conditioning(
            batch,
            classes=None if classes is None else torch.tensor(places) % classes,
            prompts=None if not prompts else [prompts[place % len(prompts)] for place in places],
        )
        before = self._nvml.joules if self._on_gpu else None
        start = time.perf_counter()
        images = draw(
            self.source, conditioning, steps=steps, seed=seed + turn, guidance=guidance, batch=batch
        )
        seconds = time.perf_counter() - start
        after = self._nvml.joules if before is not None else None
        if out is not None:
            np.save(out, images.numpy())
        joules = None if before is None or after is None else after - before
        return {"seconds": seconds, "joules": joules}

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

    @torch.no_grad()
    def operations(self, batch: int, steps: int, guidance: float) -> dict[str, Any]:
        """Count the `operations` of one denoiser call, on the float model without weights.

        Args:
            batch: number of images.
            steps: number of denoising steps.
            guidance: classifier-free guidance scale; 1 disables it.
        """
        cls = getattr(self.source.denoiser, "model_class", type(self.source.model))
        conditions = self.source.draw_conditions(batch, seeded_generator(0, "bench conditions"))
        timestep = torch.tensor(self.source.timesteps(steps)[steps // 2], device="meta")
        with torch.device("meta"):
            model = cls.from_config(self.source.model.config).eval()
            x = torch.zeros(batch, *self.source.sample_shape)
        meta_conditions: Conditions = conditions.to("meta")
        return {
            "operations": count_operations(
                lambda: predict(model, x, timestep, meta_conditions, guidance)
            )
        }


def _on_gpu(denoiser: nn.Module) -> bool:
    """Whether a loaded denoiser is on a GPU; a run uses the GPU only if there is one."""
    if isinstance(denoiser, EngineDenoiser):
        return denoiser.engine.provider in GPU_PROVIDERS
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


def _cpu_peak(threads: int) -> dict[str, Any]:
    peak = cpu_peak(threads)
    return {"operations": peak.operations, "bytes": peak.bytes, "what": peak.what}


def main() -> None:
    """Answer requests about one artefact, or about the processor."""
    artefact = MeasuredArtefact()
    names = ("open", "prepare", "time", "draw", "memory", "operations")
    answer_questions({name: getattr(artefact, name) for name in names} | {"cpu_peak": _cpu_peak})
