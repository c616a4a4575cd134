"""Single-file checkpoints are read with all tensors checked, or refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.original_layout import write
from tests.families.pipelines import build
from trtq.artefact.opened import open_artefact
from trtq.diffusion.loading import open_pipeline
from trtq.errors import ArtefactError, NonFiniteError, TrtqError, UsageError

NAMES = ("sd_1", "sd_xl")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
UNET = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
VAE = "first_stage_model.decoder.mid.block_1.conv1.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pipelines, folders of their configurations without weights, and single files, by name."""
    place = tmp_path_factory.mktemp("single")
    pipelines = {}
    for name in NAMES:
        pipelines[name] = build(name)
        pipelines[name].save_pretrained(place / name)
        for file in (place / name).rglob("*.safetensors"):
            file.unlink()
        write(pipelines[name], place / f"{name}.safetensors")
    return place, pipelines


@pytest.fixture
def damaged(made, tmp_path):
    """A function that writes a Stable Diffusion 1 file with changed tensors."""
    place, pipelines = made

    def write_changed(change):
        write(pipelines["sd_1"], tmp_path / "changed.safetensors", change)
        return tmp_path / "changed.safetensors", place / "sd_1"

    return write_changed


def refusal(file, config=None, error=TrtqError):
    with pytest.raises(error) as caught:
        open_pipeline(file, config)
    message = str(caught.value)
    assert "\n" not in message
    assert type(caught.value) is not TrtqError
    return message


@pytest.mark.parametrize("name", NAMES)
def test_a_single_file_gives_the_pipeline_that_it_was_written_from(name, made):
    place, pipelines = made
    loaded = open_pipeline(place / f"{name}.safetensors", place / name)
    assert type(loaded.pipeline) is type(pipelines[name])
    for part in PARTS:
        expected = getattr(pipelines[name], part, None)
        if expected is None:
            continue
        state = getattr(loaded.pipeline, part).state_dict()
        assert state.keys() == expected.state_dict().keys()
        assert all(torch.equal(t, state[n]) for n, t in expected.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_single_file_draws_what_its_pipeline_draws(name, made):
    place, pipelines = made
    loaded = open_pipeline(place / f"{name}.safetensors", str(place / name), recorded=True)
    images = []
    for pipeline in (pipelines[name], loaded.pipeline):
        pipeline.set_progress_bar_config(disable=True)
        options = {"height": 16, "width": 16, "output_type": "pt"}
        generator = torch.Generator().manual_seed(3)
        images.append(pipeline("a", num_inference_steps=2, generator=generator, **options).images)
    assert torch.equal(*images)


def test_the_tensors_equal_those_of_diffusers_own_loader(made):
    from diffusers import StableDiffusionPipeline

    place, _ = made
    file, folder = place / "sd_1.safetensors", place / "sd_1"
    theirs = StableDiffusionPipeline.from_single_file(str(file), config=str(folder))
    ours = open_pipeline(file, folder).pipeline
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(theirs, part).state_dict()
        assert all(torch.equal(t, expected[n]) for n, t in getattr(ours, part).state_dict().items())


MISSING = {
    UNET: "down_blocks.0.resnets.0.conv1.weight",
    TEXT: "layers.0.mlp.fc1.weight",
    VAE: "decoder.mid_block.resnets.0.conv1.weight",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_tensor_is_named(name, damaged):
    message = refusal(*damaged(lambda tensors: tensors.pop(name)), ArtefactError)
    assert "1 are missing" in message
    assert MISSING[name] in message


@pytest.mark.parametrize("name", [UNET, TEXT, VAE])
def test_an_unexpected_tensor_is_named(name, damaged):
    stray = name.replace("weight", "of_another")
    message = refusal(
        *damaged(lambda tensors: tensors.update({stray: torch.zeros(2)})), ArtefactError
    )
    assert stray in message


@pytest.mark.parametrize("name", [UNET, TEXT, VAE])
def test_a_tensor_of_another_shape_is_named(name, damaged):
    def change(tensors):
        tensors[name] = torch.zeros(*tensors[name].shape, 2)

    message = refusal(*damaged(change), ArtefactError)
    assert "have another shape" in message
    assert ", 2), expected" in message


@pytest.mark.parametrize("name", [UNET, TEXT, VAE])
def test_a_tensor_that_is_not_finite_is_named(name, damaged):
    message = refusal(*damaged(lambda t: t[name].view(-1)[3:4].fill_(torch.nan)), NonFiniteError)
    assert "holds NaN" in message


def test_quantised_weights_are_refused(damaged):
    def change(tensors):
        tensors[UNET] = tensors[UNET].to(torch.int8)

    assert "not floating-point" in refusal(*damaged(change), ArtefactError)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_file_in_half_precision_is_read_as_float32(dtype, made, damaged):
    def change(tensors):
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.to(dtype)

    _, pipelines = made
    loaded = open_pipeline(*damaged(change))
    for part in ("unet", "vae", "text_encoder"):
        state = getattr(loaded.pipeline, part).state_dict()
        for name, tensor in getattr(pipelines["sd_1"], part).state_dict().items():
            assert torch.equal(state[name], tensor.to(dtype).to(tensor.dtype))


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_component_that_the_file_lacks_comes_from_the_folder(part, made, tmp_path):
    place, pipelines = made
    prefix = {"vae": "first_stage_model.", "text_encoder": "cond_stage_model."}[part]

    def change(tensors):
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    file = tmp_path / "changed.safetensors"
    write(pipelines["sd_1"], file, change)
    message = refusal(file, place / "sd_1", ArtefactError)
    assert f"no tensors of the component {part!r}" in message
    folder = shutil.copytree(place / "sd_1", tmp_path / "folder")
    getattr(pipelines["sd_1"], part).save_pretrained(folder / part)
    state = getattr(open_pipeline(file, folder).pipeline, part).state_dict()
    expected = getattr(pipelines["sd_1"], part).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items())


def test_a_file_without_the_denoiser_is_refused(damaged):
    def change(tensors):
        for name in [name for name in tensors if name.startswith("model.diffusion_model.")]:
            del tensors[name]

    message = refusal(*damaged(change), ArtefactError)
    assert "'unet'" in message
    assert "--config" in message


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_another_architecture_is_refused(name, made):
    place, _ = made
    other = next(n for n in NAMES if n != name)
    message = refusal(place / f"{name}.safetensors", place / other, ArtefactError)
    assert "unet" in message
    assert "--config" in message


def test_without_a_configuration_the_message_names_the_hub_id(made, damaged):
    """The tensor decides that diffusers takes the file for Stable Diffusion 1."""
    key = "model.diffusion_model.output_blocks.11.0.skip_connection.weight"
    file, _ = damaged(lambda tensors: tensors.update({key: torch.zeros(2)}))
    message = refusal(file, None, ArtefactError)
    assert "'stable-diffusion-v1-5/stable-diffusion-v1-5'" in message
    assert "--config FOLDER" in message


def test_an_unknown_layout_is_refused(tmp_path):
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    message = refusal(tmp_path / "x.safetensors", None, ArtefactError)
    assert "does not know the architecture of the single-file checkpoint" in message
    assert "'a.weight'" in message


@pytest.mark.parametrize(
    "config", ["owner/none-of-this-name", "none", "a/b/c", "a\0b", ""], ids=repr
)
def test_a_configuration_that_does_not_exist_is_refused(config, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(made[0] / "sd_1.safetensors", config, ArtefactError)
    assert "config" in message


def test_a_configuration_of_a_folder_or_an_object_is_refused(made, tmp_path):
    place, pipelines = made
    for model in (place / "sd_1", pipelines["sd_1"], tmp_path / "none.safetensors"):
        assert "configures a single-file checkpoint" in refusal(model, place / "sd_1", UsageError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"\x80\x02}q\x00." * 20, "pickle"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00" + b"{" * 16, "header is damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 12\n", "Git LFS pointer"),
        (b"<!doctype html><html>" * 9, "text"),
    ],
    ids=["empty", "pickle", "gguf", "header", "pointer", "page"],
)
def test_a_damaged_file_is_refused(content, message, made, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    assert message in refusal(tmp_path / "x.safetensors", made[0] / "sd_1", ArtefactError)


def test_a_truncated_file_is_refused(made, tmp_path):
    data = (made[0] / "sd_1.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:-100])
    assert "cut short" in refusal(tmp_path / "x.safetensors", made[0] / "sd_1", ArtefactError)


def test_a_folder_in_place_of_a_file_is_refused(made, tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    assert "holds no model_index.json" in refusal(tmp_path / "x.safetensors")
    assert "configures a single-file" in refusal(tmp_path / "x.safetensors", made[0] / "sd_1")


def test_a_lora_is_refused_as_a_model(tmp_path):
    save_file({"unet.x.lora_A.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert "--lora" in refusal(tmp_path / "x.safetensors", None, ArtefactError)


def test_one_transformer_in_diffusers_names_is_read_with_the_other_parts_of_a_folder(tmp_path):
    pipeline = build("flux")
    pipeline.save_pretrained(tmp_path / "folder")
    stored = tmp_path / "folder/transformer/diffusion_pytorch_model.safetensors"
    changed = {name: tensor + 1 for name, tensor in load_file(stored).items()}
    stored.unlink()
    save_file(changed, tmp_path / "x.safetensors")
    state = open_pipeline(tmp_path / "x.safetensors", tmp_path / "folder").denoiser.state_dict()
    assert state.keys() == changed.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in changed.items())


def test_an_opened_artefact_carries_the_configuration(made, tmp_path):
    place, _ = made
    opened = open_artefact(place / "sd_1.safetensors", config=place / "sd_1")
    assert opened.kind == "checkpoint"
    assert opened.config == place / "sd_1"


def test_the_command_line_takes_a_single_file(made):
    from typer.testing import CliRunner

    from trtq.cli import app

    place, pipelines = made
    arguments = [str(place / "sd_1.safetensors"), "--config", str(place / "sd_1")]
    result = CliRunner().invoke(app, ["inspect", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["parameters"] == sum(p.numel() for p in pipelines["sd_1"].unet.parameters())
    assert record["source"] == arguments[0]
