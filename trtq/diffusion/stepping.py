"""How each diffusers pipeline uses its scheduler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

__all__ = ["KNOWN_PIPELINES", "Stepping", "stepping_of"]


@dataclass(frozen=True)
class Stepping:
    """A pipeline's use of its scheduler.

    Attributes:
        scales_noise: whether the pipeline multiplies the initial noise by `init_noise_sigma`.
        scales_input: whether the pipeline passes each denoiser input through `scale_model_input`.
        lenient: whether the pipeline skips either scaling if the scheduler does not define it.
        generator: whether the pipeline always passes a generator to `step`, even if `step` accepts
            none.
        eta: whether the pipeline always passes `eta` to `step`, even if `step` accepts none.
        linear_sigmas: whether the pipeline passes its own noise levels, evenly spaced from 1 to 1 /
            steps, to a scheduler without `use_flow_sigmas`.
        shift: condition for passing `mu`, the shift by image size: `never`, `dynamic` (if the scheduler
            sets `use_dynamic_shifting`) or `always`.
        max_shift: maximum shift, used if the scheduler does not configure one.
        second_of_one: whether the pipeline reads a second result of `step` if there is only one
            denoising step; some schedulers return a single result.
    """

    scales_noise: bool = True
    scales_input: bool = True
    lenient: bool = False
    generator: bool = False
    eta: bool = False
    linear_sigmas: bool = False
    shift: str = "never"
    max_shift: float = 1.15
    second_of_one: bool = False


_BARE = Stepping(scales_noise=False, scales_input=False)
_STEPPING = {
    "ClassConditionalPipeline": Stepping(lenient=True),
    "DDIMPipeline": replace(_BARE, generator=True, eta=True),
    "DDPMPipeline": replace(_BARE, generator=True),
    "DiTPipeline": Stepping(scales_noise=False),
    "FluxPipeline": replace(_BARE, linear_sigmas=True, shift="always"),
    "LDMPipeline": Stepping(),
    "LDMTextToImagePipeline": _BARE,
    "PixArtAlphaPipeline": Stepping(second_of_one=True),
    "PixArtSigmaPipeline": Stepping(),
    "StableDiffusion3Pipeline": replace(_BARE, shift="dynamic", max_shift=1.16),
    "StableDiffusionPipeline": Stepping(),
    "StableDiffusionXLPipeline": Stepping(),
}
KNOWN_PIPELINES = tuple(sorted(set(_STEPPING) - {"ClassConditionalPipeline"}))
"""diffusers' pipelines with a known use of their scheduler."""


def stepping_of(pipeline: Any) -> Stepping | None:
    """A pipeline's use of its scheduler; None if unknown.

    The result depends on the class that defines `__call__`, so a subclass with its own is unknown.
    """
    for cls in type(pipeline).__mro__:
        if "__call__" in vars(cls):
            return _STEPPING.get(cls.__name__)
    return None
