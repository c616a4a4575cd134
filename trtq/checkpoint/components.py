"""Names of the components of diffusers' pipelines, and the components that predict the noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from trtq.errors import QuantizationError

__all__ = [
    "AUTOENCODERS",
    "DENOISERS",
    "TEXT_ENCODERS",
    "denoiser_class",
    "denoisers_of",
    "find_denoiser",
    "unwrapped",
]

DENOISERS = (
    "unet",
    "transformer",
    "transformer_2",
    "unconditional_transformer",
    "decoder",
    "prior",
)
"""Names of denoisers, in order of precedence."""
TEXT_ENCODERS = {
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
    "text_encoder_3": "tokenizer_3",
    "bert": "tokenizer",
}
"""Names of text encoders and of their tokenizers."""
AUTOENCODERS = ("vae", "vqvae")


def unwrapped(model: Any) -> Any:
    """The model inside the wrappers of `torch.compile` and of data parallelism."""
    while True:
        # The class of compiled models is not imported here, which takes a second.
        inner = vars(model).get("_modules", {}).get("_orig_mod")
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def denoiser_class(denoiser: Any) -> type:
    """Diffusers' class of a denoiser, even if it is quantised or an engine replaces it."""
    modules: Mapping[str, Any] = vars(denoiser).get("_modules", {})
    model = unwrapped(modules.get("denoiser", denoiser))
    cls: type = getattr(denoiser, "model_class", type(model))
    return cls


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
