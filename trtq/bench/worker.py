"""Worker process of the benchmark: loads one artefact and answers requests to measure it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from trtq.bench.called import MeasuredCall
from trtq.bench.cost import count_operations
from trtq.bench.device import cpu_peak
from trtq.bench.measured import DENOISER, Measured, TimedCall
from trtq.bench.process import answer_questions
from trtq.checkpoint.components import AUTOENCODERS
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.sampling import Conditions, predict, seeded_noise
from trtq.pipelines.draw import Conditioning, draw
from trtq.pipelines.open import TORCH, open_any
from trtq.seeds import seeded_generator

__all__ = ["MeasuredArtefact", "main"]

TEXT, DECODER = "text encoder", "VAE decoder"
_WARM_STEPS = 2
_MAX_PROMPTS = 64


class MeasuredArtefact(Measured):
    """An artefact whose denoiser trtq calls itself, and the calls to its parts."""

    def open(self, path: str, provider: str, threads: int, size: str | None) -> dict[str, Any]:
        """Load the artefact.

        Args:
            path: artefact or checkpoint, see `open_any`.
            provider: runtime, see `open_any`.
            threads: number of threads per operator.
            size: image size, `HEIGHTxWIDTH`; None: the artefact's size.

        Returns:
            The values of `Measured`; `shape` and `model_class` of the denoiser; `parts` to time; default
            `guidance`; calibration `prompts`, or None.

        Raises:
            TrtqError: the artefact cannot be opened.
        """

        def opener() -> LoadedPipeline:
            source = open_any(path, provider, None if provider == TORCH else threads)
            return source if size is None else source.sized(size)

        loaded = self._load(path, provider, threads, opener)
        return loaded | {
            "shape": list(self.source.sample_shape),
            "model_class": self.source.model_class,
            "parts": self._parts(),
            "guidance": self.source.guidance,
            "prompts": self._prompts(),
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
        makers: dict[str, Callable[[], TimedCall]] = {
            DENOISER: lambda: self._denoiser_call(batch, steps, guidance),
            TEXT: lambda: self._text_call(batch),
            DECODER: lambda: self._decoder_call(batch),
        }
        return self._warm_up(makers[part]())

    def _denoiser_call(self, batch: int, steps: int, guidance: float) -> TimedCall:
        conditions = self.source.draw_conditions(batch, seeded_generator(0, "bench conditions"))
        # As in the pipeline's loop, the inputs lie where the denoiser computes.
        device = getattr(self.source.denoiser, "device", "cpu")
        conditions = conditions.to(device)
        x = seeded_noise(self.source.sample_shape, 0, 0, batch, "bench").to(device)
        timestep = self.source.timesteps(steps)[steps // 2]
        return lambda: predict(self.source.denoiser, x, timestep, conditions, guidance)

    def _text_call(self, batch: int) -> TimedCall:
        known = self._prompts() or [""]
        prompts = [known[index % len(known)] for index in range(batch)]
        return lambda: self.source.encode(prompts)

    def _decoder_call(self, batch: int) -> TimedCall:
        autoencoder = self._autoencoder()
        shape = (int(autoencoder.config.latent_channels), *self.source.latent_size)
        latents = seeded_noise(shape, 0, 0, batch, "bench latents").to(autoencoder.device)
        return lambda: autoencoder.decode(latents, return_dict=False)

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
        images, cost = self._timed(
            lambda: draw(
                self.source,
                conditioning,
                steps=steps,
                seed=seed + turn,
                guidance=guidance,
                batch=batch,
            )
        )
        if out is not None:
            np.save(out, images.numpy())
        return cost

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


def _cpu_peak(threads: int) -> dict[str, Any]:
    peak = cpu_peak(threads)
    return {"operations": peak.operations, "bytes": peak.bytes, "what": peak.what}


def main() -> None:
    """Answer requests about one artefact, or about the processor."""
    opened: list[MeasuredArtefact | MeasuredCall] = []

    def asked(name: str) -> Callable[..., dict[str, Any]]:
        return lambda **arguments: getattr(opened[0], name)(**arguments)

    def open_row(call_of: str | None = None, **arguments: Any) -> dict[str, Any]:
        opened.append(MeasuredArtefact() if call_of is None else MeasuredCall(call_of))
        answer: dict[str, Any] = asked("open")(**arguments)
        return answer

    names = ("prepare", "time", "draw", "memory", "operations")
    answer_questions(
        {name: asked(name) for name in names} | {"open": open_row, "cpu_peak": _cpu_peak}
    )
