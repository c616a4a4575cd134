"""Comparison of a denoiser on a GPU with the same graph on onnxruntime's CPU provider."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.sampling import predict, seeded_noise
from trtq.exporter.step_check import PARITY_DB
from trtq.seeds import seeded_generator
from trtq.selftest.trials import Outcome
from trtq.snr import snr_db

__all__ = ["BATCHES", "MIN_DB", "Call", "compare_denoiser", "prediction"]

BATCHES = (1, 3, 8)
"""Batch sizes of the calls."""
MIN_DB = PARITY_DB["fp16"]
"""Minimum SNR of a prediction in half precision, in dB, as after an export."""


@dataclass(frozen=True)
class Call:
    """Inputs of one call of a denoiser.

    Attributes:
        batch: number of images.
        seed: seed of noise and conditions.
        timestep: timestep of all images.
    """

    batch: int
    seed: int
    timestep: float


def prediction(source: LoadedPipeline, denoiser: Callable[..., Any], call: Call) -> Tensor:
    """The prediction of a denoiser for the inputs of a call, on the CPU.

    Args:
        source: the pipeline, for shapes and conditions.
        denoiser: denoiser with the interface of diffusers.
        call: inputs of the call.
    """
    generator = seeded_generator(call.seed, "selftest conditions")
    conditions = source.draw_conditions(call.batch, generator)
    noise = seeded_noise(source.sample_shape, call.seed, 0, call.batch)
    return predict(denoiser, noise, call.timestep, conditions).float().cpu()


def compare_denoiser(
    reference: LoadedPipeline, denoiser: Callable[..., Any], timesteps: Sequence[float]
) -> Outcome:
    """Compare at each timestep, in each batch size, and in alternating calls with two inputs.

    A captured graph that keeps reading the inputs of its capture repeats its first output, so the third
    and fourth call have the inputs of the first and second one.

    Args:
        reference: the pipeline on onnxruntime's CPU provider.
        denoiser: the denoiser on the GPU.
        timesteps: the calibrated timesteps.
    """
    middle = timesteps[len(timesteps) // 2]
    calls = [Call(2, 0, timestep) for timestep in timesteps]
    calls += [Call(batch, 1, middle) for batch in BATCHES]
    calls += [Call(2, seed, middle) for seed in (2, 3, 2, 3)]
    values, seconds, before = [], [], None
    for index, call in enumerate(calls):
        wanted = prediction(reference, reference.denoiser, call)
        start = time.monotonic()
        output = prediction(reference, denoiser, call)
        seconds.append(time.monotonic() - start)
        values.append(snr_db(wanted, output))
        if not values[-1] >= MIN_DB:  # NaN fails, too.
            same = before is not None and before.shape == output.shape and before.equal(output)
            fault = (
                f"call {index + 1}, batch {call.batch}, timestep {call.timestep:g}: the prediction "
                f"agrees with onnxruntime's CPU to {values[-1]:.1f} dB, at least {MIN_DB:g} are needed"
                + ("; it repeats the output of the call before" if same else "")
            )
            return Outcome(_detail(values, seconds), fault)
        before = output
    return Outcome(_detail(values, seconds))


def _detail(values: Sequence[float], seconds: Sequence[float]) -> dict[str, object]:
    return {
        "min_db": round(min(values), 1),
        "calls": len(values),
        "first_call_seconds": round(seconds[0], 3),
        "median_call_seconds": round(sorted(seconds)[len(seconds) // 2], 5),
    }
