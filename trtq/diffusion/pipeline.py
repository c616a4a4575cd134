"""A loaded diffusers pipeline: its denoiser, sizes, conditions and noise schedule."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trtq.checkpoint.components import AUTOENCODERS, denoiser_class
from trtq.diffusion.closed_form import recording_reason
from trtq.diffusion.encode import (
    CalibrationPrompts,
    Encoded,
    check_unlabelled,
    class_conditions,
    class_count,
    embedded_guidance,
    encodes_text,
)
from trtq.diffusion.families import Family, family_named
from trtq.diffusion.own_call import OwnCall
from trtq.diffusion.prompts import PromptSet, load_prompts
from trtq.diffusion.rehearsal import Rehearsal
from trtq.diffusion.sampling import Conditions
from trtq.diffusion.schedule import NoiseSchedule
from trtq.diffusion.scheduler_rules import check_known
from trtq.diffusion.sizes import ModelSizes, cell_pixels, coarsest_cell, trained_size
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
        own_call: the pipeline's own call, without denoising.
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
        self.own_call = OwnCall(pipeline, denoiser_name)
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
        return denoiser_class(self.denoiser).__name__

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
        return hasattr(self.pipeline, "_pack_latents")

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one denoiser input: (C, H, W), or (S, C) if latents are a sequence."""
        height, width = self.latent_size
        config: Any = self.denoiser.config
        channels = int(config.in_channels)
        if self.packed:
            return (height // 2) * (width // 2), channels
        return channels, height, width

    @property
    def guidance(self) -> float:
        """Recommended classifier-free guidance scale; 1 disables it."""
        if self.prompts is None or self.embedded_guidance is not None:
            return 1.0
        return self.prompts.guidance

    @property
    def embedded_guidance(self) -> float | None:
        """Guidance scale that the denoiser takes as an input; None if it takes no such input."""
        return embedded_guidance(self.pipeline, self.denoiser_name)

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
            negative: negative prompt of all images; None: see `trtq.diffusion.own_call.OwnCall.encode`.

        Raises:
            UsageError: the pipeline takes no negative prompt.
            ArtefactError: the pipeline cannot be called.
        """
        return self.own_call.encode(prompts, self.image_size, negative)

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
            UsageError: the number of steps is out of range, or the scheduler or pipeline is not known in
                closed form.
            ArtefactError: the pipeline cannot be called.
        """
        check_known(self.scheduler, flow=self.own_call.wants_flow)
        call = self.rehearsal(steps)
        schedule = NoiseSchedule.of_stepped(call.scheduler, call.timestep_scale)
        self.check_steps(steps)
        return schedule

    def rehearsal(self, steps: int) -> Rehearsal:
        """The pipeline's own call in `steps` denoising steps, without denoising.

        Raises:
            UsageError, ArtefactError: see `schedule`; any scheduler is allowed.
        """
        reason = self.recording_reason
        if reason is not None:
            raise UsageError(
                f"{type(self.pipeline).__name__} is not known in closed form: {reason}; use it through "
                "its own call"
            )
        return self.own_call.scheduled(steps, self.image_size)

    @property
    def recording_reason(self) -> str | None:
        """The reason why the pipeline's call has to be recorded; see `recording_reason`."""
        parts = [self.denoiser, *(getattr(self.pipeline, name, None) for name in AUTOENCODERS)]
        # Parts that are not of diffusers may lack settings.
        settings = [getattr(part, "config", None) for part in parts]
        config, *others = [each if isinstance(each, Mapping) else {} for each in settings]
        autoencoder = next(filter(None, others), {})
        return recording_reason(type(self.pipeline), self.model_class, config, autoencoder)

    def check_steps(self, steps: int) -> None:
        """Raise unless the pipeline can generate images in `steps` steps; any scheduler is allowed.

        Raises:
            UsageError, ArtefactError: see `schedule`, or the scheduler fails.
        """
        self.rehearsal(steps)
        self.own_call.check(steps, self.image_size)

    def draw_conditions(self, count: int, generator: torch.Generator) -> Conditions:
        """Conditions of `count` images: shuffled classes in equal numbers, prompts, or none.

        Raises:
            UsageError: the pipeline is of an unsupported class.
        """
        if self.classes is not None:
            labels = torch.arange(count) % self.classes
            return self.conditions(labels[torch.randperm(count, generator=generator)])
        if self.prompts is None:
            check_unlabelled(self.pipeline, self.denoiser.config)
            if further := self.own_call.first(self.image_size).inputs:
                raise UsageError(
                    f"{type(self.pipeline).__name__} passes {', '.join(further)} to its denoiser, which "
                    "trtq cannot vary; use it through its own call"
                )
            return Conditions({}, family=self.family)
        return self._calibration_prompts.draw(
            self.prompts.calibration, self.encode, count, generator, self.family
        )

    def conditions(self, labels: Tensor) -> Conditions:
        """Conditions of images of the classes `labels[B]`.

        Raises:
            UsageError: a label is not one of the model's classes.
        """
        return replace(class_conditions(self.pipeline, labels), family=self.family)
