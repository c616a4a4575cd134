"""Every kind of pipeline can be served, with the images of the pipeline's own call."""

import numpy as np
import pytest
import torch

from tests.families.pipelines import PIPELINES, build
from tests.serve.test_batcher import Crowd
from trtq.diffusion.loading import open_pipeline
from trtq.engine.torch_gpu import GpuDenoiser
from trtq.errors import UsageError
from trtq.pipelines.draw import Conditioning, draw
from trtq.quant.stand_in import StandIn
from trtq.serve.batcher import Batcher
from trtq.serve.models.base import Sizes
from trtq.serve.models.pipeline import PipelineModel
from trtq.serve.models.torch_free import pixels

STEPS = 3
SEED = 4
SMALLER = ("pixart", "flux")
"""Pipelines tested at a smaller size, because attention over 4,096 or more cells is slow."""


def opened(name):
    """The pipeline in evaluation mode: in training mode labels and texts are dropped at random."""
    pipeline = build(name)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    source = open_pipeline(pipeline)
    if name in SMALLER:
        source = source.sized("16x32")
    return source


def guidance_of(model):
    # In DiT's pipeline class 1000 means "no class", but a small model has fewer classes.
    return 3.0 if model.info.takes_guidance and model.info.kind == "text" else 1.0


def prompt_of(model):
    return {"text": "a red circle", "class": "1", "none": ""}[model.info.kind]


def served(model, count, **wish):
    """Draw the images of one request, uint8[H,W,3] each, in shared denoiser calls."""
    crowd, batcher = Crowd(model), Batcher(model, max_rows=4)
    wish = {"guidance": guidance_of(model), "prompt": prompt_of(model)} | wish
    batcher.put(crowd.items(SEED, STEPS, count=count, **wish))
    samples = crowd.wait(count, seconds=300)
    batcher.close(RuntimeError("closed"))
    return [torch.from_numpy(model.decode(samples[SEED, index])).int() for index in range(count)]


def whole(source, model, count, **wish):
    """Draw the same images with the pipeline's own call."""
    conditioning = Conditioning(
        count,
        classes=torch.tensor([1] * count) if model.info.kind == "class" else None,
        prompts=[prompt_of(model)] * count if model.info.kind == "text" else None,
    )
    guidance = guidance_of(model)
    images = draw(source, conditioning, steps=STEPS, seed=SEED, guidance=guidance, **wish)
    return [torch.from_numpy(pixels(image[None].numpy(), "whole")).int() for image in images]


def furthest(drawn, expected):
    """The maximum difference between two lists of images, in levels of 0 .. 255."""
    return max(int((a - b).abs().max()) for a, b in zip(drawn, expected, strict=True))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_served_pipeline_draws_the_images_of_its_own_call(name):
    source = opened(name)
    model = PipelineModel(source, name, "torch")
    drawn = served(model, 2)
    for image in drawn:
        assert image.shape == (*model.info.image_size, 3)
        assert int(image.max()) - int(image.min()) > 10
    # The pipeline decodes both images at once, which may round a value to the next level.
    assert furthest(drawn, whole(source, model, 2)) <= 1


@pytest.mark.parametrize("name", ["sd_2", "sd_3", "flux"])
def test_a_single_image_with_diffusers_scheduler_is_equal_bit_for_bit(name):
    source = opened(name)
    model = PipelineModel(source, name, "torch")
    assert furthest(served(model, 1), whole(source, model, 1)) == 0


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("sd_xl", {"latents_mean": [3.0, -2.0, 1.0, 5.0], "latents_std": [0.5, 1.5, 2.0, 0.7]}),
        ("sd_3", {"shift_factor": 3.0}),
        ("flux", {"shift_factor": 3.0}),
        ("sd_1", {"latents_mean": [3.0] * 4, "latents_std": [0.5] * 4, "shift_factor": 3.0}),
    ],
)
def test_latents_are_denormalised_exactly_if_the_pipeline_does_it(name, numbers):
    """The numbers are so large that the decoder's group norms do not hide them."""
    source = opened(name)
    plain = served(PipelineModel(source, "plain", "torch"), 1)
    source.pipeline.vae.register_to_config(**numbers)
    model = PipelineModel(source, "normalised", "torch")
    drawn = served(model, 1)
    assert furthest(drawn, whole(source, model, 1)) <= 1
    assert (furthest(drawn, plain) > 10) == (name != "sd_1")


def test_a_pipeline_that_starts_from_other_noise_is_refused():
    source = opened("sd_1")
    draw = source.pipeline.prepare_latents
    source.pipeline.prepare_latents = lambda *given, **named: 2 * draw(*given, **named)
    with pytest.raises(UsageError, match="starts from noise that trtq does not know"):
        PipelineModel(source, "sd", "torch")


def test_flux_has_no_classifier_free_guidance():
    model = PipelineModel(opened("flux"), "flux", "torch")
    assert not model.info.takes_guidance
    assert model.info.guidance == 1.0
    with pytest.raises(UsageError, match="flux takes no guidance; it must be 1"):
        Crowd(model).items(1, guidance=3.0, prompt="a red circle")


def test_a_model_without_prompts_refuses_them():
    model = PipelineModel(open_pipeline(build("ldm_vq")), "ldm", "torch")
    with pytest.raises(UsageError, match="takes no prompt"):
        Crowd(model).items(1, prompt="a cat")


@pytest.mark.parametrize(
    ("name", "size"),
    [("sd_1", (24, 32)), ("sd_xl", (32, 8)), ("sd_3", (24, 32)), ("ldm_kl", (128, 64))],
)
def test_images_of_another_size_equal_those_of_the_pipeline(name, size):
    source = opened(name)
    model = PipelineModel(source, name, "torch")
    assert size in model.info.sizes
    expected = whole(source.sized("{}x{}".format(*size)), model, 1)
    assert furthest(served(model, 1, size=size), expected) <= 1
    # A request of another size does not change the model.
    assert furthest(served(model, 1), whole(source, model, 1)) <= 1


def test_images_of_different_sizes_can_be_in_progress_together():
    model = PipelineModel(opened("sd_xl"), "sd_xl", "torch")
    sizes = [(16, 16), (8, 32), (32, 8), (16, 16)]
    crowd, batcher = Crowd(model), Batcher(model, max_rows=8)
    for seed, size in enumerate(sizes):
        batcher.put(crowd.items(seed, STEPS, 3.0, prompt="a red circle", size=size))
    drawn = crowd.wait(len(sizes))
    batcher.close(RuntimeError("closed"))
    for seed, size in enumerate(sizes):
        crowd, batcher = Crowd(model), Batcher(model, max_rows=8)
        batcher.put(crowd.items(seed, STEPS, 3.0, prompt="a red circle", size=size))
        alone = crowd.wait(1)[seed, 0]
        batcher.close(RuntimeError("closed"))
        assert model.decode(alone).shape == (*size, 3)
        np.testing.assert_allclose(drawn[seed, 0], alone, atol=1e-4)


@pytest.mark.parametrize("name", ["ldm_vq", "dit", "pixart", "flux"])
def test_models_of_one_size_report_no_sizes(name):
    """Positions are part of the graph, or the pipeline takes no size."""
    assert PipelineModel(opened(name), name, "torch").info.sizes is None


def test_a_run_with_kernel_layers_has_one_size_because_each_shape_needs_a_cuda_graph():
    class OnGpu(GpuDenoiser):
        def __init__(self, model):
            StandIn.__init__(self)
            self.model, self.model_class, self.config = model, type(model), model.config

    source = opened("sd_1")
    source.pipeline.unet = OnGpu(source.pipeline.unet)
    assert PipelineModel(source, "sd", "torch").info.sizes is None


def test_sizes_in_torch_range_from_one_cell_to_twice_the_default_size():
    assert PipelineModel(opened("sd_1"), "sd", "torch").info.sizes == Sizes((4, 4), (32, 32), 4)
    source = opened("sd_3")
    source.pipeline.transformer.register_to_config(pos_embed_max_size=7)
    assert PipelineModel(source, "sd_3", "torch").info.sizes == Sizes((4, 4), (28, 28), 4)


@pytest.mark.parametrize("name", ["sd_1", "sd_xl", "sd_3", "pixart"])
def test_images_with_a_negative_prompt_equal_those_of_the_pipeline(name):
    source = opened(name)
    model = PipelineModel(source, name, "torch")
    assert model.info.takes_negative_prompt
    drawn = served(model, 1, negative_prompt="a blue square")
    assert furthest(drawn, whole(source, model, 1, negative_prompt="a blue square")) <= 1
    assert furthest(drawn, served(model, 1)) > 1


@pytest.mark.parametrize("name", ["ldm_vq", "ldm_kl", "dit", "flux"])
def test_models_without_negative_prompts_report_it(name):
    assert not PipelineModel(opened(name), name, "torch").info.takes_negative_prompt
