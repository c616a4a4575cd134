"""Calling conventions of diffusers' denoisers: names, nesting and scaling of their inputs.

A graph has a flat list of inputs; diffusers' models take some inputs inside dicts
(`added_cond_kwargs={"text_embeds": ...}`). This module uses the flat names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["FAMILIES", "Family", "family_named"]


@dataclass(frozen=True)
class Family:
    """Calling convention of one class of denoisers.

    Attributes:
        sample: name of the noisy input.
        output: name of the prediction in an exported graph, as optimum-onnx expects it.
        timestep_scale: factor that pipelines apply to timesteps.
        one_timestep: whether the model accepts a single timestep for the whole batch.
        free_size: whether one graph supports several image sizes; if not, the graph's positions are
            constants.
        nested: name of the dict argument that contains an input, by flat name of the input.
    """

    sample: str = "sample"
    output: str = "out_sample"
    timestep_scale: float = 1.0
    one_timestep: bool = False
    free_size: bool = False
    nested: Mapping[str, str] = field(default_factory=dict)

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
        arguments: dict[str, Any] = {}
        for name, value in values.items():
            if name in self.nested:
                arguments.setdefault(self.nested[name], {})[name] = value
            else:
                arguments[name] = value
        return arguments

    def flatten(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Take inputs out of their dict arguments; omit None and empty dicts."""
        flat: dict[str, Any] = {}
        for name, value in arguments.items():
            for key, item in value.items() if isinstance(value, dict) else [(name, value)]:
                if item is not None:
                    flat[key] = item
        return flat


_TEXT_AND_SIZE = {"text_embeds": "added_cond_kwargs", "time_ids": "added_cond_kwargs"}
_RESOLUTION = {"resolution": "added_cond_kwargs", "aspect_ratio": "added_cond_kwargs"}
_TRANSFORMER = Family("hidden_states", "out_hidden_states")
FAMILIES: dict[str, Family] = {
    "UNet2DModel": Family(one_timestep=True, free_size=True),
    "UNet2DConditionModel": Family(one_timestep=True, free_size=True, nested=_TEXT_AND_SIZE),
    "DiTTransformer2DModel": _TRANSFORMER,
    "PixArtTransformer2DModel": Family("hidden_states", "out_hidden_states", nested=_RESOLUTION),
    "SD3Transformer2DModel": Family("hidden_states", "out_hidden_states", free_size=True),
    "FluxTransformer2DModel": Family("hidden_states", "out_hidden_states", timestep_scale=1e-3),
}


def family_named(model_class: str) -> Family:
    """The family of a diffusers model class.

    An unknown class with "Transformer" in its name is called like a transformer, others like a UNet.
    """
    if model_class in FAMILIES:
        return FAMILIES[model_class]
    return _TRANSFORMER if "Transformer" in model_class else FAMILIES["UNet2DModel"]
