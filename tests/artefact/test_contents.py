"""The files of a pipeline's folder that a loader reads."""

import json
import os

import pytest

from trtq.artefact.contents import changed_source_file, source_hashes

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
}
OURS = (
    "model_index.json",
    "classes.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/spiece.model",
)
OTHERS = (
    "README.md",
    "manifest.json",
    "LICENSE",
    "cat.png",
    ".gitattributes",
    ".git/config",
    ".cache/huggingface/download/unet/config.json.metadata",
    "unet/.DS_Store",
    "unet/.ipynb_checkpoints/config.json",
    "unet/README.md",
    "samples/prompts.json",
    "v1-5-pruned.safetensors",
)


@pytest.fixture
def folder(tmp_path):
    for name in (*OURS, *OTHERS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    return tmp_path


def test_only_files_that_loaders_read_are_hashed(folder):
    assert set(source_hashes(folder)) == set(OURS)


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_may_be_changed_added_and_removed(name, folder):
    everything = dict.fromkeys(OTHERS, "0" * 64) | source_hashes(folder)
    (folder / name).write_text("changed")
    assert changed_source_file(folder, everything, all_there=True) is None
    (folder / name).unlink()
    assert changed_source_file(folder, everything, all_there=True) is None


@pytest.mark.parametrize("name", OURS[1:])
def test_a_hashed_file_may_not_change(name, folder):
    recorded = source_hashes(folder)
    (folder / name).write_text("changed")
    assert changed_source_file(folder, recorded, all_there=False) == name
    (folder / name).unlink()
    assert changed_source_file(folder, recorded, all_there=False) is None
    assert changed_source_file(folder, recorded, all_there=True) == name


def test_links_are_followed_but_not_in_circles(folder):
    (folder / "unet").rename(folder / "elsewhere")
    (folder / "unet").symlink_to("elsewhere")
    (folder / "elsewhere" / "up").symlink_to("..")
    for name, other in (("one", "two"), ("two", "one")):
        (folder / name).mkdir()
        (folder / name / "on").symlink_to(folder / other)
        (folder / "elsewhere" / name).symlink_to(folder / name)
    assert set(source_hashes(folder)) == set(OURS)


def test_pipes_are_not_opened(folder):
    os.mkfifo(folder / "unet" / "pipe.json")
    (folder / "classes.json").unlink()
    os.mkfifo(folder / "classes.json")
    assert set(source_hashes(folder)) == set(OURS) - {"classes.json"}


def test_a_byte_order_mark_in_the_index_does_not_hide_files(folder):
    index = folder / "model_index.json"
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    assert set(source_hashes(folder)) == set(OURS)
