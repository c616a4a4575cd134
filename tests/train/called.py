"""Quantised denoisers of tiny pipelines, ready to be fine-tuned inside the pipeline's call."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.families.pipelines import t5
from trtq.calib.recipe import load_recipe
from trtq.calls.user_call import run_call
from trtq.progress import silent
from trtq.runs.plan_calls import plan_calls
from trtq.runs.quantize_calls import calibrate, converted
from trtq.train.called import CalledTrajectories
from trtq.train.distill import Rates
from trtq.train.efficientdm import EfficientDM
from trtq.train.loop import fit

FLUX = {"prompt": "a red circle", "height": 16, "width": 16, "max_sequence_length": 8}
TWO_CALLS = FLUX | {"negative_prompt": "a", "true_cfg_scale": 3.0}
WAN = {
    "prompt": "a red circle",
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "guidance_scale": 3.0,
    "max_sequence_length": 8,
}


def wan():
    """A video pipeline with two denoisers, one for the first steps and one for the others."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    def transformer():
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=16,
        )

    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer, encoder = t5()
        pipeline = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=encoder,
            vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            transformer=transformer(),
            transformer_2=transformer(),
            boundary_ratio=0.875,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noisy():
    """A pipeline without an argument `generator`, whose every step draws global random numbers."""
    from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel

    class Noisy(DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        def __call__(self, num_inference_steps=3):
            self.scheduler.set_timesteps(num_inference_steps)
            x = torch.randn(1, 1, 8, 8)
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
            return x

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
            attention_head_dim=4,
        ).eval()
    return Noisy(unet, DDPMScheduler())


@dataclass
class Tuned:
    """A planned and converted pipeline; `pipeline` is the float one, which stays as it is."""

    pipeline: Any
    plan: Any
    parts: Any
    models: Any

    def trajectories(self, name, **options):
        (part,) = [part for part in self.parts if part.name == name]
        settings = {
            "calls": self.plan.calls,
            "numbers": self.plan.numbers,
            "length": len(part.calls.timesteps),
        }
        return CalledTrajectories(
            self.plan.source.pipeline,
            {other.name: other.module for other in self.parts},
            name,
            part.calls.argument,
            **settings | options,
        )

    def float_calls(self, name, planned):
        """Arguments and results of a denoiser while the float pipeline is called alone."""
        seen = []

        def keep(module, args, kwargs, output):
            seen.append((args, kwargs, output))

        handle = getattr(self.pipeline, name).register_forward_hook(keep, with_kwargs=True)
        run_call(self.pipeline, planned.call, planned.seed, *planned.purpose)
        handle.remove()
        return seen


def tuned(pipeline, *calls, **recipe):
    """Plan, calibrate and convert a pipeline in three steps."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            # diffusers loads models in this mode; without it, encoders have dropout.
            component.eval()
    options = {"steps": 3, "calibration": {"images": 3, "samples_per_step": 64}}
    training = {"batch": 1, "iterations": 4, "rank": 2}
    chosen = load_recipe(None, {"method": "efficientdm", **options, "training": training, **recipe})
    plan = plan_calls(pipeline, chosen, calls)
    parts, tables = calibrate(plan, silent)
    models = {part.name: converted(plan, part, tables[part.name]) for part in parts}
    return Tuned(pipeline, plan, parts, models)


def learn(model, points, iterations, accumulate=1):
    """Train a model's adapters at points."""
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    fit(
        model,
        EfficientDM(model, points, Rates(lora=0.3, weight_scale=1e-6, activation=1e-4)),
        iterations=iterations,
        accumulate=accumulate,
        weight_decay=0.0,
        accelerator=accelerator,
        checkpoints=None,
        checkpoint_every=100,
        fingerprint="",
    )


__all__ = ["FLUX", "TWO_CALLS", "WAN", "Tuned", "learn", "noisy", "tuned", "wan"]
