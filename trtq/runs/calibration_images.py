"""Default number of calibration images: 64, and fewer for models whose calls take long.

`benchmarks/calibration_images.py` measures what fewer images cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trtq.calib.recipe import Recipe
    from trtq.runs.plan import QuantizePlan

__all__ = ["default_images", "with_images"]

_MAX, _MIN = 64, 8
_CPU_MULTIPLICATIONS = 4e13
"""Multiplications of a calibration on a CPU: 10 minutes at 65 billion per second. Chosen by hand."""
_GPU_MULTIPLICATIONS = 2e15
"""Multiplications of a calibration on a GPU: some minutes at 10 trillion per second. Chosen by hand."""


def default_images(multiplications: float) -> int:
    """The number of images, a power of two.

    Args:
        multiplications: number of multiplications of the denoisers for one image, over all steps.
    """
    limit = _GPU_MULTIPLICATIONS if torch.cuda.is_available() else _CPU_MULTIPLICATIONS
    images = _MAX
    while images > _MIN and images * multiplications > limit:
        images //= 2
    return images


def with_images(plans: Sequence[QuantizePlan], images: Sequence[float]) -> list[QuantizePlan]:
    """The plans of a pipeline's denoisers with a number of calibration images in their recipes.

    Args:
        plans: the plans; a number in their recipe is kept.
        images: for each plan, the number of its probed call that one image takes; a fraction if the call
            computes several images.
    """
    total = sum(
        number * sum(call.multiplications for call in plan.calls.values())
        for plan, number in zip(plans, images, strict=True)
    )
    chosen = plans[0].recipe.calibration.images or default_images(total)
    return [replace(plan, recipe=_with(plan.recipe, chosen)) for plan in plans]


def _with(recipe: Recipe, images: int) -> Recipe:
    calibration = recipe.calibration.model_copy(update={"images": images})
    return recipe.model_copy(update={"calibration": calibration})
