"""LoRAs in every layout give the same weights as diffusers' own merge.

The oracle is `load_lora_weights` and `fuse_lora` of the same pipeline, with PEFT. If diffusers cannot
load a layout, or silently omits a part of it, a comment in the test explains it, and the oracle is PEFT
or the same update written in a layout that diffusers loads.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tests.families import pipelines
from tests.lora.merged_by_diffusers import (
    assert_same,
    by_diffusers,
    by_trtq,
    changed,
    matrices,
    parts,
    weights,
    write,
)
from trtq.lora.names import Names

RANK = 4
FLUX_WIDTH = 32

pytestmark = [
    # transformers and PEFT emit these warnings while they load adapters.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def sd_xl():
    """A pipeline with the real number of blocks, which kohya's names depend on."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = pipelines.sd_xl()
        pipe.unet = pipelines.conditional_unet(
            2 * pipelines.CLIP_WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=pipelines.CLIP_WIDTH + 48,
            block_out_channels=(8, 16, 16),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 2),
        )
    return pipe


def build(name):
    return sd_xl() if name == "sd_xl" else pipelines.build(name)


def layers(pipe, component, *words):
    """Linear layers and convolutions whose path contains one of `words`, or all without words."""
    return {
        path: module
        for path, module in getattr(pipe, component).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and (not words or any(word in path for word in words))
    }


def pairs(modules, name, down, up, generator, alpha=None, rank=RANK):
    """Create the matrices of each layer, named by `name(path)`."""
    tensors = {}
    for path, module in modules.items():
        key = name(path)
        tensors[key + down], tensors[key + up] = matrices(module, rank, generator)
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def peft_like(modules, prefix, generator, rank=RANK):
    return pairs(
        modules,
        lambda path: f"{prefix}{path}",
        ".lora_A.weight",
        ".lora_B.weight",
        generator,
        rank=rank,
    )


def kohya(modules, prefix, generator, alpha=2.0, name=lambda path: path):
    return pairs(
        modules,
        lambda path: prefix + name(path).replace(".", "_"),
        ".lora_down.weight",
        ".lora_up.weight",
        generator,
        alpha,
    )


def metadata(component, tensors, **settings):
    """Create the metadata that diffusers writes into a file."""
    targets = {key.split(".lora_")[0].removeprefix(f"{component}.") for key in tensors}
    settings = {"r": RANK, "lora_alpha": 16, "target_modules": sorted(targets)} | settings
    text = json.dumps({f"{component}.{key}": value for key, value in settings.items()})
    return {"format": "pt", "lora_adapter_metadata": text}


ATTENTION = ("attn1.to", "attn2.to")
TEXT = ("self_attn", "mlp")


def diffusers_new(pipe, g):
    return peft_like(layers(pipe, "unet", "attn", "ff.", "proj_"), "unet.", g), None


def diffusers_metadata(pipe, g):
    tensors, _ = diffusers_new(pipe, g)
    return tensors, metadata("unet", tensors)


def rank_stabilised(pipe, g):
    tensors, _ = diffusers_new(pipe, g)
    return tensors, metadata("unet", tensors, use_rslora=True)


def patterns(pipe, g):
    ranks = {"attn2.to_k": 2, "ff.net.2": 6}
    tensors = {}
    for path, module in layers(pipe, "unet", *ATTENTION, "ff.net.2").items():
        rank = next((r for end, r in ranks.items() if path.endswith(end)), RANK)
        tensors |= peft_like({path: module}, "unet.", g, rank)
    whole = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"
    alphas = {"to_q": 2.0, whole: 32, r"transformer_blocks\.\d+\.attn2\.to_k": 7}
    return tensors, metadata("unet", tensors, rank_pattern=ranks, alpha_pattern=alphas)


def dora(pipe, g):
    modules = layers(pipe, "unet", *ATTENTION, "proj_in", "conv1")
    tensors = peft_like(modules, "unet.", g)
    for path, module in modules.items():
        norm = module.weight.detach().flatten(1).norm(dim=1) * 1.1
        shaped = norm if isinstance(module, nn.Linear) else norm.reshape(1, -1, 1, 1)
        tensors[f"unet.{path}.lora_magnitude_vector"] = shaped
    return tensors, metadata("unet", tensors, use_dora=True)


def lora_bias(pipe, g):
    modules = layers(pipe, "unet", "ff.net")
    tensors = peft_like(modules, "unet.", g)
    for path, module in modules.items():
        tensors[f"unet.{path}.lora_B.bias"] = torch.randn(len(module.weight), generator=g)
    return tensors, None


def old_processor(pipe, g):
    def name(path):
        return path.replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.")

    def unet(path):
        return f"unet.{name(path).removesuffix('.0')}_lora"

    def text(path):
        for ours, older in (("q_", "to_q"), ("k_", "to_k"), ("v_", "to_v"), ("out_", "to_out")):
            path = path.replace(f"{ours}proj", older)
        return f"text_encoder.text_model.{path}_lora"

    ends = ".down.weight", ".up.weight"
    tensors = pairs(layers(pipe, "unet", *ATTENTION), unet, *ends, g)
    return tensors | pairs(layers(pipe, "text_encoder", "self_attn"), text, *ends, g), None


def old_linear_layer(pipe, g):
    return pairs(
        layers(pipe, "text_encoder", *TEXT),
        lambda path: f"text_encoder.text_model.{path}",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
        g,
    ), None


def old_lora_down(pipe, g):
    return pairs(
        layers(pipe, "unet", *ATTENTION),
        lambda path: f"unet.{path}",
        ".lora.down.weight",
        ".lora.up.weight",
        g,
    ), None


def kohya_sd(pipe, g):
    unet = kohya(layers(pipe, "unet"), "lora_unet_", g)
    text = kohya(layers(pipe, "text_encoder", *TEXT), "lora_te_text_model_", g)
    return unet | text, None


def original_names(unet):
    """Names in Stable Diffusion XL's first release by path in diffusers, listed by hand."""
    parts = {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.resnets.1": "input_blocks.2.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.resnets.0": "input_blocks.4.0",
        "down_blocks.1.attentions.0": "input_blocks.4.1",
        "down_blocks.1.resnets.1": "input_blocks.5.0",
        "down_blocks.1.attentions.1": "input_blocks.5.1",
        "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
        "down_blocks.2.resnets.0": "input_blocks.7.0",
        "down_blocks.2.attentions.0": "input_blocks.7.1",
        "down_blocks.2.resnets.1": "input_blocks.8.0",
        "down_blocks.2.attentions.1": "input_blocks.8.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
    }
    for block in range(3):
        for layer in range(3):
            number = 3 * block + layer
            parts[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{number}.0"
            parts[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
    inside = {
        ".conv1": ".in_layers.2",
        ".time_emb_proj": ".emb_layers.1",
        ".conv2": ".out_layers.3",
        ".conv_shortcut": ".skip_connection",
    }

    def name(path):
        prefix = next(p for p in parts if path == p or path.startswith(f"{p}."))
        rest = path.removeprefix(prefix)
        return parts[prefix] + inside.get(rest, rest)

    return name


def kohya_sd_xl(pipe, g):
    name = original_names(pipe.unet)
    tensors = kohya(layers(pipe, "unet"), "lora_unet_", g, name=name)
    tensors |= kohya(layers(pipe, "text_encoder", *TEXT), "lora_te1_text_model_", g)
    return tensors | kohya(layers(pipe, "text_encoder_2", *TEXT), "lora_te2_", g), None


def kohya_sd_xl_own_names(pipe, g):
    tensors = kohya(layers(pipe, "unet", "attentions"), "lora_unet_", g)
    return tensors | kohya(layers(pipe, "text_encoder_2", *TEXT), "lora_te2_", g), None


def settings_of_two(pipe, g):
    unet = peft_like(layers(pipe, "unet", *ATTENTION), "unet.", g)
    text = peft_like(layers(pipe, "text_encoder", *TEXT), "text_encoder.", g, 2)
    notes = [
        metadata("unet", unet, lora_alpha=3, use_rslora=True),
        metadata("text_encoder", text, r=2, alpha_pattern={"q_proj": 5}),
    ]
    joined = {}
    for note in notes:
        joined |= json.loads(note["lora_adapter_metadata"])
    return unet | text, {"lora_adapter_metadata": json.dumps(joined)}


def flux_metadata(pipe, g):
    tensors = peft_like(layers(pipe, "transformer", "attn"), "transformer.", g)
    return tensors, metadata("transformer", tensors, use_rslora=True)


def flux_new(pipe, g):
    tensors = peft_like(layers(pipe, "transformer"), "transformer.", g)
    text = layers(pipe, "text_encoder", "self_attn")
    return tensors | peft_like(text, "text_encoder.text_model.", g), None


def flux_original(ends, prefix, g, alpha, *, single=False, rank=RANK):
    """Create layers of Flux with first-release names; `linear1` only if `single` is set."""
    d = FLUX_WIDTH
    shapes = {
        "single_blocks.0.linear2": (d, 5 * d),
        "single_blocks.0.modulation.lin": (3 * d, d),
    }
    for stream in ("img", "txt"):
        shapes |= {
            f"double_blocks.0.{stream}_attn.qkv": (3 * d, d),
            f"double_blocks.0.{stream}_attn.proj": (d, d),
            f"double_blocks.0.{stream}_mlp.0": (4 * d, d),
            f"double_blocks.0.{stream}_mlp.2": (d, 4 * d),
            f"double_blocks.0.{stream}_mod.lin": (6 * d, d),
        }
    if single:
        shapes["single_blocks.0.linear1"] = (7 * d, d)
    tensors = {}
    for name, (outputs, inputs) in shapes.items():
        key = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        tensors[key + ends[0]] = torch.randn((rank, inputs), generator=g) * 0.1
        tensors[key + ends[1]] = torch.randn((outputs, rank), generator=g) * 0.1
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


KOHYA_ENDS = ".lora_down.weight", ".lora_up.weight"
PEFT_ENDS = ".lora_A.weight", ".lora_B.weight"


def kohya_flux(pipe, g):
    text = kohya(layers(pipe, "text_encoder", *TEXT), "lora_te1_text_model_", g)
    return flux_original(KOHYA_ENDS, "lora_unet_", g, 2.0) | text, None


def kohya_flux_sparse(pipe, g):
    """Create a file in which q, k and v have a third of the rank each, as some trainers do."""
    tensors = flux_original(KOHYA_ENDS, "lora_unet_", g, 2.0, rank=6)
    mask = torch.block_diag(*(torch.ones(FLUX_WIDTH, 2) for _ in range(3)))
    for stream in ("img", "txt"):
        tensors[f"lora_unet_double_blocks_0_{stream}_attn_qkv.lora_up.weight"] *= mask
    return tensors, None


def comfy_flux(pipe, g):
    return flux_original(KOHYA_ENDS, "diffusion_model.", g, 2.0), None


def xlabs_flux(pipe, g):
    d, tensors = FLUX_WIDTH, {}
    shapes = {
        f"double_blocks.0.processor.{kind}_lora{i}": (rows, d)
        for i in (1, 2)
        for kind, rows in (("qkv", 3 * d), ("proj", d))
    } | {
        "single_blocks.0.processor.qkv_lora": (3 * d, d),
        "single_blocks.0.processor.proj_lora": (d, 5 * d),
    }
    for key, (outputs, inputs) in shapes.items():
        tensors[f"{key}.down.weight"] = torch.randn((RANK, inputs), generator=g) * 0.1
        tensors[f"{key}.up.weight"] = torch.randn((outputs, RANK), generator=g) * 0.1
    return tensors, None


def kohya_flux_own_names(pipe, g):
    return kohya(layers(pipe, "transformer", "attn"), "lora_transformer_", g), None


def sd_3_new(pipe, g):
    tensors = peft_like(layers(pipe, "transformer", "attn"), "transformer.", g)
    for name in ("text_encoder", "text_encoder_2"):
        tensors |= peft_like(layers(pipe, name, "self_attn"), f"{name}.", g)
    return tensors, None


LAYOUTS = {
    "diffusers": ("sd_1", diffusers_new),
    "diffusers-linear-projections": ("sd_2", diffusers_new),
    "diffusers-metadata": ("sd_1", diffusers_metadata),
    "diffusers-metadata-of-two-models": ("sd_1", settings_of_two),
    "diffusers-metadata-flux": ("flux", flux_metadata),
    "rslora": ("sd_1", rank_stabilised),
    "patterns": ("sd_1", patterns),
    "dora": ("sd_1", dora),
    "lora-bias": ("sd_1", lora_bias),
    "diffusers-old-processor": ("sd_1", old_processor),
    "diffusers-old-lora-linear-layer": ("sd_1", old_linear_layer),
    "diffusers-old-lora-down": ("sd_1", old_lora_down),
    "kohya-sd-with-convolutions": ("sd_1", kohya_sd),
    "kohya-sdxl-original-names": ("sd_xl", kohya_sd_xl),
    "kohya-sdxl-diffusers-names": ("sd_xl", kohya_sd_xl_own_names),
    "diffusers-flux": ("flux", flux_new),
    "kohya-flux": ("flux", kohya_flux),
    "kohya-flux-sparse": ("flux", kohya_flux_sparse),
    "kohya-flux-diffusers-names": ("flux", kohya_flux_own_names),
    "comfyui-flux": ("flux", comfy_flux),
    "xlabs-flux": ("flux", xlabs_flux),
    "diffusers-sd3": ("sd_3", sd_3_new),
}


def file_of(folder, made):
    """Write the tensors and metadata of a layout to a file."""
    tensors, note = made
    return write(folder, tensors, metadata=note)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_the_weights_of_diffusers(name, tmp_path, generator):
    model, layout = LAYOUTS[name]
    pipe = build(model)
    before = weights(pipe)
    path = file_of(tmp_path, layout(pipe, generator))
    expected = by_diffusers(build(model), [(path, 0.7)])
    assert_same(before, expected, by_trtq(pipe, [(path, 0.7)]))


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64],
    ids=str,
)
def test_files_of_any_float_type_are_merged_in_float32(dtype, tmp_path, generator):
    pipe = build("sd_1")
    before = weights(pipe)
    tensors, note = diffusers_metadata(pipe, generator)
    path = write(tmp_path, {k: v.to(dtype) for k, v in tensors.items()}, metadata=note)
    expected = by_diffusers(build("sd_1"), [(path, 1.0)])
    assert_same(before, expected, by_trtq(pipe, [(path, 1.0)]))


@pytest.mark.parametrize("scales", [(0.5, -0.25, 2.0), (1.0, 0.0, 0.3)], ids=str)
def test_several_loras_with_different_scales_are_merged(scales, tmp_path, generator):
    pipe = build("sd_1")
    before = weights(pipe)
    makers = (kohya_sd, diffusers_metadata, dora)
    loras = [
        (file_of(tmp_path / str(i), make(pipe, generator)), scale)
        for i, (make, scale) in enumerate(zip(makers, scales, strict=True))
    ]
    expected = by_diffusers(build("sd_1"), loras)
    assert_same(before, expected, by_trtq(pipe, loras))


def peft_folder(pipe, folder, generator, **settings):
    """Write a folder like `PeftModel.save_pretrained`."""
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": ["to_q", "to_k"],
        "bias": "none",
    } | settings
    tensors = {}
    for path, module in layers(pipe, "unet", *config["target_modules"]).items():
        ranks = config.get("rank_pattern", {})
        rank = next((r for end, r in ranks.items() if path.endswith(end)), config["r"])
        prefix = "base_model.model."
        tensors |= peft_like({path: module}, prefix, generator, rank)
        if config.get("use_dora"):
            norm = module.weight.detach().flatten(1).norm(dim=1) * 1.1
            tensors[f"{prefix}{path}.lora_magnitude_vector"] = norm
    path = write(folder, tensors, "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("given", ["folder", "file"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"lora_alpha": 3.5},
        {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn2.to_k": 1}},
        {"fan_in_fan_out": True},
        {"use_dora": True},
    ],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_a_folder_of_peft_gives_the_weights_of_peft(settings, given, tmp_path, generator):
    # diffusers does not read adapter_config.json; the oracle is PEFT's own merge.
    from peft import PeftModel

    pipe = build("sd_1")
    before = weights(pipe)
    path = peft_folder(pipe, tmp_path, generator, **settings)
    other = build("sd_1")
    other.unet = PeftModel.from_pretrained(other.unet, str(tmp_path)).merge_and_unload()
    given_path = tmp_path if given == "folder" else path
    assert_same(before, weights(other), by_trtq(pipe, [(given_path, 1.0)]))


def test_a_file_that_a_model_saved_without_a_prefix_is_read(tmp_path, generator):
    # `save_lora_adapter` and `save_attn_procs` name no component; diffusers loads them into the UNet.
    pipe = build("sd_1")
    before = weights(pipe)
    path = write(tmp_path, peft_like(layers(pipe, "unet", *ATTENTION), "", generator))
    other = build("sd_1")
    other.unet.load_lora_adapter(str(tmp_path), weight_name=path.name, prefix=None)
    other.unet.fuse_lora()
    other.unet.unload_lora()
    assert_same(before, weights(other), by_trtq(pipe, [(path, 1.0)]))


def test_each_alpha_of_kohyas_files_is_used(tmp_path, generator):
    # diffusers applies the file's modal alpha to every attention layer; the trainer's formula is
    # alpha / rank of each layer. The oracle is the same update with alpha = rank.
    pipe = build("sd_1")
    before = weights(pipe)
    tensors, plain = {}, {}
    modules = layers(pipe, "unet", *ATTENTION) | layers(pipe, "unet", "conv1")
    for i, (path, module) in enumerate(modules.items()):
        rank, alpha = 1 + i % 3, (0.5, 2.0, -4.0, 0.0)[i % 4]
        down, up = matrices(module, rank, generator)
        key = "lora_unet_" + path.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor([alpha], dtype=torch.float16)
        plain |= {
            f"unet.{path}.lora_A.weight": down,
            f"unet.{path}.lora_B.weight": up * alpha / rank,
        }
    expected = by_diffusers(build("sd_1"), [(write(tmp_path / "plain", plain), 1.0)])
    given = by_trtq(pipe, [(write(tmp_path, tensors), 1.0)])
    assert_same(before, expected, given)


@pytest.mark.parametrize("linear_shape", [(-1,), (-1, 1)], ids=str)
def test_dora_in_kohyas_files_is_merged(linear_shape, tmp_path, generator):
    # diffusers omits `dora_scale` with a warning; the oracle is the same update in diffusers' layout.
    pipe = build("sd_1")
    before = weights(pipe)
    modules = layers(pipe, "unet", *ATTENTION, "conv1")
    tensors, plain = kohya(modules, "lora_unet_", generator, 8.0), {}
    for path, module in modules.items():
        key, norm = (
            "lora_unet_" + path.replace(".", "_"),
            module.weight.detach().flatten(1).norm(dim=1),
        )
        conv = isinstance(module, nn.Conv2d)
        tensors[f"{key}.dora_scale"] = norm.reshape((-1, 1, 1, 1) if conv else linear_shape)
        plain[f"unet.{path}.lora_A.weight"] = tensors[f"{key}.lora_down.weight"].clone()
        plain[f"unet.{path}.lora_B.weight"] = tensors[f"{key}.lora_up.weight"].clone()
        plain[f"unet.{path}.lora_magnitude_vector"] = norm.reshape((1, -1, 1, 1) if conv else (-1,))
    note = metadata("unet", plain, lora_alpha=8, use_dora=True)
    expected = by_diffusers(build("sd_1"), [(write(tmp_path / "plain", plain, metadata=note), 0.7)])
    assert_same(before, expected, by_trtq(pipe, [(write(tmp_path, tensors), 0.7)]))


def test_an_adapter_of_a_text_encoder_names_no_component(tmp_path, generator):
    # The oracle is PEFT's own merge.
    from peft import PeftModel

    pipe = build("sd_1")
    before = weights(pipe)
    modules = layers(pipe, "text_encoder", "q_proj", "fc1")
    write(tmp_path, peft_like(modules, "base_model.model.", generator), "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 9, "target_modules": ["q_proj", "fc1"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    other = build("sd_1")
    encoder = PeftModel.from_pretrained(other.text_encoder, str(tmp_path)).merge_and_unload()
    other.register_modules(text_encoder=encoder)
    assert_same(before, weights(other), by_trtq(pipe, [(tmp_path, 1.0)]))


def test_locon_convolutions_of_three_parts_are_merged(tmp_path, generator):
    # diffusers refuses lora_mid; LyCORIS' formula is the composition of the three convolutions.
    pipe = build("sd_1")
    module = pipe.unet.mid_block.resnets[0].conv1
    outputs, inputs = module.weight.shape[:2]
    down = torch.randn((RANK, inputs, 1, 1), generator=generator)
    mid = torch.randn((RANK, RANK, 3, 3), generator=generator)
    up = torch.randn((outputs, RANK, 1, 1), generator=generator)
    key = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {
        f"{key}.lora_down.weight": down,
        f"{key}.lora_mid.weight": mid,
        f"{key}.lora_up.weight": up,
        f"{key}.alpha": torch.tensor(2.0),
    }
    x = torch.randn((1, inputs, 7, 7), generator=generator)
    conv = nn.functional.conv2d
    expected = conv(conv(conv(x, down), mid, padding=1), up) * (2.0 / RANK)
    before = module.weight.detach().clone()
    by_trtq(pipe, [(write(tmp_path, tensors), 1.0)])
    change = conv(x, module.weight.detach() - before, padding=1)
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "base_model.model."])
def test_single_blocks_and_final_layer_of_flux_are_merged(prefix, tmp_path, generator):
    # diffusers fixes the width of `linear1` at 3072, drops the final layer's alpha and prefix, and does
    # not read these names with lora_A. The oracle is the same update under diffusers' names.
    pipe = build("flux")
    before = weights(pipe)
    ends = KOHYA_ENDS if prefix == "lora_unet_" else PEFT_ENDS
    alpha = 2.0 if prefix == "lora_unet_" else None
    tensors = flux_original(ends, prefix, generator, alpha, single=True)
    d, flat = FLUX_WIDTH, prefix.endswith("_")
    final = "final_layer_adaLN_modulation_1" if flat else "final_layer.adaLN_modulation.1"
    tensors[prefix + final + ends[0]] = torch.randn((RANK, d), generator=generator) * 0.1
    tensors[prefix + final + ends[1]] = torch.randn((2 * d, RANK), generator=generator) * 0.1
    factor = 1.0 if alpha is None else alpha / RANK

    targets = {"final_layer.adaLN_modulation.1": ["norm_out.linear"]}
    block = "single_transformer_blocks.0"
    targets["single_blocks.0.linear1"] = [
        f"{block}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    targets["single_blocks.0.linear2"] = [f"{block}.proj_out"]
    targets["single_blocks.0.modulation.lin"] = [f"{block}.norm.linear"]
    block = "transformer_blocks.0"
    for stream, names, end in (
        ("img", ("to_q", "to_k", "to_v", "to_out.0"), ""),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), "_context"),
    ):
        theirs = f"double_blocks.0.{stream}"
        targets[f"{theirs}_attn.qkv"] = [f"{block}.attn.{name}" for name in names[:3]]
        targets[f"{theirs}_attn.proj"] = [f"{block}.attn.{names[3]}"]
        targets[f"{theirs}_mlp.0"] = [f"{block}.ff{end}.net.0.proj"]
        targets[f"{theirs}_mlp.2"] = [f"{block}.ff{end}.net.2"]
        targets[f"{theirs}_mod.lin"] = [f"{block}.norm1{end}.linear"]
    plain = {}
    for name, paths in targets.items():
        key = prefix + (name.replace(".", "_") if flat else name)
        # The final layer's alpha is omitted above, so its strength is 1.
        strength = factor if f"{key}.alpha" in tensors else 1.0
        up = tensors[key + ends[1]] * strength
        if paths == ["norm_out.linear"]:
            up = torch.cat([up[d:], up[:d]])
        rows = [len(pipe.transformer.get_submodule(path).weight) for path in paths]
        for path, part in zip(paths, up.split(rows), strict=True):
            plain[f"transformer.{path}.lora_A.weight"] = tensors[key + ends[0]].clone()
            plain[f"transformer.{path}.lora_B.weight"] = part.clone()
    expected = by_diffusers(build("flux"), [(write(tmp_path / "plain", plain), 0.7)])
    given = by_trtq(pipe, [(write(tmp_path, tensors), 0.7)])
    assert_same(before, expected, given)
    assert "transformer.single_transformer_blocks.0.proj_mlp.weight" in changed(before, given)


def test_first_release_names_of_stable_diffusion_3_are_read(tmp_path, generator):
    # diffusers does not read kohya's files of Stable Diffusion 3; the oracle is the same update under
    # diffusers' names.
    pipe = build("sd_3")
    before = weights(pipe)
    d, flat, plain = 32, {}, {}
    rows = {
        "joint_blocks.0.x_block.attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "joint_blocks.0.context_block.attn.qkv": [
            "attn.add_q_proj",
            "attn.add_k_proj",
            "attn.add_v_proj",
        ],
        "joint_blocks.0.x_block.attn.proj": ["attn.to_out.0"],
        "joint_blocks.0.context_block.attn.proj": ["attn.to_add_out"],
        "joint_blocks.0.x_block.mlp.fc1": ["ff.net.0.proj"],
        "joint_blocks.0.x_block.adaLN_modulation.1": ["norm1.linear"],
    }
    for name, paths in rows.items():
        modules = [pipe.transformer.transformer_blocks[0].get_submodule(path) for path in paths]
        down = torch.randn((RANK, d), generator=generator) * 0.1
        ups = [torch.randn((len(m.weight), RANK), generator=generator) * 0.1 for m in modules]
        key = "lora_unet_" + name.replace(".", "_")
        flat |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": torch.cat(ups)}
        for path, up in zip(paths, ups, strict=True):
            prefix = f"transformer.transformer_blocks.0.{path}"
            plain |= {f"{prefix}.lora_A.weight": down.clone(), f"{prefix}.lora_B.weight": up}
    text = kohya(
        layers(pipe, "text_encoder_3", "SelfAttention"), "lora_te3_", generator, alpha=RANK
    )
    expected = by_diffusers(build("sd_3"), [(write(tmp_path / "plain", plain), 1.0)])
    # diffusers loads no LoRA into T5; the oracle of that part is the trainer's formula.
    for path in layers(pipe, "text_encoder_3", "SelfAttention"):
        key = "lora_te3_" + path.replace(".", "_")
        update = text[f"{key}.lora_up.weight"] @ text[f"{key}.lora_down.weight"]
        expected[f"text_encoder_3.{path}.weight"] += update
    assert_same(before, expected, by_trtq(pipe, [(write(tmp_path, flat | text), 1.0)]))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoder_names_with_and_without_text_model_are_read(prefix, tmp_path, generator):
    # transformers 5 removed `text_model` from CLIPTextModel but not from CLIPTextModelWithProjection.
    pipe = build("sd_xl")
    assert not hasattr(pipe.text_encoder, "text_model")
    assert hasattr(pipe.text_encoder_2, "text_model")
    before = weights(pipe)
    tensors, plain = {}, {}
    for name in ("text_encoder", "text_encoder_2"):
        for path, module in layers(pipe, name, *TEXT).items():
            down, up = matrices(module, RANK, generator)
            key = f"{name}.{prefix}{path.removeprefix('text_model.')}"
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
            key = f"{name}.{path}"
            plain |= {f"{key}.lora_A.weight": down.clone(), f"{key}.lora_B.weight": up.clone()}
    expected = by_diffusers(build("sd_xl"), [(write(tmp_path / "plain", plain), 1.0)])
    assert_same(before, expected, by_trtq(pipe, [(write(tmp_path, tensors), 1.0)]))


def test_matrices_of_a_point_convolution_may_be_flat(tmp_path, generator):
    # Trainers write both 1 x 1 convolutions and linear layers with 2 or with 4 dimensions.
    made = {}
    for what, model in (("convolution", "sd_1"), ("linear", "sd_2")):
        before = weights(build(model))
        for dimensions in (2, 4):
            pipe = build(model)
            g = torch.Generator().manual_seed(0)
            tensors = kohya(layers(pipe, "unet", "proj_in"), "lora_unet_", g)
            shaped = {
                k: v if v.ndim == 0 else v.reshape(*v.shape[:2], *(1,) * (dimensions - 2))
                for k, v in tensors.items()
            }
            path = write(tmp_path / f"{what}{dimensions}", shaped)
            made[what, dimensions] = by_trtq(pipe, [(path, 1.0)])
        plain = tmp_path / f"{what}{4 if what == 'convolution' else 2}" / "style.safetensors"
        expected = by_diffusers(build(model), [(plain, 1.0)])
        for dimensions in (2, 4):
            assert_same(before, expected, made[what, dimensions])


# Transformers of other families, and diffusers' converter for their LoRAs.
def wan():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=8,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def wan_names(path):
    for ours, theirs in (
        ("attn1.", "self_attn."),
        ("attn2.", "cross_attn."),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "o"),
        ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
    ):
        path = path.replace(ours, theirs)
    return path


def qwen():
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )


def z_image():
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 4, 8],
        axes_lens=[32, 16, 16],
    )


def ltx():
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )


def flux_2():
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=[4, 4, 4, 4],
    )


FLUX_2 = {
    "double_blocks.0.img_attn.qkv": (96, 32),
    "double_blocks.0.txt_attn.qkv": (96, 32),
    "double_blocks.0.img_attn.proj": (32, 32),
    "single_blocks.0.linear1": (288, 32),
    "single_blocks.0.linear2": (32, 128),
}
FAMILIES = {
    "wan": (wan, "WanLoraLoaderMixin", wan_names, ("blocks",), ("diffusion_model.", "lora_unet_")),
    "qwen": (
        qwen,
        "QwenImageLoraLoaderMixin",
        str,
        ("_blocks",),
        ("diffusion_model.", "lora_unet_"),
    ),
    "z-image": (z_image, "ZImageLoraLoaderMixin", str, (), ("diffusion_model.", "lora_unet_")),
    "ltx": (ltx, "LTXVideoLoraLoaderMixin", str, (), ("diffusion_model.",)),
    "flux-2": (flux_2, "Flux2LoraLoaderMixin", None, (), ("diffusion_model.", "lora_unet_")),
}


@pytest.mark.parametrize(
    ("family", "prefix"), [(name, prefix) for name, row in FAMILIES.items() for prefix in row[4]]
)
def test_loras_of_other_transformer_families_are_merged(family, prefix, tmp_path, generator):
    from diffusers.loaders import lora_pipeline

    from trtq.lora import LoraRequest, merge_loras

    make, loader, name, words, _ = FAMILIES[family]

    def made():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make()

    model = made()
    ends, alpha = (KOHYA_ENDS, 2.0) if prefix == "lora_unet_" else (PEFT_ENDS, None)
    shapes = FLUX_2
    if name is not None:
        shapes = {
            name(path): module.weight.shape
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and (not words or any(w in path for w in words))
        }
    tensors = {}
    for path, (outputs, inputs) in shapes.items():
        key = prefix + (path.replace(".", "_") if prefix.endswith("_") else path)
        tensors[key + ends[0]] = torch.randn((RANK, inputs), generator=generator) * 0.1
        tensors[key + ends[1]] = torch.randn((outputs, RANK), generator=generator) * 0.1
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = made()
    converted = getattr(lora_pipeline, loader).lora_state_dict(dict(tensors))
    converted = converted[0] if isinstance(converted, tuple) else converted
    other.load_lora_adapter(converted, prefix="transformer")
    other.fuse_lora(lora_scale=0.7)
    other.unload_lora()
    path = write(tmp_path, tensors)
    merge_loras({"transformer": model}, [LoraRequest(path, 0.7)], "transformer")
    assert_same(before, dict(other.state_dict()), dict(model.state_dict()))


def test_merging_needs_no_peft(tmp_path, generator, monkeypatch):
    import sys

    pipe = build("sd_1")
    before = weights(pipe)
    tensors, note = diffusers_metadata(pipe, generator)
    path = write(tmp_path, tensors, metadata=note)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert len(changed(before, by_trtq(pipe, [(path, 1.0)]))) == len(tensors) // 2


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", ""])
@pytest.mark.parametrize("name", pipelines.PIPELINES)
def test_every_layer_of_every_pipeline_has_its_diffusers_name(name, prefix):
    pipe = pipelines.build(name)
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    names = Names(parts(pipe), denoiser)
    paths = layers(pipe, denoiser)
    path_of = {prefix + (p.replace(".", "_") if prefix.endswith("_") else p): p for p in paths}
    sites, missing = names.find(path_of)
    assert missing == []
    for name_in_file, path in path_of.items():
        (layer,) = sites[name_in_file].layers
        assert (layer.component, layer.path) == (denoiser, path)
        assert layer.module is paths[path]


def test_a_unet_with_other_blocks_is_supported():
    from diffusers import Kandinsky3UNet

    unet = Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=32,
    )
    sites, missing = Names({"unet": unet}, "unet").find(["lora_unet_conv_in"])
    assert missing == []
    assert sites["lora_unet_conv_in"].layers[0].module is unet.conv_in
