"""Weight-only runs from the command line to the graph, and the exchange of their LoRAs."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.conftest import tiny_pipeline
from tests.lora.merged_by_diffusers import matrices, write
from trtq.artefact.opened import open_folder
from trtq.cli import app
from trtq.exporter.verify import verify
from trtq.lora import LoraRequest
from trtq.pipelines.inspect import inspect
from trtq.runs.exchange_loras import requantize
from trtq.runs.folder import open_run
from trtq.runs.quantize import quantize

POLICY = """
family = "UNet2DModel"
[[rule]]
layers = ["*.to_q", "*.to_k", "*.to_v", "*.to_out.0", "*.time_emb_proj"]
bits = "recipe"
reason = "body"
[[rule]]
layers = ["time_embedding.*"]
bits = "w8a8"
reason = "embedding"
[[rule]]
layers = ["*.resnets.*"]
bits = "w8a8"
reason = "convolutions in integers"
[tune]
time_embedding = ["*.time_emb_proj"]
attention = ["*.to_q"]
"""
LORA_LAYER = "mid_block.attentions.0.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with layers of 32 input channels, a policy, and a LoRA."""
    from diffusers import DDIMPipeline

    folder = tmp_path_factory.mktemp("weight_only")
    pipeline = tiny_pipeline()
    DDIMPipeline(pipeline.unet, pipeline.scheduler).save_pretrained(folder / "model")
    (folder / "policy.toml").write_text(POLICY)
    generator = torch.Generator().manual_seed(0)
    down, up = matrices(pipeline.unet.get_submodule(LORA_LAYER), 2, generator)
    key = "lora_unet_" + LORA_LAYER.replace(".", "_")
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    write(folder, tensors | {f"{key}.alpha": torch.tensor(2.0)})
    return folder


def invoke(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def run(folder):
    """A mixed run: weight-only linear layers, integer convolutions, three updates."""
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f'method = "efficientdm"\nsteps = 3\npolicy = "{folder / "policy.toml"}"\n'
        "[calibration]\nimages = 4\nsamples_per_step = 128\n"
        "[training]\niterations = 3\nbatch = 2\nrank = 2\n"
    )
    options = ("--recipe", recipe, "--bits", "w4a16", "--group", 32, "--json")
    code, out, err = invoke("quantize", folder / "model", "-o", folder / "run", *options)
    assert code == 0, err
    assert json.loads(out)["layers_quantized"] > 30
    return folder / "run"


def test_the_manifest_says_format_and_group_of_every_layer(run):
    rows = {row.name: row for row in open_folder(run).manifest.layers}
    q, embedding, conv = (
        rows[name] for name in (LORA_LAYER, "time_embedding.linear_1", "mid_block.resnets.0.conv1")
    )
    assert (q.format, q.weight_bits, q.activation_bits, q.group) == ("weight_only", 4, 16, None)
    assert "groups of 32 do not divide 12 input channels" in q.reason
    projection = rows["mid_block.resnets.0.time_emb_proj"]
    assert (projection.format, projection.group) == ("weight_only", 32)
    assert (embedding.format, embedding.weight_bits) == ("weight_only", 8)
    assert embedding.group is None
    assert (conv.format, conv.weight_bits, conv.activation_bits) == ("int", 8, 8)
    assert inspect(run).to_json()["precisions"] == {
        "w4a16": sum(row.weight_bits == 4 for row in rows.values()),
        "w8a16": sum((row.weight_bits, row.activation_bits) == (8, 16) for row in rows.values()),
        "w8a8": sum(row.format == "int" and row.weight_bits == 8 for row in rows.values()),
        "float": sum(row.weight_bits is None for row in rows.values()),
    }


def test_the_file_holds_no_tables_of_weight_only_layers(run):
    names = set(load_file(run / "quantized.safetensors"))
    leaves = {name.rpartition(":")[2] for name in names if f":{LORA_LAYER}:" in name}
    assert leaves - {"transform.inv_channels"} == {"weight.codes", "weight.scale", "bias"}


def test_the_graph_agrees_with_torch_at_every_step(run, folder):
    code, out, err = invoke("export", run, "-o", folder / "onnx", "--json")
    assert code == 0, err
    assert json.loads(out)["parity_db_min"] >= 40
    runtimes = ("onnxruntime", "openvino", "tensorrt-rtx", "tensorrt")
    result = verify(folder / "onnx", against=run, runtimes=runtimes, layers=True)
    assert result.ok
    assert {name for name, rules in result.runtimes.items() if rules.legal} == set(runtimes)
    assert min(layer.snr_db for layer in result.layers) >= 60


def test_an_edited_group_is_refused(run, folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    row = next(row for row in manifest["layers"] if row["group"] == 32)
    row["group"] = 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = invoke("verify", copy)
    assert code == 1
    assert row["name"] in err
    assert "groups of 64, which do not divide 32" in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize("base", ["fp", "int"])
def test_an_exchange_requantises_in_groups(base, folder, tmp_path):
    recipe = {
        "method": "efficientdm",
        "bits": "w4a16",
        "group": 32,
        "steps": 2,
        "policy": str(folder / "policy.toml"),
        "calibration": {"images": 4, "samples_per_step": 128},
        "training": {"iterations": 2, "batch": 2, "rank": 2, "base": base},
    }
    lora = folder / "style.safetensors"
    quantize(folder / "model", recipe, tmp_path / "run")
    requantize(tmp_path / "run", [LoraRequest(lora, 0.0)], tmp_path / "nothing")
    result = requantize(tmp_path / "run", [LoraRequest(lora)], tmp_path / "styled")
    assert result.loras[0]["modules"] == 1
    before, same, styled = (
        load_file(tmp_path / name / "quantized.safetensors")
        for name in ("run", "nothing", "styled")
    )
    assert all(torch.equal(before[key], same[key]) for key in before)
    changed = {key for key in before if not torch.equal(before[key], styled[key])}
    assert changed == {f"layer:{LORA_LAYER}:weight.codes"}
    open_run(tmp_path / "styled").denoiser()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "fp6"), "'int', 'fp8' or 'nvfp4'"),
        (("--bits", "w5a16"), "w4a16 or w8a16"),
        (("--bits", "w4a16", "--group", "7"), "choose one of 0, 32, 64, 128"),
        (("--bits", "w4a16", "--budget", "size=0.2x"), "a budget chooses the bits of integer"),
    ],
)
def test_wrong_formats_are_refused_in_one_line(options, message, folder):
    code, _, err = invoke("quantize", folder / "model", "-o", folder / "bad", *options)
    assert code in (1, 2)
    assert message in " ".join(err.split())
    assert not (folder / "bad").exists()
