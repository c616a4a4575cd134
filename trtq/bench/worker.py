"""One artefact in the process that it is measured in: loaded, called and drawn with when asked to."""

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
from trtq.diffusion.folder import AUTOENCODERS, import_classes
from trtq.diffusion.pipeline import LoadedPipeline, resolve_model
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
    """A loaded artefact, and how its parts are called. Every method answers with JSON."""

    def __init__(self) -> None:
        self._nvml = Nvml()
        self._on_gpu = False
        self._gpu_before = self._gpu_loaded = GpuMemory()
        self._calls = 1

    def open(self, path: str, provider: str, threads: int, size: str | None) -> dict[str, Any]:
        """Load it.

        Args:
            path: see `open_any`.
            provider: see `open_any`.
            threads: of one operator.
            size: of the images, `HEIGHTxWIDTH`; None: the artefact's own.

        Returns:
            `load_seconds`; `memory`: `libraries_bytes` (resident before), `weights_bytes` (what loading
            added), `load_peak_bytes`; `shape` of the denoiser's sample and its `model_class`; `parts`
            that can be timed; `guidance` that the model is meant for; `prompts` that it knows, or None;
            `weight_bytes` of the denoiser, where torch holds them; `device`, `gpu` or `cpu`, that the
            denoiser is on.

        Raises:
            TrtqError: it cannot be opened.
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
            self.source.resize(size)
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
        found = (getattr(self.source.pipeline, name, None) for name in AUTOENCODERS)
        return next((one for one in found if one is not None), None)

    @torch.no_grad()
    def prepare(self, part: str, batch: int, steps: int, guidance: float) -> dict[str, Any]:
        """Make the inputs of a part, and call it until it is warm.

        Args:
            part: one of `parts`.
            batch: images; with guidance the denoiser gets twice as many items, as in a pipeline.
            steps: the denoiser is timed at the middle one of so many.
            guidance: 1 is none.

        Returns:
            `first_call_seconds`, which may hold compilation, and `calls` that a turn will have.
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
        """One turn of the prepared part: `seconds` of each call."""
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
        """Draw a batch of images; those of a turn and seed show the same whatever draws them.

        Args:
            batch: how many.
            steps: denoising steps.
            seed: of their starting noise.
            guidance: 1 is none.
            prompts: used in turn; None for a model that takes none.
            turn: which batch; None: only get warm, in a few steps.
            out: where the images go, as numpy's float32 `[B,C,H,W]`.

        Returns:
            `seconds` of the whole batch, and `joules` of the GPU where they are counted.
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
        used = None if before is None or after is None else after - before
        return {"seconds": seconds, "joules": used}

    def memory(self) -> dict[str, Any]:
        """What calling added to the resident memory at its highest, and the highest of all.

        Returns:
            `activations_bytes`, None where the system does not count from a moment on; `run_peak_bytes`
            since loading; on a GPU also `gpu_weights_bytes` (what loading added) and `gpu_bytes` (what
            this process has by now), where the driver tells them.
        """
        peak = peak_rss_bytes()
        found: dict[str, Any] = {
            "activations_bytes": max(peak - self._loaded, 0) if self._forgot else None,
            "run_peak_bytes": peak,
        }
        if self._on_gpu:
            found["gpu_weights_bytes"] = self._gpu_loaded.added_to(self._gpu_before)
            found["gpu_bytes"] = self._nvml.memory.process
        return found

    @torch.no_grad()
    def operations(self, batch: int, steps: int, guidance: float) -> dict[str, Any]:
        """`operations` of one call of the denoiser, counted on its float form without any weights."""
        cls = getattr(self.source.denoiser, "model_class", type(self.source.model))
        conditions = self.source.draw_conditions(batch, seeded_generator(0, "bench conditions"))
        timestep = torch.tensor(self.source.timesteps(steps)[steps // 2], device="meta")
        with torch.device("meta"):
            model = cls.from_config(self.source.model.config).eval()
            x = torch.zeros(batch, *self.source.sample_shape)
        without: Conditions = conditions.to("meta")
        return {
            "operations": count_operations(lambda: predict(model, x, timestep, without, guidance))
        }


def _on_gpu(denoiser: nn.Module) -> bool:
    """Where a loaded denoiser is, whatever was asked for: a run goes to the GPU only if there is one."""
    if isinstance(denoiser, EngineDenoiser):
        return denoiser.engine.provider in GPU_PROVIDERS
    return any(value.is_cuda for value in denoiser.state_dict().values())


def _import_libraries(path: str, provider: str) -> None:
    """Import what loading imports: neither its time nor its memory is the model's."""
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
    """Answer questions about one artefact, or about the processor."""
    subject = MeasuredArtefact()
    names = ("open", "prepare", "time", "draw", "memory", "operations")
    answer_questions({name: getattr(subject, name) for name in names} | {"cpu_peak": _cpu_peak})
