"""Comparison of an exported graph with the torch denoiser that was exported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trtq.artefact.manifest import Manifest
from trtq.artefact.opened import DEFAULT_STEPS
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.sampling import Conditions, seeded_noise
from trtq.diffusion.schedule import NoiseSchedule
from trtq.engine.denoiser import EngineDenoiser
from trtq.engine.ort import OrtEngine
from trtq.errors import GateError
from trtq.exporter.layer_outputs import looked_up_steps
from trtq.exporter.parity import StepParity, noise_parity, step_parity
from trtq.quant import TimestepTable
from trtq.seeds import seeded_generator

__all__ = ["PARITY_DB", "ParityStart", "parity_start", "step_parities"]

PARITY_DB: dict[str, float] = {"fp32": 40.0, "fp16": 20.0}
"""Minimum SNR, in dB, of the exported noise prediction at any calibrated step. In a half-precision
graph values near a rounding tie fall on the other code, so a 4-bit model cannot be held to more."""
_PARITY_VALUES = 1 << 18
_PARITY_IMAGES = (4, 128)
_PARITY_WEIGHTS = 2 << 30
"""Limit of images times weights in the comparison of a step: a billion weights with two images."""


def step_parities(
    source: LoadedPipeline,
    model: Path,
    manifest: Manifest,
    *,
    thorough: bool = False,
    packed: bool = False,
) -> list[StepParity]:
    """Compare a graph on onnxruntime's CPU provider with torch.

    The step index must be right at every calibrated timestep and on both sides of each border between
    two timesteps. Predictions are compared at every step. A model with more than half a billion weights
    is compared with one image at the middle step, unless `thorough`, since every further image costs a
    minute on a CPU and gigabytes of activations.

    Args:
        source: the pipeline around the torch denoiser, at the size to compare at.
        model: path of the graph's file.
        manifest: manifest with the timesteps and the recipe.
        thorough: compare every step, for a large model too.
        packed: whether the graph's weights stay in their file, see `trtq.engine.ort.OrtEngine`.

    Returns:
        One row per step, cleanest first, then one for a batch of mixed steps; or a single row.

    Raises:
        GateError: the graph uses another step of the tables than torch does.
    """
    table = TimestepTable(manifest.timesteps) if manifest.timesteps else None
    if table is not None and len(table) > 1:
        _check_lookup(source, model, table)
    exported = EngineDenoiser(
        OrtEngine(model, low_memory=True, packed=packed), source.model.config, type(source.model)
    )
    weights = sum(tensor.numel() for tensor in source.denoiser.state_dict().values())
    large = weights * _PARITY_IMAGES[0] > _PARITY_WEIGHTS and not thorough
    start = parity_start(source, manifest, 1 if large else None)
    compared = noise_parity if large else step_parity
    return compared(source.denoiser, exported, start.schedule, start.noise, start.conditions)


@dataclass(frozen=True)
class ParityStart:
    """Start of the trajectories whose steps are compared.

    Attributes:
        schedule: the calibrated steps.
        noise: initial noise, `[B,C,H,W]`.
        conditions: conditions of the B images.
    """

    schedule: NoiseSchedule
    noise: Tensor
    conditions: Conditions


def parity_start(
    source: LoadedPipeline, manifest: Manifest | None, images: int | None = None
) -> ParityStart:
    """The start of the trajectories at which two denoisers are compared.

    Args:
        source: the pipeline around the reference, at the size to compare at.
        manifest: manifest with the timesteps and the recipe; None: of a float model.
        images: number of images; None: many of a small size, so that rare ties show, and few large ones,
            since each step is a forward pass.
    """
    timesteps = None if manifest is None else manifest.timesteps
    steps = len(timesteps) if timesteps is not None and len(timesteps) > 1 else DEFAULT_STEPS
    if manifest is not None and manifest.recipe is not None and manifest.recipe.steps is not None:
        steps = manifest.recipe.steps
    if images is None:
        min_images, max_images = _PARITY_IMAGES
        images = max(min_images, min(max_images, _PARITY_VALUES // math.prod(source.sample_shape)))
        weights = sum(tensor.numel() for tensor in source.denoiser.state_dict().values())
        images = max(1, min(images, _PARITY_WEIGHTS // max(1, weights)))
    schedule = source.schedule(steps)
    conditions = source.draw_conditions(images, seeded_generator(0, "parity conditions"))
    return ParityStart(schedule, seeded_noise(source.sample_shape, 0, 0, images), conditions)


def _check_lookup(source: LoadedPipeline, model: Path, table: TimestepTable) -> None:
    up, down = torch.tensor(float("inf")), torch.tensor(-float("inf"))
    borders = [table.edges.nextafter(down), table.edges, table.edges.nextafter(up)]
    timesteps = torch.cat([table.timesteps.float(), *borders])
    steps = looked_up_steps(model, source.family.sample, timesteps)
    if steps is None:
        return
    wrong = (steps != table.index(timesteps)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        expected = int(table.index(timesteps)[first])
        raise GateError(
            f"at timestep {float(timesteps[first]):g} the exported graph uses step "
            f"{int(steps[first])} of its tables, torch step {expected}"
        )
