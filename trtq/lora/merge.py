"""Merging LoRAs into the float weights of a pipeline, all of them or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from trtq.errors import ArtefactError, UsageError
from trtq.lora.read import Lora, LoraRequest, LowRank, read_lora

__all__ = ["MergedLora", "merge_loras"]

_KOHYA = {"unet": "lora_unet_", "transformer": "lora_transformer_", "text_encoder": "lora_te_"}
_KOHYA_ALSO = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


@dataclass(frozen=True)
class MergedLora:
    """A LoRA that is in the weights; one entry of a manifest's `loras`.

    Attributes:
        file: its name.
        sha256: of its content.
        scale: its strength.
        modules: number of layers that it changed.
    """

    file: str
    sha256: str
    scale: float
    modules: int

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def _names(components: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Every linear and convolution under each name that a LoRA file may give it."""
    known: dict[str, nn.Module] = {}
    for component, root in components.items():
        for path, module in root.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            known[f"{component}.{path}"] = module
            for prefixes in (_KOHYA, _KOHYA_ALSO):
                if component in prefixes:
                    known[prefixes[component] + path.replace(".", "_")] = module
    return known


def _matched(
    lora: Lora, known: Mapping[str, nn.Module], denoiser: str
) -> list[tuple[nn.Module, LowRank]]:
    """The module of each update.

    Raises:
        ArtefactError: a target is not in the model, or has another shape.
    """
    found, missing = [], []
    for name, update in lora.updates.items():
        # Some files leave out the component, and mean the denoiser.
        module: Any = known.get(name) or known.get(f"{denoiser}.{name}")
        if module is None:
            missing.append(name)
            continue
        shape = tuple(module.weight.shape)
        size = module.weight[0].numel()
        if len(update.up) != shape[0] or update.down[0].numel() != size:
            raise ArtefactError(
                f"the LoRA {lora.name} does not fit {name!r}: its update is {len(update.up)} x "
                f"{update.down[0].numel()}, the weight is {shape[0]} x {size}; it was made for another "
                "model"
            )
        found.append((module, update))
    if missing:
        raise ArtefactError(
            f"the LoRA {lora.name} is for another architecture: {len(missing)} of its "
            f"{len(lora.updates)} targets are not in this model, e.g. {missing[0]!r}"
        )
    return found


def merge_loras(
    components: Mapping[str, nn.Module], requests: Sequence[LoraRequest], denoiser: str = "unet"
) -> list[MergedLora]:
    """Add LoRAs to float weights, in place; nothing is changed unless all of them fit.

    Args:
        components: the float models by their name in the pipeline, e.g. `unet`, `text_encoder`.
        requests: files and strengths.
        denoiser: the component that is meant where a file names none.

    Raises:
        UsageError: the same LoRA twice.
        ArtefactError: a file cannot be read, or is made for another model.
        NonFiniteError: a file holds NaN or infinity.
    """
    known = _names(components)
    loras = [read_lora(request.path) for request in requests]
    seen: set[str] = set()
    for lora in loras:
        if lora.sha256 in seen:
            raise UsageError(
                f"the LoRA {lora.name} is given twice; give it once, with the sum of scales"
            )
        seen.add(lora.sha256)
    matched = [_matched(lora, known, denoiser) for lora in loras]
    merged = []
    with torch.no_grad():
        for request, lora, updates in zip(requests, loras, matched, strict=True):
            for module, update in updates:
                weight: Any = module.weight
                weight.add_(request.scale * update.delta(weight.shape).to(weight))
            merged.append(MergedLora(lora.name, lora.sha256, request.scale, len(updates)))
    return merged
