"""The components of a pipeline that predict the noise."""

from __future__ import annotations

from typing import Any

from torch import nn

from trtq.errors import QuantizationError

__all__ = ["DENOISERS", "denoisers_of", "find_denoiser"]

DENOISERS = (
    "unet",
    "transformer",
    "transformer_2",
    "unconditional_transformer",
    "decoder",
    "prior",
)
"""Names under which diffusers' pipelines hold their denoisers, in order of precedence."""


def denoisers_of(pipeline: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by name.

    Raises:
        QuantizationError: the pipeline has none.
    """
    modules = {name: getattr(pipeline, name, None) for name in DENOISERS}
    present = {name: module for name, module in modules.items() if isinstance(module, nn.Module)}
    if not present:
        components = ", ".join(sorted(getattr(pipeline, "components", {}))) or "none"
        raise QuantizationError(
            f"{type(pipeline).__name__} has no denoiser: a component {', '.join(DENOISERS[:-1])} "
            f"or {DENOISERS[-1]} is required, its components are: {components}"
        )
    return present


def find_denoiser(pipeline: Any) -> str:
    """Name of the first component that predicts the noise.

    Raises:
        QuantizationError: the pipeline has no such component.
    """
    return next(iter(denoisers_of(pipeline)))
