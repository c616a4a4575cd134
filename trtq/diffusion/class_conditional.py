"""A pipeline for a `UNet2DModel` with class labels, which diffusers does not provide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from trtq.diffusion.encode import class_conditions
from trtq.diffusion.sampling import predict
from trtq.errors import UsageError

__all__ = ["ClassConditionalPipeline"]


class ClassConditionalPipeline(DDIMPipeline):  # type: ignore[misc]
    """Generates images of given classes with any diffusers scheduler.

    Args:
        unet: class-conditional `UNet2DModel`, or an object with the same call signature.
        scheduler: scheduler of diffusers.
        null_class: label that means "no class"; None: the model has none and supports no guidance.
    """

    def __init__(self, unet: Any, scheduler: Any, null_class: int | None = None) -> None:
        # Not DDIMPipeline.__init__, which converts any scheduler to DDIM.
        super(DDIMPipeline, self).__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(null_class=null_class)

    @property
    def classes(self) -> int:
        """Number K of classes, not counting "no class"."""
        embeds = int(self.unet.config.num_class_embeds)
        return embeds if self.config.null_class is None else embeds - 1

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor = 0,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generate one image per label.

        Args:
            class_labels: one label, or B labels, in 0 .. K - 1.
            num_inference_steps: number of denoising steps.
            guidance_scale: classifier-free guidance scale; 1 or less disables it.
            eta: noise added per step, if the scheduler supports it.
            generator: one generator for the batch, or one per image, which makes images independent
                of the batch.
            output_type: `pil`, `np` (float32[B,H,W,C] in [0, 1]) or `pt` (float32[B,C,H,W] in
                [-1, 1], not clipped).
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.

        Raises:
            UsageError: a label, the guidance or the number of generators is invalid.
        """
        labels = torch.as_tensor(class_labels, dtype=torch.long).reshape(-1)
        conditions = class_conditions(self, labels)
        if isinstance(generator, list) and len(generator) != len(labels):
            raise UsageError(
                f"got {len(generator)} generators for {len(labels)} images; give one per image"
            )
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (int(self.unet.config.in_channels), height, width)
        if isinstance(generator, list):
            x = torch.stack([torch.randn(shape, generator=g) for g in generator])
        else:
            x = torch.randn((len(labels), *shape), generator=generator)
        device = self._execution_device
        x, conditions = x.to(device), conditions.to(device)
        # Flow-matching schedulers scale neither the initial noise nor the denoiser's inputs.
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        self.scheduler.set_timesteps(num_inference_steps)
        extra = self.prepare_extra_step_kwargs(generator, eta)
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = x
            if hasattr(self.scheduler, "scale_model_input"):
                scaled = self.scheduler.scale_model_input(x, t)
            epsilon = predict(self.unet, scaled, t, conditions, guidance_scale)
            x = self.scheduler.step(epsilon, t, x, **extra).prev_sample
        if output_type == "pt":
            images: Any = x
        else:
            images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        """The optional arguments that the scheduler's `step` accepts.

        Args:
            generator: random generator, or one per image.
            eta: noise added per step.
        """
        import inspect

        accepted = inspect.signature(self.scheduler.step).parameters
        offered = {"eta": eta, "generator": generator}
        return {name: value for name, value in offered.items() if name in accepted}
