"""Common uses of a pipeline after `trtq.load`."""

import json
import pickle
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import trtq
from tests.families import pipelines
from tests.test_torch_settings import RECIPE
from trtq.engine.components import EngineAutoencoder, EngineTextEncoder
from trtq.errors import UsageError
from trtq.exporter.components import autoencoder_components
from trtq.pipelines.open import open_any


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("loaded")
    trtq.quantize(pipelines.build("ldm_vq"), RECIPE, place / "run")
    trtq.export(place / "run", place / "onnx")
    return place


def _drawn(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(num_inference_steps=2, generator=generator, output_type="np").images


@pytest.mark.parametrize("kind", ["run", "onnx"])
def test_copied_and_offloaded_pipelines_draw_the_same(kind, folders):
    expected = _drawn(trtq.load(folders / kind))
    copied = deepcopy(trtq.load(folders / kind))
    copied.model_cpu_offload_seq = "unet->vqvae"
    np.testing.assert_array_equal(_drawn(copied), expected)
    copied.enable_model_cpu_offload(device="cpu")
    np.testing.assert_array_equal(_drawn(copied), expected)


@pytest.mark.parametrize("kind", ["run", "onnx"])
def test_saving_a_low_bit_pipeline_is_refused_and_nothing_is_written(kind, folders, tmp_path):
    with pytest.raises(UsageError, match="copy its folder"):
        trtq.load(folders / kind).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("kind", ["run", "onnx"])
@pytest.mark.parametrize(
    "name", ["load_lora_adapter", "enable_freeu", "fuse_qkv_projections", "set_attn_processor"]
)
def test_features_of_float_models_only_are_refused_with_a_remedy(kind, name, folders):
    denoiser = trtq.load(folders / kind).unet
    assert not hasattr(denoiser, name)
    with pytest.raises(UsageError, match=f"a low-bit denoiser has no {name}: "):
        getattr(denoiser, name)


def test_a_size_that_the_graph_does_not_support_is_refused(folders):
    source = open_any(folders / "onnx")
    with pytest.raises(UsageError, match=r"\[batch, 3, 8, 8\], got \[2, 3, 16, 16\]"):
        source.denoiser(torch.zeros(2, 3, 16, 16), 1)


def test_an_open_graph_is_not_pickled(folders):
    with pytest.raises(UsageError, match=r"trtq\.load"):
        pickle.dumps(trtq.load(folders / "onnx").unet)


def test_an_exported_text_encoder_refuses_textual_inversion():
    with pytest.raises(UsageError, match="load_textual_inversion"):
        EngineTextEncoder(SimpleNamespace(device="cpu"), None).get_input_embeddings()


def test_copies_of_graphs_share_them():
    engines = SimpleNamespace(device="cpu"), SimpleNamespace(device="cpu")
    copied = deepcopy(EngineAutoencoder(*engines, {"a": 1}))
    assert (copied.decoder, copied.encoder) == engines
    assert copied.config == {"a": 1}


def test_a_decoder_that_draws_noise_is_refused_by_the_export():
    from diffusers import ConsistencyDecoderVAE

    decoder = ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 8),
        encoder_down_block_types=("DownEncoderBlock2D",) * 2,
        encoder_norm_num_groups=2,
        decoder_block_out_channels=(8, 8),
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
        decoder_norm_num_groups=2,
        decoder_layers_per_block=1,
    )
    with pytest.raises(UsageError, match="ConsistencyDecoderVAE cannot be exported"):
        autoencoder_components(decoder)


def test_optional_components_need_not_be_named(tmp_path):
    pipelines.build("sd_1").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model_index.json"
    index = json.loads(file.read_text())
    for name in ("safety_checker", "feature_extractor", "image_encoder"):
        index.pop(name, None)
    file.write_text(json.dumps(index))
    assert trtq.load(tmp_path / "model").safety_checker is None
