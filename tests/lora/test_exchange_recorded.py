"""LoRAs of a run that was recorded inside its pipeline's call."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import trtq
from tests.calls.inpainting import arguments
from tests.lora.merged_by_diffusers import matrices, write
from trtq.artefact.manifest_rows import StructureRow
from trtq.artefact.opened import open_folder
from trtq.calls.stored import CALL_FOLDER, load_call
from trtq.diffusion.loading import open_pipeline
from trtq.errors import UsageError
from trtq.lora import LoraRequest
from trtq.runs import exchange_loras
from trtq.runs.exchange_loras import requantize

TARGETS = ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1")


@pytest.fixture(scope="module")
def lora(inpainting_run, tmp_path_factory):
    unet = open_pipeline(
        open_folder(inpainting_run).manifest.source.name, recorded=True
    ).pipeline.unet
    generator, tensors = torch.Generator().manual_seed(0), {}
    for path in TARGETS:
        down, up = matrices(unet.get_submodule(path), 2, generator)
        key = "lora_unet_" + path.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    return write(tmp_path_factory.mktemp("lora"), tensors)


def test_only_the_layers_of_the_lora_change(inpainting_run, lora, tmp_path):
    nothing = requantize(inpainting_run, [LoraRequest(lora, 0.0)], tmp_path / "nothing")
    result = requantize(inpainting_run, [LoraRequest(lora)], tmp_path / "styled")
    run, same, styled = (
        load_file(folder / "quantized.safetensors")
        for folder in (inpainting_run, tmp_path / "nothing", tmp_path / "styled")
    )
    assert all(torch.equal(run[key], same[key]) for key in run)
    changed = {key.split(":")[1] for key in run if not torch.equal(run[key], styled[key])}
    assert changed == set(TARGETS)
    assert nothing.snr_db_after == pytest.approx(nothing.snr_db_before, abs=0.01)
    assert result.snr_db_after > 10
    before, after = (
        load_call(folder / CALL_FOLDER).arguments
        for folder in (inpainting_run, tmp_path / "styled")
    )
    assert {**before, "image": 0, "mask_image": 0} == {**after, "image": 0, "mask_image": 0}
    assert before["image"].tobytes() == after["image"].tobytes()
    pipeline = trtq.load(tmp_path / "styled")
    assert pipeline(**arguments(), output_type="pt").images.shape == (1, 3, 16, 16)


def test_a_run_with_an_ip_adapter_is_refused(inpainting_run, lora, tmp_path, monkeypatch):
    real = exchange_loras.open_run

    def with_adapter(opened):
        run = real(opened)
        structure = StructureRow(ip_adapter={"encoder_hid_proj.a": [1]})
        recorded = run.manifest
        first = recorded.model_copy(update={"structure": structure})
        return replace(run, manifest=first)

    monkeypatch.setattr(exchange_loras, "open_run", with_adapter)
    with pytest.raises(UsageError, match="made with an IP-Adapter"):
        requantize(inpainting_run, [LoraRequest(lora)], tmp_path / "new")
    assert not (tmp_path / "new").exists()
