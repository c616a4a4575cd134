"""Conditions of calibration images: prompts encoded on demand, classes, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from trtq.diffusion.encode import Encoded, encode_prompts
from trtq.diffusion.families import Family
from trtq.diffusion.sampling import Conditions
from trtq.errors import UsageError

__all__ = ["UNLABELLED_PIPELINES", "CalibrationPrompts", "check_unlabelled", "encode_in_batches"]

UNLABELLED_PIPELINES = ("DDIMPipeline", "DDPMPipeline")
"""diffusers' pipelines that consist of a `UNet2DModel` and a scheduler and pass no class."""
_ENCODE_BATCH = 64
_PROMPT_GROUP = 4


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
                f"a {' or '.join(UNLABELLED_PIPELINES)}"
            )


def encode_in_batches(
    pipeline: Any, prompts: list[str], latent: tuple[int, int], negative: str | None
) -> Encoded:
    """Encode any number of prompts in batches; see `encode_prompts`.

    Args:
        pipeline: diffusers pipeline.
        prompts: P prompts, at least one.
        latent: height and width of the latents, in cells.
        negative: negative prompt of all images, or None.

    Returns:
        The encodings of all prompts, tensors on the CPU.
    """
    parts = [
        encode_prompts(pipeline, prompts[first : first + _ENCODE_BATCH], latent, negative)
        for first in range(0, len(prompts), _ENCODE_BATCH)
    ]
    joined = {
        name: torch.cat([part.conditional[name] for part in parts]) for name in parts[0].conditional
    }
    return Encoded(joined, parts[0].unconditional, parts[0].shared)


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
