"""Users' LoRAs: read in every layout, merged exactly, refused when they do not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import tiny_pipeline
from trtq.errors import ArtefactError, NonFiniteError, UsageError
from trtq.lora import LoraRequest, merge_loras, parse_lora, read_lora
from trtq.manifest import read_manifest
from trtq.stages.bench_targets import find_checkpoint
from trtq.stages.quantize import quantize
from trtq.stages.requantize import requantize

TARGETS = ("mid_block.attentions.0.to_q", "mid_block.resnets.0.conv1")
RANK = 2


def matrices(unet):
    """down[R, K, ...] and up[N, R, ...] of each target."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for path in TARGETS:
        weight = unet.get_submodule(path).weight
        down = torch.randn((RANK, *weight.shape[1:]), generator=generator) * 0.1
        up = torch.randn((len(weight), RANK, *(1,) * (weight.ndim - 2)), generator=generator) * 0.1
        found[path] = down, up
    return found


def layout(name, unet, alpha):
    tensors = {}
    for path, (down, up) in matrices(unet).items():
        if name == "peft":
            tensors |= {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}
            tensors[f"unet.{path}.alpha"] = torch.tensor(alpha)
        elif name == "diffusers-old":
            tensors |= {f"unet.{path}.lora.down.weight": down, f"unet.{path}.lora.up.weight": up}
            tensors[f"unet.{path}.alpha"] = torch.tensor(alpha)
        elif name == "bare":
            tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
            tensors[f"{path}.alpha"] = torch.tensor(alpha)
        else:
            key = f"lora_unet_{path.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.mark.parametrize("name", ["peft", "diffusers-old", "bare", "kohya"])
def test_every_layout_gives_the_same_weights(name, tmp_path):
    unet = tiny_pipeline().unet
    path = tmp_path / "style.safetensors"
    save_file(layout(name, unet, alpha=4.0), path)
    expected = {
        target: unet.get_submodule(target).weight.detach()
        + 0.5
        * 4.0
        / RANK
        * torch.einsum("or...,r...->o...", up.flatten(1), down.flatten(1)).reshape(
            unet.get_submodule(target).weight.shape
        )
        for target, (down, up) in matrices(unet).items()
    }
    (merged,) = merge_loras({"unet": unet}, [LoraRequest(path, 0.5)])
    assert (merged.file, merged.scale, merged.modules) == ("style.safetensors", 0.5, 2)
    for target, weight in expected.items():
        torch.testing.assert_close(unet.get_submodule(target).weight.detach(), weight)


def test_alpha_in_the_metadata_counts(tmp_path):
    unet = tiny_pipeline().unet
    path = tmp_path / "style.safetensors"
    tensors = {k: v for k, v in layout("peft", unet, 1.0).items() if not k.endswith("alpha")}
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6})})
    assert {update.factor for update in read_lora(path).updates.values()} == {6 / RANK}


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [("a.safetensors", "a.safetensors", 1.0), ("b/a.safetensors:0.7", "b/a.safetensors", 0.7)],
)
def test_requests(text, path, scale):
    request = parse_lora(text)
    assert (str(request.path), request.scale) == (path, scale)


@pytest.mark.parametrize("text", ["a.safetensors:strong", "a.safetensors:nan", "a.safetensors:"])
def test_requests_that_are_refused(text):
    with pytest.raises(UsageError, match="is not a number"):
        parse_lora(text)


def damaged(kind, unet, path):
    tensors = layout("peft", unet, 1.0)
    first = f"unet.{TARGETS[0]}"
    if kind == "pickle":
        torch.save(tensors, path)
        return
    if kind == "nan":
        tensors[f"{first}.lora_A.weight"][0, 0] = torch.nan
    elif kind == "architecture":
        tensors = {key.replace("mid_block", "middle"): value for key, value in tensors.items()}
    elif kind == "shape":
        tensors[f"{first}.lora_A.weight"] = torch.zeros(RANK, 7)
    elif kind == "half":
        del tensors[f"{first}.lora_B.weight"]
    elif kind == "loha":
        tensors["lora_unet_x.hada_w1_a"] = torch.zeros(2, 2)
    elif kind == "rank":
        tensors[f"{first}.lora_B.weight"] = torch.zeros(4, RANK + 1)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("pickle", ArtefactError, "not a safetensors file"),
        ("nan", NonFiniteError, "NaN or infinity"),
        ("architecture", ArtefactError, "another architecture"),
        ("shape", ArtefactError, "does not fit"),
        ("half", ArtefactError, "only one of its two"),
        ("loha", ArtefactError, "not part of a plain LoRA"),
        ("rank", ArtefactError, "do not fit each other"),
        ("missing", ArtefactError, "there is no LoRA file"),
    ],
)
def test_files_that_are_refused_change_nothing(kind, error, message, tmp_path):
    unet = tiny_pipeline().unet
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_file(layout("kohya", unet, 1.0), good)
    if kind != "missing":
        damaged(kind, unet, bad)
    before = {name: p.clone() for name, p in unet.named_parameters()}
    with pytest.raises(error, match=message):
        merge_loras({"unet": unet}, [LoraRequest(good), LoraRequest(bad)])
    assert all(torch.equal(before[name], p) for name, p in unet.named_parameters())


def test_the_same_file_twice_is_refused(tmp_path):
    unet = tiny_pipeline().unet
    path = tmp_path / "a.safetensors"
    save_file(layout("kohya", unet, 1.0), path)
    with pytest.raises(UsageError, match="given twice"):
        merge_loras({"unet": unet}, [LoraRequest(path), LoraRequest(path, 0.5)])


@pytest.fixture
def model(tmp_path):
    from diffusers import DDIMPipeline

    pipeline = tiny_pipeline()
    DDIMPipeline(pipeline.unet, pipeline.scheduler).save_pretrained(tmp_path / "model")
    save_file(layout("kohya", pipeline.unet, 1.0), tmp_path / "style.safetensors")
    return tmp_path / "model"


def recipe(base):
    return {
        "method": "efficientdm",
        "steps": 4,
        "calibration": {"images": 8, "samples_per_step": 256},
        "training": {"iterations": 3, "batch": 4, "rank": 4, "base": base},
    }


@pytest.mark.parametrize("base", ["fp", "int"])
def test_swapping_keeps_the_tables_and_recomputes_the_codes(base, model, tmp_path):
    lora = tmp_path / "style.safetensors"
    quantize(model, recipe(base), tmp_path / "run")
    nothing = requantize(tmp_path / "run", [LoraRequest(lora, 0.0)], tmp_path / "nothing")
    result = requantize(tmp_path / "run", [LoraRequest(lora)], tmp_path / "styled")
    run, same, styled = (
        load_file(tmp_path / name / "quantized.safetensors")
        for name in ("run", "nothing", "styled")
    )
    assert all(torch.equal(run[key], same[key]) for key in run)
    changed = {key.split(":")[1] for key in run if not torch.equal(run[key], styled[key])}
    assert changed == set(TARGETS)
    assert nothing["snr_db_after"] == pytest.approx(nothing["snr_db_before"], abs=0.01)
    assert result["loras"][0]["modules"] == len(TARGETS)
    assert read_manifest(tmp_path / "styled").loras == result["loras"]


def test_a_lora_that_is_merged_already_is_refused(model, tmp_path):
    lora = LoraRequest(tmp_path / "style.safetensors", 0.5)
    quantize(model, {"method": "minmax", "steps": 4}, tmp_path / "run", loras=[lora])
    assert read_manifest(tmp_path / "run").loras[0]["scale"] == 0.5
    with pytest.raises(UsageError, match="already merged"):
        requantize(tmp_path / "run", [lora], tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_changed_checkpoint_is_refused(model, tmp_path):
    quantize(model, {"method": "minmax", "steps": 4}, tmp_path / "run")
    (model / "unet" / "config.json").write_text((model / "unet" / "config.json").read_text() + "\n")
    with pytest.raises(ArtefactError, match="have changed"):
        requantize(
            tmp_path / "run", [LoraRequest(tmp_path / "style.safetensors")], tmp_path / "new"
        )


def test_a_checkpoint_whose_bookkeeping_changed_is_still_the_same(model, tmp_path):
    (model / "README.md").write_text("about it")
    quantize(model, {"method": "minmax", "steps": 4}, tmp_path / "run")
    assert set(read_manifest(tmp_path / "run").source.files) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    (model / "README.md").write_text("more about it")
    for name in (".git/HEAD", ".DS_Store", "unet/.DS_Store", "samples/cat.png", "LICENSE"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("x")
    assert find_checkpoint(tmp_path / "run", read_manifest(tmp_path / "run")) is not None
    lora = LoraRequest(tmp_path / "style.safetensors")
    requantize(tmp_path / "run", [lora], tmp_path / "new", base=model)
    assert (tmp_path / "new" / "manifest.json").is_file()


def test_kohya_names_reach_the_text_encoder(tmp_path):
    encoder = nn.Module()
    encoder.text_model = nn.Module()
    encoder.text_model.q_proj = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(encoder.text_model.q_proj.weight)
    path = tmp_path / "te.safetensors"
    tensors = {
        "lora_te_text_model_q_proj.lora_down.weight": torch.ones(1, 4),
        "lora_te_text_model_q_proj.lora_up.weight": torch.ones(4, 1),
    }
    save_file(tensors, path)
    merge_loras({"unet": nn.Linear(2, 2), "text_encoder": encoder}, [LoraRequest(path, 2.0)])
    assert bool((encoder.text_model.q_proj.weight == 2.0).all())
