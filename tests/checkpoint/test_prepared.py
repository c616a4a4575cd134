"""Prepared pipeline objects give the results of plain ones or are refused, and never change."""

import copy
import types

import pytest
import torch
from torch import nn

from tests.families.pipelines import PIPELINES, build, conditional_unet, diffusion, stable_diffusion
from trtq.diffusion.loading import open_pipeline
from trtq.errors import NonFiniteError, QuantizationError, TrtqError, UsageError
from trtq.pipelines.draw import conditioning_for, draw
from trtq.pipelines.open import open_any
from trtq.runs.quantize import quantize
from trtq.snr import snr_db

RECIPE = {
    "method": "minmax",
    "bits": "w8a8",
    "steps": 2,
    "calibration": {"images": 2, "samples_per_step": 64},
}


def models(pipeline):
    return {n: p for n, p in pipeline.components.items() if isinstance(p, nn.Module)}


def drawn(pipeline):
    loaded = open_pipeline(pipeline)
    return draw(loaded, conditioning_for(loaded, 1), steps=2, seed=0, guidance=1.0)


@pytest.fixture(scope="module")
def expected():
    return drawn(build("sd_1"))


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    quantize(build("sd_1"), RECIPE, out)
    return out


def state_of(pipeline):
    """The complete state of a pipeline's models: weights, modes, processors, hooks, patches."""
    state = {"class": type(pipeline), "attributes": sorted(vars(pipeline))}
    for name, model in models(pipeline).items():
        state[name] = id(model)
        for path, module in model.named_modules():
            key = f"{name}.{path}"
            state[key] = (
                type(module),
                module.training,
                id(getattr(module, "processor", None)),
                list(module._forward_hooks),
                list(module._forward_pre_hooks),
                sorted(vars(module)),
                getattr(module, "gradient_checkpointing", None),
            )
        for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
            state[f"{name}:{path}"] = (
                id(tensor),
                tensor.dtype,
                tensor.device,
                tensor.requires_grad,
                tensor.stride(),
                tensor._version,
            )
    return state


def add_hook(pipeline):
    pipeline.unet.mid_block.register_forward_hook(lambda *_: None)


def compile_block(pipeline):
    pipeline.unet.mid_block = torch.compile(pipeline.unet.mid_block, backend="eager")


def compile_unet(pipeline):
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")


def offload(pipeline):
    from accelerate.hooks import CpuOffload, add_hook_to_module

    for model in models(pipeline).values():
        add_hook_to_module(model, CpuOffload(execution_device="cpu"))


def layerwise(pipeline):
    pipeline.unet.enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=torch.float32
    )


def group_offload(pipeline):
    pipeline.unet.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )


def mixed(pipeline):
    pipeline.unet.to(torch.bfloat16)
    pipeline.unet.conv_in.float()
    pipeline.unet.time_embedding.half()
    pipeline.vae.half()
    pipeline.text_encoder.double()


def sliced(pipeline):
    pipeline.enable_attention_slicing(1)
    pipeline.vae.enable_slicing()
    pipeline.vae.enable_tiling()


def training(pipeline):
    for model in models(pipeline).values():
        model.train()
    pipeline.unet.enable_gradient_checkpointing()


def other_processors(pipeline):
    from diffusers.models.attention_processor import AttnProcessor

    pipeline.unet.set_attn_processor(AttnProcessor())


def frozen(pipeline):
    for model in models(pipeline).values():
        model.requires_grad_(False)


def parallel(pipeline):
    pipeline.unet = nn.DataParallel(pipeline.unet)


def fp16_deepcopy(pipeline):
    for name, model in models(pipeline).items():
        setattr(pipeline, name, copy.deepcopy(model).half())


PREPARED = {
    "half": lambda p: p.to(dtype=torch.float16),
    "bfloat16": lambda p: p.to(dtype=torch.bfloat16),
    "float64": lambda p: p.to(dtype=torch.float64),
    "mixed": mixed,
    "channels last": lambda p: [
        m.to(memory_format=torch.channels_last) for m in models(p).values()
    ],
    "training": training,
    "sliced": sliced,
    "compiled": compile_unet,
    "compiled block": compile_block,
    "compiled in place": lambda p: p.unet.compile(backend="eager"),
    "fused projections": lambda p: p.fuse_qkv_projections(),
    "offloaded": offload,
    "group offload": group_offload,
    "layerwise casting": layerwise,
    "processors": other_processors,
    "hook": add_hook,
    "frozen": frozen,
    "data parallel": parallel,
    "deep copy": fp16_deepcopy,
    "reset": lambda p: p.unet.set_default_attn_processor(),
}


@pytest.mark.parametrize("prepare", PREPARED.values(), ids=PREPARED)
def test_a_prepared_pipeline_gives_the_results_of_a_plain_one_and_is_not_changed(prepare, expected):
    pipeline = build("sd_1")
    prepare(pipeline)
    before = state_of(pipeline)
    assert snr_db(expected, drawn(pipeline)) >= 40
    assert state_of(pipeline) == before


@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param("half", marks=pytest.mark.slow),
        "training",
        "fused projections",
        "compiled",
    ],
)
def test_a_run_of_a_prepared_pipeline_gives_the_same_images(prepare, plain_run, tmp_path):
    pipeline = build("sd_1")
    PREPARED[prepare](pipeline)
    before = state_of(pipeline)
    quantize(pipeline, RECIPE, tmp_path / "run")
    assert state_of(pipeline) == before
    if prepare == "half":  # Compare with the same rounded weights in single precision.
        rounded = build("sd_1").to(dtype=torch.float16).to(dtype=torch.float32)
        quantize(rounded, RECIPE, tmp_path / "plain")
        plain_run = tmp_path / "plain"
    images = []
    for folder in (plain_run, tmp_path / "run"):
        loaded = open_any(folder)
        images.append(draw(loaded, conditioning_for(loaded, 1), steps=2, seed=0, guidance=1.0))
    assert snr_db(*images) >= 40


@pytest.mark.parametrize("name", PIPELINES)
def test_a_half_precision_pipeline_of_each_family_is_converted_to_float(name):
    pipeline = build(name)
    denoiser = open_pipeline(build(name)).denoiser
    pipeline.to(dtype=torch.float16)
    loaded = open_pipeline(pipeline)
    for key, tensor in loaded.denoiser.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, denoiser.state_dict()[key], rtol=1e-3, atol=1e-6)
    assert type(loaded.pipeline) is type(pipeline)
    assert not loaded.denoiser.training


def adapter(pipeline):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline.unet.add_adapter(config, "style")


def wrapped_by_peft(pipeline):
    from peft import LoraConfig, get_peft_model

    pipeline.unet = get_peft_model(pipeline.unet, LoraConfig(r=2, target_modules=["to_q"]))


def own_processor(pipeline):
    class Mine:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    pipeline.unet.set_attn_processor(Mine())


def replaced_layer(pipeline):
    class MyLinear(nn.Linear):
        pass

    block = pipeline.unet.time_embedding
    block.linear_1 = MyLinear(block.linear_1.in_features, block.linear_1.out_features)


def circular(pipeline):
    pipeline.vae.decoder.conv_in.padding_mode = "circular"


def patched_forward(pipeline):
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda *a, **k: forward(*a, **k)


def patched_decode(pipeline):
    pipeline.vae.decode = lambda z, **_: z


def safety_function(pipeline):
    pipeline.safety_checker = lambda images, **_: (images, [False])


def patched_call(pipeline):
    pipeline.encode_prompt = types.MethodType(lambda *_, **__: None, pipeline)


def on_meta(pipeline):
    pipeline.unet.to("meta")


def sequential(pipeline):
    from accelerate import cpu_offload

    cpu_offload(pipeline.unet, torch.device("cpu"), offload_buffers=True)


def integers(pipeline):
    weight = pipeline.unet.conv_in.weight
    pipeline.unet.conv_in.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)


def not_a_number(pipeline):
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight[0, 0] = float("nan")


def flagged(pipeline):
    pipeline.unet.register_to_config(quantization_config={"quant_method": "bitsandbytes"})


def fused_then_changed(pipeline):
    pipeline.fuse_qkv_projections()
    with torch.no_grad():
        pipeline.unet.up_blocks[0].attentions[0].transformer_blocks[0].attn1.to_qkv.weight.add_(1)


def shorter(pipeline):
    del pipeline.text_encoder.encoder.layers[-1]


def resized(pipeline):
    pipeline.text_encoder.get_input_embeddings().weight = nn.Parameter(torch.zeros(3, 64))


def weight_norm(pipeline):
    torch.nn.utils.parametrizations.weight_norm(pipeline.unet.conv_in)


def own_scheduler(pipeline):
    from diffusers import DDIMScheduler

    class Mine(DDIMScheduler):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    pipeline.scheduler = Mine.from_config(pipeline.scheduler.config)


def own_vae(pipeline):
    class Mine(nn.Module):
        config = types.SimpleNamespace(scaling_factor=1.0)

    pipeline.vae = Mine()


REFUSED = {
    "adapter": (adapter, UsageError, "fuse_lora"),
    "peft": (wrapped_by_peft, UsageError, "merge_and_unload"),
    "own processor": (own_processor, UsageError, "Mine"),
    "replaced layer": (replaced_layer, UsageError, "MyLinear"),
    "circular": (circular, UsageError, "circular"),
    "patched forward": (patched_forward, UsageError, "forward of 'unet'"),
    "patched decode": (patched_decode, UsageError, "decode of 'vae'"),
    "safety function": (safety_function, UsageError, "set it to None"),
    "patched call": (patched_call, UsageError, "encode_prompt"),
    "meta": (on_meta, QuantizationError, "no weights in memory"),
    "sequential offload": (sequential, QuantizationError, "no weights in memory"),
    "integers": (integers, QuantizationError, "int8"),
    "NaN": (not_a_number, NonFiniteError, "embedding"),
    "quantised": (flagged, UsageError, "bitsandbytes"),
    "FreeU": (lambda p: p.enable_freeu(0.9, 0.2, 1.5, 1.6), UsageError, "disable_freeu"),
    "fused, changed": (fused_then_changed, UsageError, "unfuse_qkv_projections"),
    "shorter": (shorter, UsageError, "text_encoder"),
    "resized": (resized, UsageError, "text_encoder"),
    "weight norm": (weight_norm, UsageError, "unet.conv_in"),
    "own scheduler": (own_scheduler, UsageError, "'scheduler' of the pipeline is a Mine"),
    "own vae": (own_vae, UsageError, "neither by diffusers"),
}


@pytest.mark.parametrize(("prepare", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_changes_that_a_configuration_does_not_record_are_refused(
    prepare, error, message, tmp_path
):
    pipeline = build("sd_1")
    prepare(pipeline)
    before = state_of(pipeline)
    with pytest.raises(error) as caught:
        quantize(pipeline, RECIPE, tmp_path / "run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert state_of(pipeline) == before
    assert not list(tmp_path.iterdir())


def test_a_fused_adapter_is_part_of_the_weights():
    pipeline = build("sd_1")
    adapter(pipeline)
    pipeline.unet.fuse_lora()
    with torch.no_grad():
        merged = pipeline.unet.up_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    denoiser = open_pipeline(pipeline).denoiser
    layer = denoiser.up_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, merged.base_layer.weight)
    plain = build("sd_1").unet.up_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    assert not torch.equal(layer.weight, plain.weight)


def test_a_disabled_or_deleted_adapter_has_no_effect(expected):
    pipeline = build("sd_1")
    adapter(pipeline)
    pipeline.unet.disable_adapters()
    assert snr_db(expected, drawn(pipeline)) >= 200
    pipeline.unet.delete_adapters("style")
    assert snr_db(expected, drawn(pipeline)) >= 200


def test_a_subclass_without_overrides_is_treated_like_its_ancestor(expected):
    from diffusers import StableDiffusionPipeline

    class Mine(StableDiffusionPipeline):
        def helper(self):
            return 1

    class Theirs(StableDiffusionPipeline):
        def encode_prompt(self, *args, **kwargs):
            return None

    parts = build("sd_1").components | {"requires_safety_checker": False}
    assert snr_db(expected, drawn(Mine(**parts))) >= 200
    with pytest.raises(UsageError, match="Theirs, which overrides encode_prompt of StableDiff"):
        open_pipeline(Theirs(**parts))


@pytest.mark.parametrize(
    ("thing", "message"),
    [(None, "NoneType"), ({}, "dict"), ([], "list"), (3, "int"), (nn.Linear(1, 1), "Linear alone")],
    ids=["None", "dict", "list", "int", "model"],
)
def test_an_object_that_is_not_a_pipeline_is_refused(thing, message):
    with pytest.raises(TrtqError, match=message):
        open_pipeline(thing)


def text(**options):
    return stable_diffusion(conditional_unet(64, **options), diffusion())


def super_resolution():
    from diffusers import LDMSuperResolutionPipeline, UNet2DModel

    latent = build("ldm_vq")
    unet = UNet2DModel.from_config(latent.unet.config, in_channels=6)
    return LDMSuperResolutionPipeline(latent.vqvae, unet, diffusion())


def of_class(name, **more):
    import diffusers

    parts = build("sd_1").components
    parts.pop("image_encoder", None)
    return getattr(diffusers, name)(**parts, **more, requires_safety_checker=False)


def ip_adapter():
    pipeline = build("sd_1")
    projection = {"proj.weight": (256, 16), "proj.bias": (256,), "norm.weight": (64,)}
    projection["norm.bias"] = (64,)
    keys = {}
    names = [name for name in pipeline.unet.attn_processors if "attn2" in name]
    for number, name in enumerate(names):
        width = pipeline.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for which in ("k", "v"):
            keys[f"{2 * number + 1}.to_{which}_ip.weight"] = torch.zeros(width, 64)
    weights = {key: torch.zeros(shape) for key, shape in projection.items()}
    pipeline.unet._load_ip_adapter_weights([{"image_proj": weights, "ip_adapter": keys}])
    return pipeline


@pytest.mark.parametrize("saved", [False, True], ids=["object", "folder"])
def test_an_ip_adapter_is_not_dropped_silently(saved, tmp_path):
    pipeline = ip_adapter()
    if saved:
        pipeline.save_pretrained(tmp_path)
    with pytest.raises(TrtqError, match="unload_ip_adapter"):
        open_pipeline(tmp_path if saved else pipeline)


def test_settings_that_were_changed_on_the_object_are_used():
    pipeline = build("sd_1")
    pipeline.unet.register_to_config(sample_size=16)
    assert open_pipeline(pipeline).latent_size == (16, 16)


@pytest.mark.parametrize("size", [0, 10**9, (8, 8, 8), "big"], ids=repr)
def test_an_invalid_size_on_the_object_is_refused(size, tmp_path):
    pipeline = build("sd_1")
    pipeline.unet.register_to_config(sample_size=size)
    with pytest.raises(UsageError, match=r"sample_size .* 1 \.\. 8192"):
        quantize(pipeline, RECIPE, tmp_path / "run")


def test_components_of_different_models_are_refused(tmp_path):
    pipeline = stable_diffusion(conditional_unet(32), diffusion())
    with pytest.raises(QuantizationError, match="components belong to different models"):
        quantize(pipeline, RECIPE, tmp_path / "run")


def test_a_low_bit_pipeline_is_not_quantised_again(digits_run, tmp_path):
    pipeline = open_any(digits_run).pipeline
    assert open_pipeline(pipeline).pipeline is pipeline
    with pytest.raises(UsageError, match="already quantised"):
        quantize(pipeline, RECIPE, tmp_path / "run")


def without(part):
    pipeline = build("sd_1")
    setattr(pipeline, part, None)
    return pipeline


def other_vae():
    from diffusers import AutoencoderKL

    pipeline = build("sd_1")
    config = dict(pipeline.vae.config) | {"latent_channels": 8}
    pipeline.vae = AutoencoderKL.from_config(config)
    return pipeline


NEEDS = {
    "inpainting, 9": (lambda: text(in_channels=9), "a mask"),
    "edit, 8": (lambda: text(in_channels=8), "8 channels"),
    "upscaler, 7": (lambda: text(in_channels=7), "small image"),
    "depth, 5": (lambda: text(in_channels=5), "depth"),
    "super-resolution, 6": (super_resolution, "--input image=FILE"),
    "classes": (lambda: text(num_class_embeds=4), "num_class_embeds"),
    "class embedding": (
        lambda: text(class_embed_type="projection", projection_class_embeddings_input_dim=8),
        "class_embed_type",
    ),
    "timestep classes": (lambda: text(class_embed_type="timestep"), "class_embed_type"),
    "text projection": (
        lambda: text(encoder_hid_dim=16, encoder_hid_dim_type="text_proj"),
        "encoder_hid_dim_type",
    ),
    "image addition": (
        lambda: text(addition_embed_type="text", encoder_hid_dim=None),
        "addition_embed_type",
    ),
    "boxes": (lambda: text(attention_type="gated"), "attention_type"),
    "XL's UNet in SD": (
        lambda: text(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=112,
        ),
        "pooled text",
    ),
    "img2img": (lambda: of_class("StableDiffusionImg2ImgPipeline"), "--input image=FILE"),
    "inpaint": (lambda: of_class("StableDiffusionInpaintPipeline"), "--input mask_image=FILE"),
    "no text encoder": (lambda: without("text_encoder"), "text_encoder"),
    "no tokenizer": (lambda: without("tokenizer"), "tokenizer"),
    "no vae": (lambda: without("vae"), "vae"),
    "no unet": (lambda: without("unet"), "no denoiser"),
    "another vae": (other_vae, "produces 8 channels"),
}


@pytest.mark.parametrize(("make", "message"), NEEDS.values(), ids=NEEDS)
def test_a_denoiser_that_needs_another_input_is_refused_and_the_input_named(
    make, message, tmp_path
):
    with pytest.raises(TrtqError) as caught:
        quantize(make(), RECIPE, tmp_path / "run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
