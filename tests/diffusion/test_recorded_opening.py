"""Pipelines whose own call is recorded open unchanged: any class, any input, same output bit for bit."""

from __future__ import annotations

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.checkpoint.test_prepared import ip_adapter
from tests.families.pipelines import build, conditional_unet, stable_diffusion
from trtq.checkpoint.components import find_denoiser
from trtq.diffusion.class_conditional import ClassConditionalPipeline
from trtq.diffusion.loading import open_pipeline, wrap_pipeline
from trtq.errors import ArtefactError

CONTROL = "controlnet/diffusion_pytorch_model.safetensors"


def with_control():
    parts = {n: c for n, c in build("sd_1").components.items() if n != "image_encoder"}
    torch.manual_seed(0)
    control = diffusers.ControlNetModel.from_unet(
        parts["unet"], conditioning_embedding_out_channels=(4, 8)
    )
    for parameter in control.parameters():
        nn.init.normal_(parameter, std=0.1)
    return diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=control, requires_safety_checker=False
    )


def with_guidance_embedding():
    unet = conditional_unet(64, time_cond_proj_dim=16)
    return stable_diffusion(unet, diffusers.LCMScheduler(steps_offset=1))


def from_image():
    parts = build("sd_1").components
    return diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)


def with_an_image_prompt():
    pipeline = ip_adapter()
    torch.manual_seed(0)
    for name, parameter in pipeline.unet.named_parameters():
        if "_ip." in name or name.startswith("encoder_hid_proj"):
            nn.init.normal_(parameter, std=0.1)
    return pipeline


EMBEDDINGS = [torch.ones(2, 1, 16)]
CASES = {
    "control": (with_control, {"image": torch.ones(1, 3, 16, 16) / 2}),
    "guidance embedding": (with_guidance_embedding, {}),
    "from an image": (from_image, {"image": torch.ones(1, 3, 16, 16) / 2}),
    "image prompt": (with_an_image_prompt, {"ip_adapter_image_embeds": EMBEDDINGS}),
}


def output(pipeline, arguments):
    pipeline.set_progress_bar_config(disable=True)
    size = {} if isinstance(pipeline, diffusers.StableDiffusionImg2ImgPipeline) else {"height": 16}
    size |= {"width": 16} if size else {}
    generator = torch.Generator().manual_seed(0)
    steps = {"num_inference_steps": 4, "output_type": "pt"}
    return pipeline("a", generator=generator, **steps, **size, **arguments).images


@pytest.mark.parametrize(("make", "arguments"), CASES.values(), ids=CASES)
def test_a_recorded_pipeline_gives_the_same_images_from_a_folder_and_as_an_object(
    make, arguments, tmp_path
):
    pipeline = make().to(dtype=torch.float32)
    expected = output(pipeline, arguments)
    pipeline.save_pretrained(tmp_path)
    for model in (tmp_path, pipeline):
        opened = open_pipeline(model, recorded=True).pipeline
        assert type(opened) is type(pipeline)
        assert torch.equal(output(opened, arguments), expected)


class Labelling(diffusers.DDPMPipeline):  # type: ignore[misc]
    """A user's pipeline, which chooses the class by itself."""


@pytest.mark.parametrize("recorded", [False, True])
def test_a_class_conditional_unet_gets_a_pipeline_that_passes_labels(recorded, tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        num_class_embeds=4,
    )
    plain = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match="class_labels should be provided"):
        plain(num_inference_steps=1)
    plain.save_pretrained(tmp_path)
    for model in (tmp_path, plain):
        opened = open_pipeline(model, recorded=recorded).pipeline
        assert isinstance(opened, ClassConditionalPipeline)
        assert len(opened([1, 3], num_inference_steps=1).images) == 2
    users = Labelling(unet, diffusers.DDPMScheduler())
    assert type(wrap_pipeline(users)) is Labelling


@pytest.mark.parametrize("kind", ["missing", "stray", "shape", "nan"])
def test_tensors_of_further_components_are_checked(kind, tmp_path):
    with_control().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / CONTROL)
    name = "conv_in.weight"
    if kind == "missing":
        del tensors[name]
    elif kind == "stray":
        name = "of_another.weight"
        tensors[name] = torch.zeros(2)
    elif kind == "shape":
        tensors[name] = torch.zeros(*tensors[name].shape, 2)
    else:
        tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, tmp_path / CONTROL, metadata={"format": "pt"})
    with pytest.raises(ArtefactError if kind != "nan" else Exception) as caught:
        open_pipeline(tmp_path, recorded=True)
    assert "controlnet" in str(caught.value)
    assert name.split(".")[0] in str(caught.value)


@pytest.mark.parametrize("name", ["decoder", "prior"])
def test_a_denoiser_of_another_name_is_found(name):
    pipeline = type("Some", (), {name: nn.Linear(1, 1)})()
    assert find_denoiser(pipeline) == name


def test_a_loaded_tensor_lies_where_torch_would_place_it(tmp_path):
    """A file places tensors at any address, where kernels may round differently."""
    build("sd_xl").save_pretrained(tmp_path)
    pipeline = open_pipeline(tmp_path).pipeline
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            assert all(parameter.data_ptr() % 64 == 0 for parameter in part.parameters())


FUSED = ("sd_3", "flux")


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("prepare", ["half", "channels last", "compiled", "fused projections"])
def test_a_prepared_transformer_gives_the_weights_of_a_plain_one(name, prepare):
    pipeline, plain = build(name), build(name)
    model = pipeline.transformer
    if prepare == "half":
        model.half()
        plain.transformer.half().float()
    elif prepare == "channels last":
        model.to(memory_format=torch.channels_last)
    elif prepare == "compiled":
        pipeline.transformer = torch.compile(model, backend="eager")
    else:
        model.fuse_qkv_projections()
    state = open_pipeline(pipeline, recorded=True).denoiser.state_dict()
    expected = plain.transformer.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())
    assert all(tensor.is_contiguous() for tensor in state.values())
