"""Calling conventions of diffusers' denoisers: names and nesting of their inputs.

A graph has a flat list of inputs; diffusers' models take some inputs inside dicts
(`added_cond_kwargs={"text_embeds": ...}`). This module uses the flat names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["FAMILIES", "Family", "family_named"]

_ADDED = ("text_embeds", "time_ids", "resolution", "aspect_ratio")
"""Inputs that models take inside `added_cond_kwargs`."""


@dataclass(frozen=True)
class Family:
    """Calling convention of one class of denoisers.

    Attributes:
        sample: name of the noisy input.
        one_timestep: whether the model accepts a single timestep for the whole batch.
        free_size: whether one graph supports several image sizes; if not, the graph's positions are
            constants.
    """

    sample: str
    one_timestep: bool = False
    free_size: bool = False

    @property
    def output(self) -> str:
        """Name of the prediction in an exported graph, as optimum-onnx expects it."""
        return f"out_{self.sample}"

    def arguments(self, x: Tensor, timestep: Tensor | float, values: Mapping[str, Tensor]) -> Any:
        """Keyword arguments of one call.

        Args:
            x: noisy samples, `[B, ...]`.
            timestep: one timestep for all samples, or one per sample, `[B]`.
            values: all other inputs by flat name.
        """
        timestep = torch.as_tensor(timestep, device=x.device)
        if not self.one_timestep and timestep.numel() == 1:
            timestep = timestep.reshape(1).repeat(len(x))
        return {self.sample: x, "timestep": timestep, **self.nest(values)}

    def nest(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Put inputs into the dict arguments of the model."""
        arguments: dict[str, Any] = {k: v for k, v in values.items() if k not in _ADDED}
        if added := {name: value for name, value in values.items() if name in _ADDED}:
            arguments["added_cond_kwargs"] = added
        return arguments

    def flatten(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Take inputs out of their dict arguments; omit None and empty dicts."""
        flat: dict[str, Any] = {}
        for name, value in arguments.items():
            for key, item in value.items() if isinstance(value, dict) else [(name, value)]:
                if item is not None:
                    flat[key] = item
        return flat


_UNET = Family("sample", one_timestep=True, free_size=True)
_TRANSFORMER = Family("hidden_states")
FAMILIES: dict[str, Family] = {
    "UNet2DModel": _UNET,
    "UNet2DConditionModel": _UNET,
    "DiTTransformer2DModel": _TRANSFORMER,
    "PixArtTransformer2DModel": _TRANSFORMER,
    "SD3Transformer2DModel": Family("hidden_states", free_size=True),
    "FluxTransformer2DModel": _TRANSFORMER,
}


def family_named(model_class: str) -> Family:
    """The family of a diffusers model class.

    An unknown class with "Transformer" in its name is called like a transformer, others like a UNet.
    """
    if model_class in FAMILIES:
        return FAMILIES[model_class]
    return _TRANSFORMER if "Transformer" in model_class else _UNET
