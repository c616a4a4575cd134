"""Which pipelines of diffusers are known in closed form follows from their calls and components."""

import inspect
import re

import diffusers
import pytest
import torch

from tests.families.pipelines import PIPELINES, build
from trtq.diffusion.closed_form import recording_reason
from trtq.diffusion.families import FAMILIES
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.scheduler_rules import KNOWN_SCHEDULERS
from trtq.runs.given_calls import knows_pipeline

KNOWN = {
    "AltDiffusionPipeline",
    "DDIMPipeline",
    "DDPMPipeline",
    "DiTPipeline",
    "FluxPipeline",
    "LDMPipeline",
    "LDMTextToImagePipeline",
    "PNDMPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionModelEditingPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
}


def parts_of(cls):
    """Class names of denoiser and scheduler in the annotations of a pipeline's constructor."""
    parameters = inspect.signature(cls.__init__).parameters
    texts = [
        str(getattr(parameters.get(part), "annotation", ""))
        for part in ("unet", "transformer", "scheduler")
    ]
    named = re.findall(r"\w+", " ".join(texts))
    scheduler = next((name for name in reversed(named) if name.endswith("Scheduler")), "")
    return next((name for name in named if name in FAMILIES), ""), scheduler


def pipelines():
    for name in sorted(dir(diffusers)):
        cls = getattr(diffusers, name, None) if name.endswith("Pipeline") else None
        if isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline):
            yield cls


@pytest.mark.filterwarnings("ignore")
def test_the_pipelines_that_are_known_turn_noise_into_images_of_prompts_and_classes():
    known = set()
    for cls in pipelines():
        model_class, scheduler = parts_of(cls)
        of_samplers = scheduler != "" and scheduler not in KNOWN_SCHEDULERS
        # What the model says, e.g. an autoencoder of colours and depth, adds to it.
        channels = {"out_channels": 6 if "LDM3D" in cls.__name__ else 3}
        if recording_reason(cls, model_class, {}, channels) is None and not of_samplers:
            known.add(cls.__name__)
    assert known == KNOWN


@pytest.mark.parametrize("name", PIPELINES)
def test_a_known_pipeline_is_known_as_an_object_and_as_a_folder(name, tmp_path):
    pipeline = build(name)
    pipeline.save_pretrained(tmp_path)
    assert knows_pipeline(pipeline)
    assert knows_pipeline(tmp_path)


def test_a_call_of_the_users_own_is_recorded():
    class Changed(diffusers.DDPMPipeline):
        @torch.no_grad()
        def __call__(self, batch_size=1, generator=None, num_inference_steps=2):
            return super().__call__(batch_size, generator, num_inference_steps)

    plain = diffusers.DDPMPipeline(build("ldm_vq").unet, diffusers.DDPMScheduler())
    assert knows_pipeline(plain)
    assert not knows_pipeline(Changed(plain.unet, plain.scheduler))


def test_a_rehearsal_changes_neither_the_pipeline_nor_the_random_numbers():
    loaded = open_pipeline(build("sd_3"))
    pipeline, before = loaded.pipeline, dict(vars(loaded.pipeline))
    timesteps, state = pipeline.scheduler.timesteps.clone(), torch.get_rng_state()
    loaded.schedule(3)
    loaded.encode(["a", "a red circle"])
    assert vars(pipeline) == before
    assert torch.equal(pipeline.scheduler.timesteps, timesteps)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["sd_1", "sd_3", "flux"])
def test_the_denoiser_may_lie_on_another_device_than_everything_else(name):
    """The meta device stands for a GPU."""
    loaded, moved = (open_pipeline(build(name)) for _ in range(2))
    moved.denoiser.to("meta")
    assert torch.equal(moved.schedule(3).timesteps, loaded.schedule(3).timesteps)
    expected, encoded = (source.encode(["a red circle", "a"]) for source in (loaded, moved))
    assert list(encoded.conditional) == list(expected.conditional)
    for key, value in expected.conditional.items():
        assert torch.equal(encoded.conditional[key], value)
