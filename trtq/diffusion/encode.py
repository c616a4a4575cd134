"""Prompts and classes of a pipeline: conditions of its denoiser. Letters: B images, P prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trtq.checkpoint.components import denoiser_class
from trtq.diffusion.families import Family
from trtq.diffusion.sampling import Conditions
from trtq.errors import UsageError

__all__ = [
    "CalibrationPrompts",
    "Encoded",
    "check_unlabelled",
    "class_conditions",
    "class_count",
    "embedded_guidance",
    "encodes_text",
    "takes_negative",
]

_PROMPT_GROUP = 4


@dataclass(frozen=True)
class Encoded:
    """Inputs of a denoiser, by flat name.

    Attributes:
        conditional: inputs for the prompts, `[P, ...]` each.
        unconditional: inputs for no prompt or a negative prompt, `[1, ...]` each; None if the guidance
            scale is an input, or the pipeline has no guidance.
        shared: inputs without a batch axis.
    """

    conditional: dict[str, Tensor]
    unconditional: dict[str, Tensor] | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)


def _parameters(pipeline: Any) -> Any:
    """Parameters of the pipeline's call by name."""
    return inspect.signature(type(pipeline).__call__).parameters


def encodes_text(pipeline: Any) -> bool:
    """Whether a pipeline takes prompts."""
    return "prompt" in _parameters(pipeline)


def embedded_guidance(pipeline: Any, denoiser_name: str) -> float | None:
    """The call's default of a guidance scale that is an input of the denoiser; None: it is none.

    Args:
        pipeline: diffusers pipeline.
        denoiser_name: component that predicts the noise.
    """
    model_class: Any = denoiser_class(getattr(pipeline, denoiser_name))
    if "guidance" not in inspect.signature(model_class.forward).parameters:
        return None
    default = getattr(_parameters(pipeline).get("guidance_scale"), "default", None)
    return float(default) if isinstance(default, int | float) else None


def takes_negative(pipeline: Any, denoiser_name: str) -> bool:
    """Whether guidance steers a pipeline's images away from a negative prompt.

    Args:
        pipeline: diffusers pipeline.
        denoiser_name: component that predicts the noise.
    """
    given = "negative_prompt" in _parameters(pipeline)
    return given and embedded_guidance(pipeline, denoiser_name) is None


def class_count(pipeline: Any) -> int | None:
    """Number of a pipeline's classes, not counting "no class"; None if it takes no classes."""
    if hasattr(pipeline, "classes"):
        return int(pipeline.classes)
    if "class_labels" not in _parameters(pipeline):
        return None
    config = getattr(getattr(pipeline, "transformer", None), "config", {})
    count = config.get("num_embeds_ada_norm")
    return None if count is None else int(count)


def class_conditions(pipeline: Any, labels: Tensor) -> Conditions:
    """Conditions for images of the classes `labels[B]`.

    Args:
        pipeline: class-conditional diffusers pipeline.
        labels: class labels, LongTensor[B].

    Raises:
        UsageError: a label is not one of the model's classes.
    """
    classes = class_count(pipeline)
    if classes is None:
        raise UsageError(f"{type(pipeline).__name__} takes no classes")
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise UsageError(
            f"class labels must lie in 0 .. {classes - 1}, got "
            f"{int(labels.min())} .. {int(labels.max())}"
        )
    # Among the labels of adaptive norms, the one after the last class means "no class".
    null = pipeline.config.null_class if hasattr(pipeline, "classes") else classes
    unconditional = None if null is None else {"class_labels": torch.full_like(labels, null)}
    return Conditions({"class_labels": labels}, unconditional)


def check_unlabelled(pipeline: Any, config: Any) -> None:
    """Raise unless a `UNet2DModel` works without a class.

    Args:
        pipeline: diffusers pipeline that passes no class.
        config: configuration of the pipeline's UNet.

    Raises:
        UsageError: the UNet takes a class.
    """
    for name in ("num_class_embeds", "class_embed_type"):
        if getattr(config, name, None) is not None:
            raise UsageError(
                f"the UNet2DModel has {name}={getattr(config, name)!r}, but "
                f"{type(pipeline).__name__} passes no class; put a UNet with num_class_embeds into "
                "a DDPMPipeline"
            )


class CalibrationPrompts:
    """Encodes calibration prompts on demand and caches the encodings.

    A run uses few of the prompts. Prompts are encoded in fixed groups, so an encoding does not depend,
    even in its last bits, on the prompts encoded before.
    """

    def __init__(self) -> None:
        self._groups: dict[int, Encoded] = {}

    def clear(self) -> None:
        """Drop all encodings."""
        self._groups.clear()

    def draw(
        self,
        texts: Sequence[str],
        encode: Callable[[list[str]], Encoded],
        count: int,
        generator: torch.Generator,
        family: Family,
    ) -> Conditions:
        """Conditions of `count` prompts, drawn with replacement.

        Args:
            texts: all calibration prompts.
            encode: function that encodes a group of prompts.
            count: number of images.
            generator: random generator of the choice.
            family: calling convention of the denoiser.
        """
        chosen = torch.randint(len(texts), (count,), generator=generator)
        rows = [self._encoding(texts, encode, index) for index in chosen.tolist()]
        first = rows[0][0]
        unconditional = first.unconditional and {
            name: value.expand(count, *value.shape[1:])
            for name, value in first.unconditional.items()
        }
        conditional = {
            name: torch.stack([encoded.conditional[name][place] for encoded, place in rows])
            for name in first.conditional
        }
        return Conditions(conditional, unconditional, first.shared, family)

    def _encoding(
        self, texts: Sequence[str], encode: Callable[[list[str]], Encoded], index: int
    ) -> tuple[Encoded, int]:
        """The encoded group that contains prompt `index`, and the prompt's position in the group."""
        group, place = divmod(index, _PROMPT_GROUP)
        if group not in self._groups:
            first = group * _PROMPT_GROUP
            self._groups[group] = encode(list(texts[first : first + _PROMPT_GROUP]))
        return self._groups[group], place
