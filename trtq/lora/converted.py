"""Names of LoRA layers that only diffusers' own converters can translate."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["converted_rows"]

_CONVERTED = {
    "Flux2Transformer2DModel": "Flux2LoraLoaderMixin",
    "Flux3Transformer2DModel": "Flux3LoraLoaderMixin",
    "HunyuanVideoTransformer3DModel": "HunyuanVideoLoraLoaderMixin",
    "Ideogram4Transformer2DModel": "Ideogram4LoraLoaderMixin",
    "Krea2Transformer2DModel": "Krea2LoraLoaderMixin",
    "LTXVideoTransformer3DModel": "LTXVideoLoraLoaderMixin",
    "LTX2VideoTransformer3DModel": "LTX2LoraLoaderMixin",
    "Lumina2Transformer2DModel": "Lumina2LoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
    "WanTransformer3DModel": "WanLoraLoaderMixin",
    "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
}
"""diffusers' loaders of LoRAs, by the class of the denoiser."""


def _probe(outputs: Mapping[str, int]) -> dict[str, Tensor]:
    """A LoRA with indices in place of weights: the name's index in `down`, the row's in `up`."""
    probe = {}
    for number, (name, rows) in enumerate(outputs.items(), 1):
        down, up = ("lora_down", "lora_up") if "lora_unet_" in name else ("lora_A", "lora_B")
        probe[f"{name}.{down}.weight"] = torch.full((1, 1), float(number), dtype=torch.float64)
        probe[f"{name}.{up}.weight"] = torch.arange(1, rows + 1, dtype=torch.float64)[:, None]
    return probe


def converted_rows(
    kind: str, outputs: Mapping[str, int], is_layer: Callable[[str], bool]
) -> Iterator[tuple[str, int, int, str]]:
    """Translate names of a file with diffusers' converter for a denoiser.

    The converter's input has indices in place of weights, so its result shows the layer of each row
    even if the converter renames, splits or reorders matrices.

    Args:
        kind: class of the denoiser.
        outputs: number of output channels, by name in the file.
        is_layer: predicate for paths of layers; other paths are skipped.

    Yields:
        Name in the file, first and last row (counted from 1), and path of a layer.
    """
    mixin = _CONVERTED.get(kind)
    if mixin is None:
        return
    loader: Any = getattr(importlib.import_module("diffusers.loaders.lora_pipeline"), mixin, None)
    if loader is None:
        return
    try:
        converted = loader.lora_state_dict(_probe(outputs))
    except Exception:  # Names that the converter cannot read are reported as missing.
        return
    if isinstance(converted, tuple):
        converted = converted[0]
    names = list(outputs)
    for key, down in converted.items():
        path = key.removesuffix(".lora_A.weight").removeprefix("transformer.")
        up = converted.get(key.replace(".lora_A.", ".lora_B."))
        if not key.endswith(".lora_A.weight") or up is None or not is_layer(path):
            continue
        first, last = int(up.flatten()[0]), int(up.flatten()[-1])
        if last - first + 1 == len(up):
            yield names[int(down.flatten()[0]) - 1], first, last, path
