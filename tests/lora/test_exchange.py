"""LoRAs in quantised models: merged before quantisation, and exchanged in a finished run."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import tiny_pipeline
from tests.families import pipelines
from tests.lora.merged_by_diffusers import by_diffusers, matrices, write
from trtq.artefact.opened import open_folder
from trtq.bench.artefacts import find_checkpoint
from trtq.diffusion.loading import open_pipeline
from trtq.errors import ArtefactError, UsageError
from trtq.lora import LoraRequest
from trtq.runs.exchange_loras import _snr, requantize
from trtq.runs.folder import open_run
from trtq.runs.quantize import quantize

TARGETS = ("mid_block.attentions.0.to_q", "mid_block.resnets.0.conv1")
RANK = 2
MINMAX = {"method": "minmax", "steps": 4, "calibration": {"images": 4}}

pytestmark = [
    # transformers and PEFT emit these warnings while they load adapters.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def updates(model, paths, name, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for path in paths:
        down, up = matrices(model.get_submodule(path), RANK, generator)
        key = name(path)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up * scale}
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    return tensors


def flat(prefix):
    return lambda path: prefix + path.replace(".", "_")


@pytest.fixture
def model(tmp_path):
    from diffusers import DDIMPipeline

    pipeline = tiny_pipeline()
    DDIMPipeline(pipeline.unet, pipeline.scheduler).save_pretrained(tmp_path / "model")
    write(tmp_path, updates(pipeline.unet, TARGETS, flat("lora_unet_")))
    return tmp_path / "model"


def recipe(base):
    return {
        "method": "efficientdm",
        "steps": 4,
        "calibration": {"images": 8, "samples_per_step": 256},
        "training": {"iterations": 3, "batch": 4, "rank": 4, "base": base},
    }


@pytest.mark.parametrize("base", [pytest.param("fp", marks=pytest.mark.slow), "int"])
def test_an_exchange_keeps_the_tables_and_recomputes_the_codes(base, model, tmp_path):
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
    assert open_folder(tmp_path / "styled").manifest.model_dump()["loras"] == result["loras"]


def test_an_already_merged_lora_is_refused(model, tmp_path):
    lora = LoraRequest(tmp_path / "style.safetensors", 0.5)
    quantize(model, MINMAX, tmp_path / "run", loras=[lora])
    assert open_folder(tmp_path / "run").manifest.loras[0].scale == 0.5
    with pytest.raises(UsageError, match="already merged"):
        requantize(tmp_path / "run", [lora], tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_changed_checkpoint_is_refused(model, tmp_path):
    quantize(model, MINMAX, tmp_path / "run")
    (model / "unet" / "config.json").write_text((model / "unet" / "config.json").read_text() + "\n")
    with pytest.raises(ArtefactError, match=r"have changed: unet/config\.json"):
        requantize(
            tmp_path / "run", [LoraRequest(tmp_path / "style.safetensors")], tmp_path / "new"
        )


def test_a_checkpoint_with_changed_metadata_is_accepted(model, tmp_path):
    (model / "README.md").write_text("about it")
    quantize(model, MINMAX, tmp_path / "run")
    assert set(open_folder(tmp_path / "run").manifest.source.files) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    (model / "README.md").write_text("more about it")
    for name in (".git/HEAD", ".DS_Store", "unet/.DS_Store", "samples/cat.png", "LICENSE"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("x")
    assert find_checkpoint(tmp_path / "run", open_folder(tmp_path / "run").manifest) is not None
    lora = LoraRequest(tmp_path / "style.safetensors")
    requantize(tmp_path / "run", [lora], tmp_path / "new", base=model)
    assert (tmp_path / "new" / "manifest.json").is_file()


def test_a_changed_readme_or_repository_is_accepted(model, tmp_path):
    notes = [model / name for name in ("README.md", ".git/index", "unet/README.md", "LICENSE.txt")]
    for note in notes:
        note.parent.mkdir(exist_ok=True)
        note.write_text("before")
    quantize(model, MINMAX, tmp_path / "run")
    for note in notes:
        note.write_text("after")
    lora = LoraRequest(tmp_path / "style.safetensors")
    assert requantize(tmp_path / "run", [lora], tmp_path / "new")["loras"][0]["modules"] == 2


DECOMPOSED = {
    "method": "minmax",
    "bits": "w8a8",
    "steps": 2,
    "split_skips": True,
    "attention": {"quantize": True},
    "calibration": {"images": 2, "samples_per_step": 64},
}
UNET = (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    "up_blocks.0.resnets.0.conv1",
    "up_blocks.1.resnets.0.conv_shortcut",
)
# diffusers reads a text encoder's layers from kohya's files only if `out_proj` is among them.
TEXT = (
    "encoder.layers.0.self_attn.q_proj",
    "encoder.layers.0.self_attn.out_proj",
    "encoder.layers.1.mlp.fc1",
)


@pytest.fixture(scope="module")
def decomposed_folder(tmp_path_factory):
    """A run with decomposed attention and split skip convolutions, its checkpoint, and a LoRA."""
    folder = tmp_path_factory.mktemp("decomposed")
    pipe = pipelines.build("sd_1")
    pipe.save_pretrained(folder / "model")
    tensors = updates(pipe.unet, UNET, flat("lora_unet_"), scale=5.0)
    tensors |= updates(pipe.text_encoder, TEXT, flat("lora_te_text_model_"), scale=5.0)
    write(folder, tensors)
    quantize(folder / "model", DECOMPOSED, folder / "run")
    structure = open_folder(folder / "run").manifest.structure
    assert structure.splits
    assert structure.attention
    return folder


def assert_is_diffusers_merge(out, lora, scale):
    """Assert that a run draws like diffusers' merge and contains its text encoder."""
    pipe = pipelines.build("sd_1")
    start = pipelines.build("sd_1").unet
    expected = by_diffusers(pipe, [(lora, scale)])
    run = open_run(out)
    source = open_pipeline(pipe)
    assert _snr(source, run.denoiser(), source.denoiser, 2) > 20
    assert _snr(source, start, source.denoiser, 2) < 16
    text_weights = load_file(out / "text_encoder" / "model.safetensors")
    for key in (key for key in expected if key.startswith("text_encoder.")):
        name = key.removeprefix("text_encoder.")
        kept = next(
            (text_weights[k] for k in (name, f"text_model.{name}") if k in text_weights), None
        )
        assert kept is not None, key
        torch.testing.assert_close(kept.float(), expected[key], rtol=1e-6, atol=0)


def test_a_lora_is_merged_before_the_model_is_decomposed(decomposed_folder):
    lora = decomposed_folder / "style.safetensors"
    out = decomposed_folder / "styled"
    quantize(decomposed_folder / "model", DECOMPOSED, out, loras=[LoraRequest(lora, 0.7)])
    assert_is_diffusers_merge(out, lora, 0.7)


def test_a_lora_is_exchanged_in_a_decomposed_run(decomposed_folder):
    lora = decomposed_folder / "style.safetensors"
    out = decomposed_folder / "exchanged"
    result = requantize(decomposed_folder / "run", [LoraRequest(lora, 0.7)], out)
    assert result["loras"][0]["modules"] == len(UNET) + len(TEXT)
    assert_is_diffusers_merge(out, lora, 0.7)


def test_a_lora_that_does_not_fit_leaves_no_run(decomposed_folder, tmp_path):
    tensors = {
        "unet.nowhere.lora_A.weight": torch.ones(2, 4),
        "unet.nowhere.lora_B.weight": torch.ones(4, 2),
    }
    lora = write(tmp_path, tensors, "other.safetensors")
    with pytest.raises(ArtefactError, match="another architecture"):
        requantize(decomposed_folder / "run", [LoraRequest(lora)], tmp_path / "new")
    assert not (tmp_path / "new").exists()
