"""Quantisation of checkpoints whose weights stay in their files, for a limited memory."""

import logging
import math
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.families.pipelines import build
from trtq.artefact.opened import open_folder
from trtq.calib import transforms
from trtq.calib.recipe import load_recipe
from trtq.checkpoint import stored_models
from trtq.checkpoint.pipeline_folder import load_part, load_pipeline
from trtq.errors import ArtefactError, NonFiniteError, UsageError
from trtq.lora import LoraRequest
from trtq.quant.stored_weight import (
    change_weight,
    has_stored_weight,
    release_weight,
    state_tensors,
    store_weight,
)
from trtq.runs import memory
from trtq.runs.memory import parse_memory, stores_weights
from trtq.runs.quantize import quantize

CALL = [{"prompt": "a red circle", "num_inference_steps": 2, "output_type": "latent"}]
RECIPE = {
    "method": "search",
    "bits": "w4a8",
    "steps": 2,
    "calibration": {"images": 2, "activations": "output"},
    "rotate": 16,
}


@pytest.fixture(autouse=True)
def small_weights_are_large(monkeypatch):
    monkeypatch.setattr(stored_models, "_LARGE", 64)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A Flux pipeline in bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "flux"
    pipeline = build("flux")
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    return folder


def test_a_run_with_weights_in_their_files_equals_one_with_weights_in_memory(
    half, tmp_path, monkeypatch
):
    # Random weights have no outliers, so no rotation would be chosen.
    monkeypatch.setattr(transforms, "_GAIN_OF_ROTATION", math.inf)
    for name, limit in (("whole", "100GB"), ("stored", "1MB")):
        quantize(half, RECIPE, tmp_path / name, calls=CALL, memory=limit)
    whole, stored = (
        load_file(tmp_path / name / "quantized.safetensors") for name in ("whole", "stored")
    )
    assert whole.keys() == stored.keys()
    assert all(torch.equal(whole[name], stored[name]) for name in whole)
    manifests = [open_folder(tmp_path / name).manifest for name in ("whole", "stored")]
    assert manifests[0].layers == manifests[1].layers
    assert any(layer.rotate for layer in manifests[0].layers)
    assert any(layer.smooth for layer in manifests[0].layers)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        cls = type(getattr(load_pipeline(half), part))
        parts = [load_part(tmp_path / name, part, cls) for name in ("whole", "stored")]
        states = [part.state_dict() for part in parts]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def lora_file(folder, half):
    """A LoRA for a layer of the transformer and one of a text encoder."""
    pipeline, tensors = load_pipeline(half), {}
    generator = torch.Generator().manual_seed(0)
    for part, ending in (("transformer", ".attn.to_q"), ("text_encoder", ".q_proj")):
        modules = getattr(pipeline, part).named_modules()
        path, layer = next(pair for pair in modules if pair[0].endswith(ending))
        rows, columns = layer.weight.shape
        tensors[f"{part}.{path}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"{part}.{path}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    save_file(tensors, folder / "lora.safetensors")
    return LoraRequest(folder / "lora.safetensors", 0.5)


@pytest.mark.slow
def test_a_lora_is_added_when_a_weight_is_read(half, tmp_path):
    loras = [lora_file(tmp_path, half)]
    quantize(half, RECIPE, tmp_path / "plain", calls=CALL, memory="1MB")
    for name, limit in (("whole", "100GB"), ("stored", "1MB")):
        quantize(half, RECIPE, tmp_path / name, loras=loras, calls=CALL, memory=limit)
    plain, whole, stored = (
        load_file(tmp_path / name / "quantized.safetensors")
        for name in ("plain", "whole", "stored")
    )
    assert all(torch.equal(whole[name], stored[name]) for name in whole)
    name = "layer:transformer_blocks.0.attn.to_q:weight.codes"
    assert not torch.equal(whole[name], plain[name])


def test_a_known_pipeline_that_does_not_fit_is_quantised_inside_its_call(half, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "trtq"):
        quantize(half, RECIPE, tmp_path / "run", memory="1MB")
    assert open_folder(tmp_path / "run").manifest.recorded is not None
    assert "layers read their weights from the files" in caplog.text


def test_the_pipeline_computes_the_same_with_weights_in_their_files(half):
    whole, stored = load_pipeline(half), load_pipeline(half, stored=True)
    layers = [module for module in stored.transformer.modules() if has_stored_weight(module)]
    held = sum(p.untyped_storage().nbytes() for p in stored.transformer.parameters())
    assert len(layers) > 10
    assert held < 0.3 * sum(p.nbytes for p in whole.transformer.parameters())
    images = [
        pipeline(**CALL[0], generator=torch.Generator().manual_seed(0)).images
        for pipeline in (whole, stored)
    ]
    assert torch.equal(*images)
    assert stored.text_encoder.dtype == torch.float32


def test_a_small_tensor_that_is_not_finite_is_refused_when_the_model_is_loaded(half, tmp_path):
    folder = shutil.copytree(half, tmp_path / "damaged")
    file = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("bias"))
    tensors[name][0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    for stored in (False, True):
        with pytest.raises(NonFiniteError, match=f"{name.rpartition('.')[0]}.*its bias"):
            load_pipeline(folder, stored=stored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "efficientdm"}, "choose --method search"),
        ({"split_skips": True}, "leave it out"),
        ({"budget": "size=0.2x"}, "--budget changes them"),
    ],
)
def test_what_needs_all_weights_in_memory_is_refused(half, changes, message):
    recipe = load_recipe(None, {"method": "search"} | changes)
    with pytest.raises(UsageError, match=message) as caught:
        stores_weights(half, recipe, 1 << 20)
    assert "more than half of the 1.0 MB of --memory" in str(caught.value)
    # Without a limit of the user, memory that is short is no error: it may suffice.
    assert not stores_weights(half, recipe, None)


def test_the_available_memory_decides(half, monkeypatch):
    recipe = load_recipe(None, {"method": "search"})
    needed = stored_models.float_bytes(half)
    for available, expected in ((1.25 * needed + 1, False), (1.25 * needed - 1, True), (0, False)):
        monkeypatch.setattr(memory, "available_bytes", lambda available=available: available)
        assert stores_weights(half, recipe, None) == expected


def test_a_folder_that_is_missing_is_reported_by_the_loader(tmp_path):
    recipe = load_recipe(None, {"method": "search"})
    assert not stores_weights(tmp_path / "missing", recipe, 1)


@pytest.mark.parametrize(
    ("text", "expected"), [("24GB", 24 * 10**9), ("1.5 gib", 3 * 2**29), ("800MB", 8 * 10**8)]
)
def test_an_amount_of_memory_is_parsed(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["24", "GB", "0GB", "-1GB", "1e3GB", "24 TB", "nan GB", ""])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(UsageError, match="24GB"):
        parse_memory(text)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_freed_weights_go_back_to_the_operating_system():
    script = """
import torch
from trtq.resources import return_freed_memory, rss_bytes
return_freed_memory()
# glibc takes blocks of this size from its heap once one of them has been freed.
del (first := [torch.ones(1 << 21)])[0]
before = rss_bytes()
weights, results = [], []
for _ in range(40):
    weights.append(torch.ones(1 << 21))
    # A small result of each weight, which lies behind the weight in the heap.
    results.append(torch.ones(1 << 15))
del weights
print((rss_bytes() - before) >> 20)
"""
    grown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    # 40 weights of 8 MiB.
    assert int(grown.stdout) < 50, grown.stderr


@pytest.fixture
def stored(tmp_path):
    """A layer with a stored weight, the weight and the file."""
    file, weight = tmp_path / "weights.safetensors", torch.randn(6, 4).half()
    save_file({"layer.weight": weight}, file)
    layer = nn.Linear(4, 6)
    store_weight(layer, file, "layer.weight", (6, 4))
    return layer, weight.float(), file


def test_a_stored_weight_is_read_changed_and_released(stored):
    layer, weight, _ = stored
    assert torch.equal(layer.weight, weight)
    assert [p.shape for p in layer.parameters()] == [(6,), (6, 4)]
    change_weight(layer, lambda w: 2 * w)
    change_weight(layer, lambda w: w + 1)
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), nn.functional.linear(x, 2 * weight + 1, layer.bias))
    named = dict(state_tensors(nn.Sequential(layer)))
    assert named.keys() == {"0.weight", "0.bias"}
    assert torch.equal(named["0.weight"], 2 * weight + 1)
    assert list(dict(state_tensors(nn.Sequential(layer), {"0.weight"}))) == ["0.bias"]
    release_weight(layer)
    assert type(layer) is nn.Linear
    assert layer.weight.numel() == 0


def test_a_file_that_is_cut_off_or_changed_is_reported(stored):
    layer, _, file = stored
    save_file({"layer.weight": torch.zeros(2, 4)}, file)
    with pytest.raises(ArtefactError, match="changed while it was in use"):
        _ = layer.weight
    save_file({"layer.weight": torch.full((6, 4), torch.nan)}, file)
    with pytest.raises(NonFiniteError, match="holds NaN"):
        _ = layer.weight
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ArtefactError, match="leave the file in place"):
        _ = layer.weight
