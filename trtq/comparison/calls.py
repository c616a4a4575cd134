"""The denoiser calls at which two sides are compared: the real inputs of every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trtq.comparison.call_set import CallSet, Feeds, Outputs
from trtq.comparison.sides import Side
from trtq.diffusion.families import Family
from trtq.diffusion.sampling import at_once, predict, walk
from trtq.errors import UsageError
from trtq.exporter.parity import mixed_items
from trtq.exporter.step_check import parity_start

__all__ = ["DenoiserCalls", "check_inputs", "record_calls"]


@dataclass(frozen=True)
class DenoiserCalls(CallSet):
    """Calls of a denoiser, cleanest step first, then one whose items are at different steps.

    Attributes:
        family: calling convention of the denoiser; the inputs have its flat names, batch first.
    """

    family: Family

    @property
    def channels(self) -> int:
        """Channels of the prediction; further channels of an output are a learned variance."""
        return int(self.feeds[0][self.family.sample].shape[1])

    def few(self, max_images: int) -> DenoiserCalls:
        """The calls with as many images as are computed at once, see `trtq.diffusion.sampling`."""
        return self.take(at_once(self.feeds[0][self.family.sample].shape[1:], max_images))

    def only(self, index: int) -> DenoiserCalls:
        """The call with this index alone."""
        return DenoiserCalls(
            [self.feeds[index]], [self.timesteps[index]], [self.steps[index]], self.family
        )

    def call(self, denoiser: Any, feeds: Feeds) -> Outputs:
        """The prediction of a denoiser in torch, by the name of a graph's output."""
        with torch.no_grad():
            prediction: Tensor = denoiser(**self._arguments(feeds), return_dict=False)[0]
        return {self.family.output: prediction.detach().cpu().numpy()}

    def _arguments(self, feeds: Feeds) -> dict[str, Any]:
        """Keyword arguments of a denoiser in torch."""
        family = self.family
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()
        }
        x, timestep = tensors.pop(family.sample), tensors.pop("timestep")
        if family.one_timestep and timestep.numel() == 1:
            timestep = timestep.reshape(())
        arguments: dict[str, Any] = family.arguments(x, timestep, tensors)
        return arguments

    def take(self, images: int) -> DenoiserCalls:
        """The calls with at most this many images each; the mixed call keeps all of its steps."""
        feeds: list[Feeds] = []
        mixed: list[list[int] | None] = []
        for feed, steps in zip(self.feeds, self.steps, strict=True):
            count = len(feed[self.family.sample])
            size = min(count, images if steps is None else max(images, len(set(steps))))
            items = np.linspace(0, count - 1, size).round().astype(int)
            feeds.append(
                {
                    name: array[items] if len(array) == count else array
                    for name, array in feed.items()
                }
            )
            mixed.append(None if steps is None else [steps[item] for item in items])
        return DenoiserCalls(feeds, self.timesteps, mixed, self.family)


@dataclass
class _Spy:
    """A denoiser whose inputs are kept."""

    denoiser: Callable[..., Any]
    family: Family
    feeds: list[Feeds] = field(default_factory=list)

    def __call__(self, *, return_dict: bool, **arguments: Any) -> Any:
        flat = self.family.flatten(arguments)
        self.feeds.append({name: _array(value) for name, value in flat.items()})
        return self.denoiser(**arguments, return_dict=return_dict)


def _array(value: Any) -> np.ndarray:
    array: np.ndarray = torch.as_tensor(value).detach().cpu().numpy().copy()
    return array.reshape(array.shape or (1,))


@torch.no_grad()
def record_calls(reference: Side, other: Side, images: int | None = None) -> DenoiserCalls:
    """Run the reference's denoising loop, and keep the inputs of its denoiser at every step.

    The loop is that of the comparison after an export, see `trtq.exporter.step_check.parity_start`.

    Args:
        reference: the side whose predictions lead from step to step.
        other: the other side, whose calibrated steps count if the reference has none.
        images: number of images; None: as after an export.

    Raises:
        UsageError: a pipeline is not known in closed form.
    """
    source = reference.source
    for side in (reference, other):
        if side.opened.smallest_size is not None:
            source = source.sized(side.opened.smallest_size)
    manifests = [side.manifest for side in (reference, other) if side.opened.low_bit]
    start = parity_start(source, next(iter(manifests), None), images)
    spy = _Spy(source.denoiser, source.family)
    position, image = mixed_items(len(start.noise), len(start.schedule))
    mixed = torch.empty(len(position), *start.noise.shape[1:], dtype=start.noise.dtype)
    timesteps: list[float | None] = []
    for point in walk(spy, start.schedule, start.noise, start.conditions):
        here = position == point.position
        mixed[here] = point.x[image[here]]
        timesteps.append(point.timestep)
    spy.feeds.reverse()
    timesteps.reverse()
    predict(spy, mixed, start.schedule.timesteps[position], start.conditions.take(image))
    steps: list[list[int] | None] = [*[None for _ in timesteps], position.tolist()]
    return DenoiserCalls(spy.feeds, [*timesteps, None], steps, source.family)


def check_inputs(calls: DenoiserCalls, sides: tuple[Side, Side]) -> None:
    """Raise unless both sides take the recorded inputs.

    Raises:
        UsageError: a graph has another input, or an input of another shape; the message names it.
    """
    reference = sides[0]
    for side in sides:
        if side.in_torch:
            continue
        specs = side.engine.inputs
        if differing := set(specs) ^ set(calls.inputs):
            raise UsageError(
                f"the inputs differ: {side.label} takes {', '.join(specs)}, and {reference.label} is "
                f"called with {', '.join(calls.inputs)} (not in both: {', '.join(sorted(differing))}); "
                "compare artefacts of one model"
            )
        for name, spec in specs.items():
            shape = calls.feeds[0][name].shape
            fits = len(shape) == len(spec.shape) and all(
                size == fixed
                for size, fixed in zip(shape, spec.shape, strict=True)
                if isinstance(fixed, int)
            )
            if not fits:
                raise UsageError(
                    f"the inputs differ: {side.label} takes {name!r} of shape "
                    f"[{', '.join(map(str, spec.shape))}], and {reference.label} is called with "
                    f"{list(shape)}; compare artefacts of one model and one --size"
                )
