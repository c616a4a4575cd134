"""Estimate of the time and memory that a quantisation takes on this machine.

The speed of one convolution is measured at each call. The cost of each stage, in passes through the
denoiser, was measured once, on the shipped models and at Stable Diffusion's size. The estimate is right
within a factor of two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from trtq.calib.probe import LayerCall
from trtq.calib.recipe import Training
from trtq.diffusion.sampling import at_once
from trtq.quant.stored_weight import has_stored_weight, weight_parameter
from trtq.train.blocks import is_inside

if TYPE_CHECKING:
    from trtq.runs.plan import QuantizePlan
    from trtq.runs.plan_calls import CallsPlan

__all__ = ["Estimate", "estimate", "estimate_calls"]

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
_READ_SECONDS = 2e-9
"""Time to read one weight from its file and convert it to float32, in seconds."""
_WHOLE_READS = 3
"""Number of times that all weights are read besides denoiser calls: for ranges, to round, to write."""
_TRANSFORM_SECONDS = 2e-7
"""Time to choose a layer's transform and to apply it, per weight on one thread, in seconds."""
_CALLS_BYTES = 300 << 20
"""Memory of a calibration inside the pipeline's call, besides what is counted, in bytes."""
_READ_BYTES = 16
"""Memory per weight of the largest layer whose weights are in files: copies in float32."""


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
    forward = _forward(calls, _multiplications_per_second())
    batch = at_once(plan.source.sample_shape, recipe.calibration.batch)
    batches = -(-images // batch)
    seconds = batches * steps * forward(guided * min(batch, images)) + _search_seconds(plan)

    widest = max(call.input_values + call.output_values for call in calls.values())
    recorded = 4 * len(plan.layers) * steps * recipe.calibration.samples_per_step
    peak: float = plan.bytes_before() + recorded + 8 * widest * guided * min(batch, images)
    if recipe.training is not None:
        tuning = _tuning(plan, recipe.training, guided, forward)
        seconds += tuning.seconds
        peak += tuning.peak_bytes
    return Estimate(seconds, _BASE_BYTES + peak + plan.bytes_after())


def estimate_calls(plan: CallsPlan, *, stored: bool) -> Estimate:
    """Estimate the time and memory of `trtq quantize` inside the pipeline's own call on this CPU.

    Text encoders and autoencoders are not counted.

    Args:
        plan: the plan.
        stored: whether large weights stay in their files.
    """
    speed = _multiplications_per_second()
    seconds, peak = 0.0, float(_BASE_BYTES + _CALLS_BYTES)
    for part in plan.denoisers:
        recipe, calls = part.plan.recipe, part.plan.calls
        forward = _forward(calls, speed)
        sizes = [tensor.numel() for _, tensor in _weights(part.plan)]
        reads = stored * sum(sizes) * _READ_SECONDS
        number = len(plan.calls) * len(part.calls.timesteps)
        seconds += number * (forward(1) + reads) + _search_seconds(part.plan)
        seconds += _WHOLE_READS * reads
        if recipe.smooth or recipe.rotate:
            seconds += sum(sizes) * _TRANSFORM_SECONDS / torch.get_num_threads()
        widest = max(call.input_values + call.output_values for call in calls.values())
        steps = len(part.plan.table)
        peak += 4 * len(part.plan.layers) * steps * recipe.calibration.samples_per_step
        peak += 8 * widest + part.plan.bytes_after()
        peak += _READ_BYTES * max(sizes) if stored else part.plan.bytes_before()
        if recipe.training is not None:
            tuning = _tuning(part.plan, recipe.training, 1 / plan.call.images, forward)
            seconds += tuning.seconds
            peak += tuning.peak_bytes
    return Estimate(seconds, peak)


def _forward(calls: Mapping[str, LayerCall], speed: float) -> Callable[[float], float]:
    """Seconds of a forward pass, by its size relative to the probed call of the denoiser.

    Args:
        calls: the layers' calls in the probed call.
        speed: multiplications per second of a convolution.
    """
    each = sum(call.multiplications for call in calls.values())
    rate = speed * _UTILISATION
    return lambda items: items * each / rate + len(calls) * _LAYER_SECONDS


def _weights(plan: QuantizePlan) -> Iterator[tuple[str, Tensor]]:
    """The weights of the called layers by path; stored weights are not read."""
    for name, module in plan.source.denoiser.named_modules():
        if name in plan.calls and (has_stored_weight(module) or hasattr(module, "weight")):
            yield name, weight_parameter(module)


def _search_seconds(plan: QuantizePlan) -> float:
    """Time to try the ranges of weights and activations."""
    calibration = plan.recipe.calibration
    searched = 0
    if calibration.weights == "search":
        searched += sum(weight.numel() for _, weight in _weights(plan))
    if calibration.activations in ("search", "output"):
        searched += len(plan.layers) * len(plan.table) * calibration.samples_per_step
    return searched * _CANDIDATES * _SEARCH_SECONDS / torch.get_num_threads()


def _tuning(
    plan: QuantizePlan,
    training: Training,
    guided: float,
    forward: Callable[[float], float],
) -> Estimate:
    """Time and additional memory of the fine-tuning.

    Args:
        plan: the plan.
        training: the recipe's training.
        guided: number of probed calls per image; a fraction if the call computes several images.
        forward: see `_forward`.
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
            sizes = [
                sum(value for name, value in values.items() if is_inside(name, block))
                for block in blocks
            ]
            kept_weights *= max(sizes) / kept
            kept = max(sizes)
    seconds = rounds * passes * forward(guided * training.batch)
    return Estimate(seconds, 4 * _KEPT_PER_VALUE * kept * guided * training.batch + kept_weights)
