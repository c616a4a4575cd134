"""Estimate of the time and memory that a quantisation takes on this machine.

The speed of one convolution is measured at each call. The cost of each stage, in passes through the
denoiser, was measured once, on the shipped models and at Stable Diffusion's size. The estimate is right
within a factor of two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from trtq.calib.recipe import Training
from trtq.diffusion.sampling import at_once

if TYPE_CHECKING:
    from trtq.runs.plan import QuantizePlan

__all__ = ["Estimate", "estimate"]

_UTILISATION = 0.8
"""Speed of a whole denoiser in float, relative to one well-shaped convolution."""
_LAYER_SECONDS = 1e-4
"""Overhead of calling one layer, in seconds."""
_FORWARDS_PER_ITERATION = 6
"""Cost of teacher, student and backward pass in one fine-tuning iteration, in float forward passes."""
_RECOMPUTE_FORWARDS = 2
_SEARCH_SECONDS = 1e-8
"""Time to try one candidate range for one value on one thread, in seconds."""
_CANDIDATES = 80
_KEPT_PER_VALUE = 5
"""Number of float32 values kept for the backward pass, per value that enters or leaves a layer."""
_BASE_BYTES = 600 << 20
"""Memory of the interpreter with torch and diffusers, in bytes."""


@dataclass(frozen=True)
class Estimate:
    """Cost of a quantisation.

    Attributes:
        seconds: duration, in seconds.
        peak_bytes: peak memory, in bytes.
    """

    seconds: float
    peak_bytes: float


def _multiplications_per_second() -> float:
    """Multiplications per second of a 3 x 3 float32 convolution, 128 channels, 32 x 32, on the CPU."""
    x, weight = torch.randn(4, 128, 32, 32), torch.randn(128, 128, 3, 3)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        functional.conv2d(x, weight, padding=1)
        best = min(best, time.perf_counter() - start)
    return 4 * 128 * 32 * 32 * weight[0].numel() / best


@torch.no_grad()
def estimate(plan: QuantizePlan) -> Estimate:
    """Estimate the time and memory of `trtq quantize` on this machine's CPU."""
    recipe, calls = plan.recipe, plan.calls
    guided = 1 if recipe.guidance in (None, 1.0) else 2
    steps, images = recipe.steps, recipe.calibration.images
    assert images is not None
    each = sum(call.multiplications for call in calls.values())
    rate = _multiplications_per_second() * _UTILISATION

    def forward(items: int) -> float:
        return items * each / rate + len(calls) * _LAYER_SECONDS

    batch = at_once(plan.source.sample_shape, recipe.calibration.batch)
    batches = -(-images // batch)
    seconds = batches * steps * forward(guided * min(batch, images))
    weights = sum(
        module.weight.numel()
        for name, module in plan.source.denoiser.named_modules()
        if name in calls and getattr(module, "weight", None) is not None
    )
    searched = 0
    if recipe.calibration.weights == "search":
        searched += weights
    if recipe.calibration.activations in ("search", "output"):
        searched += len(plan.layers) * steps * recipe.calibration.samples_per_step
    seconds += searched * _CANDIDATES * _SEARCH_SECONDS / torch.get_num_threads()

    widest = max(call.input_values + call.output_values for call in calls.values())
    recorded = 4 * len(plan.layers) * steps * recipe.calibration.samples_per_step
    peak: float = plan.bytes_before() + recorded + 8 * widest * guided * min(batch, images)
    if recipe.training is not None:
        tuning = _tuning(plan, recipe.training, guided, forward)
        seconds += tuning.seconds
        peak += tuning.peak_bytes
    return Estimate(seconds, _BASE_BYTES + peak + plan.bytes_after())


def _tuning(
    plan: QuantizePlan, training: Training, guided: int, forward: Callable[[int], float]
) -> Estimate:
    """Time and additional memory of the fine-tuning.

    Args:
        plan: the plan.
        training: the recipe's training.
        guided: number of denoiser inputs per image.
        forward: seconds of a forward pass by the number of its inputs.
    """
    parameters = plan.bytes_before()
    values = {name: call.input_values + call.output_values for name, call in plan.calls.items()}
    rounds = training.iterations * training.accumulate
    blockwise = plan.recipe.blockwise
    recompute = training.recomputes(parameters // 4) and blockwise is None
    passes = _FORWARDS_PER_ITERATION + (_RECOMPUTE_FORWARDS if recompute else 0)
    kept = 12 * max(values.values()) if recompute else sum(values.values())
    # Kept fake-quantised weights, adapters, their gradients and Adam's two moments.
    kept_weights: float = 0 if recompute else 2 * parameters
    if blockwise is not None:
        blocks = plan.blocks()
        # Each block is recorded by half a pass on average, in float and in low bits.
        rounds += blockwise.points * training.accumulate * len(blocks) // passes
        rounds += blockwise.whole_iterations * training.accumulate
        if not blockwise.whole_iterations:
            sizes = [sum(_inside(values, block)) for block in blocks]
            kept_weights *= max(sizes) / kept
            kept = max(sizes)
    seconds = rounds * passes * forward(guided * training.batch)
    return Estimate(seconds, 4 * _KEPT_PER_VALUE * kept * guided * training.batch + kept_weights)


def _inside(values: Mapping[str, int], block: str) -> list[int]:
    """The values of the layers inside a block."""
    return [
        value for name, value in values.items() if name == block or name.startswith(f"{block}.")
    ]
