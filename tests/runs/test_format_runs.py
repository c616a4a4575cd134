"""Runs in FP8 and NVFP4 from the command line to the graph, and the exchange of their LoRAs."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.lora.merged_by_diffusers import matrices, write
from tests.runs.test_weight_only_runs import invoke
from trtq.artefact.opened import open_folder
from trtq.exporter.verify import verify
from trtq.lora import LoraRequest
from trtq.pipelines.inspect import inspect
from trtq.runs.exchange_loras import requantize
from trtq.runs.quantize import quantize

LORA_LAYER = "mid_block.attentions.0.to_q"


def wide_pipeline():
    """As `tiny_pipeline`, with attention over 32 channels, which FP8 and NVFP4 need 16 of."""
    from diffusers import DDIMScheduler, UNet2DModel

    from trtq.diffusion.class_conditional import ClassConditionalPipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
            num_class_embeds=4,
        ).eval()
    scheduler = DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    return ClassConditionalPipeline(unet, scheduler, null_class=3)


RECIPE = {
    "method": "efficientdm",
    "steps": 3,
    "calibration": {"images": 4, "samples_per_step": 128},
    "training": {"iterations": 3, "batch": 2, "rank": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from diffusers import DDIMPipeline

    folder = tmp_path_factory.mktemp("formats")
    pipeline = wide_pipeline()
    DDIMPipeline(pipeline.unet, pipeline.scheduler).save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    down, up = matrices(pipeline.unet.get_submodule(LORA_LAYER), 2, generator)
    key = "lora_unet_" + LORA_LAYER.replace(".", "_")
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    write(folder, tensors | {f"{key}.alpha": torch.tensor(2.0)})
    return folder / "model"


FORMATS = ["fp8", "nvfp4"]


@pytest.fixture(scope="module", params=FORMATS)
def run(request, model):
    """A fine-tuned run whose body is in the format, with first and last layers in integers."""
    out = model.parent / request.param
    quantize(model, RECIPE | {"format": request.param}, out)
    return out


def test_a_run_mixes_the_format_with_integers(run):
    rows = {row.name: row for row in open_folder(run).manifest.layers}
    body, first = rows[LORA_LAYER], rows["conv_in"]
    assert (body.format, body.activation_bits) == (run.name, {"fp8": 8, "nvfp4": 4}[run.name])
    assert (first.format, first.weight_bits) == ("int", 8)
    assert {run.name, "w8a8"} <= set(inspect(run).to_json()["precisions"])
    # NVFP4 has no convolutions, and neither format has products of few channels.
    convolution = rows["mid_block.resnets.0.conv1"]
    assert convolution.format == ("fp8" if run.name == "fp8" else "int")
    row = next(row for row in inspect(run).to_json()["layers"] if row["name"] == LORA_LAYER)
    assert len(row["scale"]["activation"]) == 3
    assert row["zero_points"] == []


def test_the_graph_agrees_with_torch_at_every_step(run):
    onnx = run.parent / f"{run.name}_onnx"
    code, out, err = invoke("export", run, "-o", onnx, "--json")
    assert code == 0, err
    assert json.loads(out)["parity_db_min"] >= 40
    runtimes = ("onnxruntime", "openvino", "tensorrt-rtx", "tensorrt")
    result = verify(onnx, against=run, runtimes=runtimes, layers=True)
    assert result.ok
    code, _, err = invoke("build", onnx, "-o", run.parent / "engine", "--arch", "sm86")
    assert code == 1
    assert "sm86 cannot compute" in " ".join(err.split())
    assert "doctor --advise sm86" in " ".join(err.split())
    assert not (run.parent / "engine").exists()


def test_an_exchange_keeps_the_scales_of_the_inputs(run, tmp_path):
    lora = run.parent / "style.safetensors"
    requantize(run, [LoraRequest(lora, 0.0)], tmp_path / "nothing")
    result = requantize(run, [LoraRequest(lora)], tmp_path / "styled")
    assert result.loras[0]["modules"] == 1
    before, same, styled = (
        load_file(place / "quantized.safetensors")
        for place in (run, tmp_path / "nothing", tmp_path / "styled")
    )
    assert all(torch.equal(before[key], same[key]) for key in before)
    changed = {key for key in before if not torch.equal(before[key], styled[key])}
    assert changed
    assert {key.rpartition(":")[0] for key in changed} == {f"layer:{LORA_LAYER}"}
    assert not any("activation" in key for key in changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "fp8", "--bits", "w4a4"), "has the bits w8a8"),
        (("--format", "nvfp4", "--bits", "w8a8"), "has the bits w4a4"),
    ],
)
def test_bits_of_another_format_are_refused_in_one_line(options, message, model):
    code, _, err = invoke("quantize", model, "-o", model.parent / "bad", *options)
    assert code in (1, 2)
    assert message in " ".join(err.split())
    assert not (model.parent / "bad").exists()
