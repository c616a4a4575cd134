"""Names of a model's authors, found by inverting diffusers' conversion and proven by running it."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES

from tests.checkpoint.original_layout import unet
from tests.families.pipelines import build
from trtq.checkpoint.conversion_probe import ConversionError, Piece, Symbol
from trtq.checkpoint.original_names import Source, original_tensors

FEW = {
    "num_layers": 2,
    "num_single_layers": 2,
    "n_layers": 2,
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 2,
    "vace_layers": [0],
}
KNOWN = {
    "UNet2DConditionModel": {
        "model.diffusion_model.time_embed.0.weight": ("time_embedding.linear_1.weight",),
        "model.diffusion_model.middle_block.1.proj_in.weight": (
            "mid_block.attentions.0.proj_in.weight",
        ),
    },
    "FluxTransformer2DModel": {
        "double_blocks.1.txt_attn.qkv.weight": (
            "transformer_blocks.1.attn.add_q_proj.weight",
            "transformer_blocks.1.attn.add_k_proj.weight",
            "transformer_blocks.1.attn.add_v_proj.weight",
        ),
        "single_blocks.0.linear1.bias": (
            "single_transformer_blocks.0.attn.to_q.bias",
            "single_transformer_blocks.0.attn.to_k.bias",
            "single_transformer_blocks.0.attn.to_v.bias",
            "single_transformer_blocks.0.proj_mlp.bias",
        ),
        "double_blocks.0.img_attn.norm.key_norm.scale": (
            "transformer_blocks.0.attn.norm_k.weight",
        ),
    },
    "SD3Transformer2DModel": {
        "joint_blocks.0.x_block.attn.qkv.weight": (
            "transformer_blocks.0.attn.to_q.weight",
            "transformer_blocks.0.attn.to_k.weight",
            "transformer_blocks.0.attn.to_v.weight",
        ),
        "y_embedder.mlp.2.bias": ("time_text_embed.text_embedder.linear_2.bias",),
    },
    "ChromaTransformer2DModel": {
        "distilled_guidance_layer.norms.0.scale": ("distilled_guidance_layer.norms.0.weight",)
    },
    "Flux2Transformer2DModel": {
        "single_blocks.1.linear1.weight": (
            "single_transformer_blocks.1.attn.to_qkv_mlp_proj.weight",
        ),
        "double_blocks.0.img_attn.norm.query_norm.scale": (
            "transformer_blocks.0.attn.norm_q.weight",
        ),
        "double_blocks.1.txt_attn.qkv.weight": (
            "transformer_blocks.1.attn.add_q_proj.weight",
            "transformer_blocks.1.attn.add_k_proj.weight",
            "transformer_blocks.1.attn.add_v_proj.weight",
        ),
    },
    "ZImageTransformer2DModel": {
        "layers.0.attention.qkv.weight": (
            "layers.0.attention.to_q.weight",
            "layers.0.attention.to_k.weight",
            "layers.0.attention.to_v.weight",
        ),
        "x_embedder.weight": ("all_x_embedder.2-1.weight",),
    },
    "WanTransformer3DModel": {
        "head.head.weight": ("proj_out.weight",),
        "head.modulation": ("scale_shift_table",),
        "blocks.0.modulation": ("blocks.0.scale_shift_table",),
        "blocks.1.norm3.weight": ("blocks.1.norm2.weight",),
        "blocks.1.ffn.2.weight": ("blocks.1.ffn.net.2.weight",),
    },
    "Lumina2Transformer2DModel": {
        "t_embedder.mlp.0.weight": ("time_caption_embed.timestep_embedder.linear_1.weight",),
        "layers.0.ffn_norm2.weight": ("layers.0.ffn_norm2.weight",),
        "context_refiner.1.attention_norm1.weight": ("context_refiner.1.norm1.weight",),
        "cap_embedder.0.weight": ("time_caption_embed.caption_embedder.0.weight",),
        "layers.1.attention.qkv.weight": (
            "layers.1.attn.to_q.weight",
            "layers.1.attn.to_k.weight",
            "layers.1.attn.to_v.weight",
        ),
    },
    "Krea2Transformer2DModel": {
        "blocks.1.mod.lin": ("transformer_blocks.1.scale_shift_table",),
        "last.modulation.lin": ("final_layer.scale_shift_table",),
    },
    "Flux3Transformer2DModel": {
        "content_mode_blocks.image.1.q_proj.weight": ("mode_blocks.image.1.attn.to_q.weight",),
        "final_layer.image.linear.weight": ("proj_out.weight",),
    },
    "LTXVideoTransformer3DModel": {"patchify_proj.weight": ("proj_in.weight",)},
    "QwenImageTransformer2DModel": {
        "transformer_blocks.1.attn.to_q.weight": ("transformer_blocks.1.attn.to_q.weight",)
    },
}
NO_INVERSE = {
    "SanaTransformer2DModel": "has no inverse",
    "HunyuanVideoTransformer3DModel": "fits several names",
    "WanAnimateTransformer3DModel": "fits several names",
    "WanAnimate2Transformer3DModel": "fits several names",
}
FAMILY = {
    "FluxTransformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "ChromaTransformer2DModel": "chroma",
    "Flux2Transformer2DModel": "flux2",
    "Flux3Transformer2DModel": "flux3",
    "ZImageTransformer2DModel": "z-image-turbo",
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan_vace",
    "Lumina2Transformer2DModel": "lumina2",
    "Krea2Transformer2DModel": "krea2",
    "MochiTransformer3DModel": "mochi-1-preview",
    "AuraFlowTransformer2DModel": "auraflow",
    "QwenImage21Transformer2DModel": "qwen-image-2.1",
    "MiniMaxH3Transformer3DModel": "minimax-h3",
}
"""Under which name diffusers lists tensors of the original layout, to recognise it."""
CLASSES = [
    name
    for name in SINGLE_FILE_LOADABLE_CLASSES
    if ("Transformer" in name or name == "UNet2DConditionModel")
    and name != "HiDreamImageTransformer2DModel"  # Its default configuration is none.
]


def model(name):
    """A model of a class without memory, of its default configuration with few layers."""
    cls = getattr(diffusers, name)
    settings = inspect.signature(cls.__init__).parameters
    # The number of Mochi's layers stands in its conversion.
    few = {} if name == "MochiTransformer3DModel" else FEW
    with torch.device("meta"):
        return cls(**{key: value for key, value in few.items() if key in settings})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CLASSES)
def test_the_names_are_those_that_diffusers_converts(name):
    made = model(name)
    names = list(made.state_dict())
    if name in NO_INVERSE:
        with pytest.raises(ConversionError, match=NO_INVERSE[name]):
            original_tensors(name, made.config, names)
        return
    originals = original_tensors(name, made.config, names)
    used = sorted((s.name, s.index, s.count) for t in originals.values() for s in t.sources)
    assert len(set(used)) == len(used)
    assert {source for source, _, _ in used} == set(names)
    assert sum(1 / count for _, _, count in used) == pytest.approx(len(names))
    for original, sources in KNOWN.get(name, {}).items():
        assert originals[original].sources == tuple(Source(source) for source in sources)
    listed = CHECKPOINT_KEY_NAMES[FAMILY[name]] if name in FAMILY else []
    listed = [listed] if isinstance(listed, str) else listed
    assert not listed or any(key in originals for key in listed)


@pytest.mark.parametrize("name", ["sd_1", "sd_2", "sd_xl"])
def test_the_names_of_unets_are_those_of_latent_diffusion(name):
    """The table of names in `tests.checkpoint.original_layout` was written without the conversion."""
    made = build(name).unet
    originals = original_tensors("UNet2DConditionModel", made.config, list(made.state_dict()))
    state = made.state_dict(keep_vars=True)
    names = {id(tensor): key for key, tensor in state.items()}
    made.state_dict = lambda: state
    expected = {
        f"model.diffusion_model.{original}": names[id(tensor)]
        for original, tensor in unet(made).items()
    }
    assert {key: tensor.sources[0].name for key, tensor in originals.items()} == expected


def test_swapped_rows_are_swapped_back_and_vectors_stay_vectors():
    made = model("FluxTransformer2DModel")
    originals = original_tensors(type(made).__name__, made.config, list(made.state_dict()))
    swapped = originals["final_layer.adaLN_modulation.1.weight"]
    assert swapped.sources == (
        Source("norm_out.linear.weight", 1, 2),
        Source("norm_out.linear.weight", 0, 2),
    )
    krea = model("Krea2Transformer2DModel")
    originals = original_tensors(type(krea).__name__, krea.config, list(krea.state_dict()))
    assert originals["blocks.0.mod.lin"].flattened
    assert not originals["blocks.0.attn.wq.weight"].flattened


def test_models_without_a_table_or_with_other_tensors_have_no_original_names():
    with pytest.raises(ConversionError, match="no table of the original names"):
        original_tensors("DiTTransformer2DModel", {}, ["proj_out.weight"])
    made = model("FluxTransformer2DModel")
    names = [*made.state_dict(), "of_another.weight"]
    with pytest.raises(ConversionError, match="has no inverse"):
        original_tensors(type(made).__name__, made.config, names)
    with torch.device("meta"):
        several = diffusers.UNet2DConditionModel(layers_per_block=(1, 2, 1, 1))
    with pytest.raises(ConversionError, match="has no inverse"):
        original_tensors("UNet2DConditionModel", several.config, list(several.state_dict()))


def test_symbols_refuse_what_they_do_not_express():
    symbol = Symbol((Piece("a"),))
    assert torch.cat(torch.chunk(symbol, 2, dim=0)).pieces == (Piece("a", 0, 2), Piece("a", 1, 2))
    for use in (
        lambda: torch.cat([symbol], dim=1),
        lambda: torch.stack([symbol]),
        lambda: symbol.chunk(2, dim=1),
        lambda: symbol.chunk(2)[0].chunk(2),
        lambda: symbol.split(4),
        lambda: symbol[0],
        lambda: symbol.T,
        lambda: symbol.chunk(2)[0].reshape(6, -1),
    ):
        with pytest.raises(ConversionError):
            use()
