"""A loaded diffusers pipeline: its denoiser, sizes, conditions and noise schedule."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trtq.diffusion.conditioning import CalibrationPrompts, check_unlabelled, encode_in_batches
from trtq.diffusion.encode import (
    EMBEDDED_GUIDANCE,
    Encoded,
    class_conditions,
    class_count,
    encodes_text,
)
from trtq.diffusion.families import Family, family_named
from trtq.diffusion.prompts import PromptSet, load_prompts
from trtq.diffusion.sampling import Conditions
from trtq.diffusion.schedule import NoiseSchedule
from trtq.diffusion.sizes import ModelSizes, cell_pixels, coarsest_cell, trained_size
from trtq.diffusion.stepping import KNOWN_PIPELINES, Stepping, stepping_of
from trtq.diffusion.timesteps import check_steps, set_timesteps
from trtq.errors import UsageError

__all__ = ["LoadedPipeline"]


class LoadedPipeline:
    """A loaded pipeline and its origin.

    Attributes:
        name: name or path of the model as the user specified it.
        folder: folder of the checkpoint or artefact; None: the model is a hub id or a pipeline object.
        pipeline: diffusers pipeline, in float32.
        denoiser_name: `unet` or `transformer`.
        prompts: prompts of a text-to-image model; None: the model takes no text.
    """

    def __init__(
        self,
        name: str,
        folder: Path | None,
        pipeline: Any,
        denoiser_name: str,
        prompts: PromptSet | None = None,
    ) -> None:
        self.name = name
        self.folder = folder
        self.pipeline = pipeline
        self.denoiser_name = denoiser_name
        self.prompts = prompts
        self._size: tuple[int, int] | None = None
        self._calibration_prompts = CalibrationPrompts()
        if prompts is None and encodes_text(pipeline):
            self.prompts = load_prompts(folder)

    @property
    def denoiser(self) -> nn.Module:
        """The component that predicts the noise."""
        module: nn.Module = getattr(self.pipeline, self.denoiser_name)
        return module

    @property
    def model(self) -> Any:
        """The diffusers model: the denoiser itself, or the model inside a quantised denoiser."""
        return getattr(self.denoiser, "denoiser", self.denoiser)

    @property
    def model_class(self) -> str:
        """Class name of the diffusers model, even if an engine replaces it."""
        return str(getattr(self.denoiser, "model_class", type(self.model)).__name__)

    @property
    def family(self) -> Family:
        """Calling convention of the denoiser."""
        return family_named(self.model_class)

    @property
    def classes(self) -> int | None:
        """Number of classes, not counting "no class"; None for a model without classes."""
        return class_count(self.pipeline)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents in cells; of images in pixels if there are no latents."""
        return self._default_size if self._size is None else self._size

    @property
    def resized(self) -> bool:
        """Whether the image size differs from the model's default."""
        return self._size is not None and self._size != self._trained_size

    @property
    def _trained_size(self) -> tuple[int, int] | None:
        return trained_size(self.pipeline, self.denoiser_name, self.name)

    @property
    def _default_size(self) -> tuple[int, int]:
        size = self._trained_size
        if size is None:
            raise UsageError(
                f"{self.name} has no default image size (sample_size is null in "
                f"{self.denoiser_name}/config.json); choose one with --size HEIGHTxWIDTH"
            )
        return size

    def sized(self, size: str) -> LoadedPipeline:
        """The same pipeline at another image size; this object keeps its size.

        Args:
            size: image size `HEIGHTxWIDTH`, in pixels.

        Raises:
            UsageError: `size` cannot be parsed, or the model does not support it.
        """
        other = copy(self)
        other._size = self.latents_of(size)
        other._calibration_prompts = CalibrationPrompts()
        return other

    def latents_of(self, size: str) -> tuple[int, int]:
        """Height and width, in latent cells, of images of `HEIGHTxWIDTH` pixels.

        Raises:
            UsageError: `size` cannot be parsed, or the model does not support it.
        """
        multiple_of = self.cell_pixels * self.coarsest
        sizes = ModelSizes(self.name, self._trained_size, self.cell_pixels, multiple_of)
        return sizes.latents_of(size)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        height, width = self.latent_size
        return height * self.cell_pixels, width * self.cell_pixels

    @property
    def cell_pixels(self) -> int:
        """Pixels along one side of a latent cell; 1 for a model without latents."""
        return cell_pixels(self.pipeline)

    @property
    def coarsest(self) -> int:
        """Number of latent cells along one side of a cell at the denoiser's coarsest level."""
        return 2 if self.packed else coarsest_cell(self.denoiser.config)

    @property
    def packed(self) -> bool:
        """Whether the denoiser takes latents as a sequence of 2 x 2 patches."""
        return self.model_class == "FluxTransformer2DModel"

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one denoiser input: (C, H, W), or (S, C) if latents are a sequence."""
        height, width = self.latent_size
        if self.packed:
            return (height // 2) * (width // 2), self._channels
        return self._channels, height, width

    @property
    def image_tokens(self) -> int | None:
        """Length of a transformer's image sequence; None for a UNet."""
        patch = 2 if self.packed else getattr(self.denoiser.config, "patch_size", None)
        height, width = self.latent_size
        return None if patch is None else (height // patch) * (width // patch)

    @property
    def guidance(self) -> float:
        """Recommended classifier-free guidance scale; 1 disables it."""
        if self.prompts is None or self.embedded_guidance is not None:
            return 1.0
        return self.prompts.guidance

    @property
    def embedded_guidance(self) -> float | None:
        """Guidance scale that the denoiser takes as an input; None if it takes no such input."""
        return EMBEDDED_GUIDANCE if self.packed else None

    @property
    def gives_raw_images(self) -> bool:
        """Whether the pipeline's tensors lie in [-1, 1] instead of the usual [0, 1]."""
        return hasattr(self.pipeline, "classes")

    def forget_prompts(self) -> None:
        """Drop the encodings of prompts, e.g. after a change of the text encoder."""
        self._calibration_prompts.clear()

    def encode(self, prompts: list[str], negative: str | None = None) -> Encoded:
        """Encode prompts as the pipeline does; the tensors are on the CPU.

        Args:
            prompts: at least one prompt.
            negative: negative prompt of all images; None: see `encode_prompts`.

        Raises:
            UsageError: the pipeline is of an unsupported class, or takes no negative prompt.
        """
        return encode_in_batches(self.pipeline, prompts, self.latent_size, negative)

    def timesteps(self, steps: int) -> list[float]:
        """The timesteps of the denoiser calls in `steps` denoising steps, noisiest first."""
        return self.schedule(steps).timesteps.tolist()

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler.

        Raises:
            UsageError: the pipeline has no scheduler of diffusers.
        """
        scheduler = getattr(self.pipeline, "scheduler", None)
        if not hasattr(scheduler, "set_timesteps") or not hasattr(scheduler, "config"):
            raise UsageError(f"{type(self.pipeline).__name__} has no diffusers scheduler")
        return scheduler

    def schedule(self, steps: int) -> NoiseSchedule:
        """Noise levels of the pipeline's scheduler in `steps` denoising steps.

        The timesteps are those that the pipeline passes to its denoiser.

        Raises:
            UsageError: the number of steps is out of range, or the scheduler or pipeline is
                unsupported.
        """
        return NoiseSchedule.of(
            self.scheduler,
            steps,
            tokens=self.image_tokens,
            timestep_scale=self.family.timestep_scale,
            stepping=self._stepping(),
            channels=self._channels,
        )

    def stepped_scheduler(self, steps: int) -> Any:
        """A fresh copy of the scheduler with its timesteps set as the pipeline sets them.

        Raises:
            UsageError: see `schedule`.
        """
        self.check_steps(steps)
        return set_timesteps(self.scheduler, steps, self.image_tokens, self._stepping())

    def check_steps(self, steps: int) -> None:
        """Raise unless the pipeline can generate images in `steps` steps; any scheduler is allowed.

        Raises:
            UsageError: the number of steps is out of range, or the scheduler fails with it.
        """
        check_steps(self.scheduler, steps, self.image_tokens, self._stepping(), self._channels)

    @property
    def _channels(self) -> int:
        """Number of channels of one sample in the scheduler's layout."""
        config: Any = self.denoiser.config
        return int(config.in_channels)

    def _stepping(self) -> Stepping:
        stepping = stepping_of(self.pipeline)
        if stepping is None:
            raise UsageError(
                f"{type(self.pipeline).__name__} is not supported: the timesteps that it passes to "
                f"its denoiser are unknown; supported pipelines: {', '.join(KNOWN_PIPELINES)}"
            )
        return stepping

    def draw_conditions(self, count: int, generator: torch.Generator) -> Conditions:
        """Conditions of `count` images: shuffled classes in equal numbers, prompts, or none.

        Raises:
            UsageError: the pipeline is of an unsupported class.
        """
        if self.classes is not None:
            labels = torch.arange(count) % self.classes
            return self.conditions(labels[torch.randperm(count, generator=generator)])
        if self.prompts is None:
            if self.model_class == "UNet2DModel":
                check_unlabelled(self.pipeline, self.denoiser.config)
                return Conditions({}, family=self.family)
            raise UsageError(
                f"{type(self.pipeline).__name__} with a {self.model_class} is not supported"
            )
        return self._calibration_prompts.draw(
            self.prompts.calibration, self.encode, count, generator, self.family
        )

    def conditions(self, labels: Tensor) -> Conditions:
        """Conditions of images of the classes `labels[B]`.

        Raises:
            UsageError: a label is not one of the model's classes.
        """
        conditions: Conditions = class_conditions(self.pipeline, labels)
        return replace(conditions, family=self.family)
