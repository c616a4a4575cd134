"""Artefacts with edited documents: opening raises an error if they do not match the weights."""

import hashlib
import itertools
import json
import shutil
from typing import Any

import pytest

from trtq.artefact.graph_metadata import check_layers, check_timesteps, free_sizes
from trtq.artefact.opened import open_folder
from trtq.checkpoint.layout import read_index, read_null_class, read_scheduler
from trtq.diffusion.folder import load_pipeline_parts, skeleton
from trtq.errors import ArtefactError, TrtqError, UsageError
from trtq.pipelines.draw import conditioning_for
from trtq.pipelines.inspect import inspect
from trtq.pipelines.open import open_any
from trtq.pipelines.sheet import check_sheet
from trtq.runs.folder import open_run


def edited(folder, target, change, file="manifest.json"):
    """A copy with one changed document and recomputed hashes."""
    copy = target / "copy"
    shutil.copytree(folder, copy)
    record = json.loads((copy / file).read_text())
    record = change(record) or record
    (copy / file).write_text(json.dumps(record))
    if file != "manifest.json":
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["files"][file] = hashlib.sha256((copy / file).read_bytes()).hexdigest()
        (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def layer(path, **changes):
    def change(manifest):
        (row,) = [row for row in manifest["layers"] if row["name"] == path]
        row.update(changes)

    return change


def rename(manifest):
    layer("conv_in", name="conv_other")(manifest)


def drop(manifest):
    manifest["layers"] = [row for row in manifest["layers"] if row["name"] != "conv_in"]


def surplus(manifest):
    manifest["layers"].append(manifest["layers"][0] | {"name": "conv_other"})


def without_bits(manifest):
    layer("conv_in", weight_bits=None, activation_bits=None)(manifest)


PRODUCT = {"kind": "product", "weight_bits": None, "activation_bits": 4, "right_bits": 4}


def share(manifest):
    """Let a layer use the quantiser of an earlier layer of equal bits, but another input."""
    fields = ("kind", "activation_bits", "format", "smooth", "rotate", "scales")
    rows = [r for r in manifest["layers"] if r["kind"] == "conv2d" and r["input_of"] is None]
    owner, row = next(
        (first, second)
        for first, second in itertools.combinations(rows, 2)
        if all(first[field] == second[field] for field in fields)
    )
    row["input_of"] = owner["name"]


EDITS = {
    "fewer timesteps": (lambda m: m.update(timesteps=m["timesteps"][:3]), "timesteps"),
    "more timesteps": (lambda m: m.update(timesteps=[*m["timesteps"], 999.0]), "timesteps"),
    "other timesteps": (
        lambda m: m.update(timesteps=[1.0, 2.0, 3.0, 4.0]),
        "calibrated at the timesteps",
    ),
    "activation bits": (layer("conv_in", activation_bits=4), "'conv_in': the manifest says 4 bits"),
    "weight bits": (layer("conv_in", weight_bits=4), "'conv_in': the manifest says 4 bits"),
    # A single 4-bit code takes a byte, like an 8-bit code.
    "bits of one channel": (layer("conv_out", weight_bits=7), "'conv_out': the manifest says w7a8"),
    "product": (layer("conv_in", **PRODUCT), "'conv_in': the manifest says 'product'"),
    "linear": (layer("conv_in", kind="linear"), "'conv_in': the manifest says 'linear'"),
    "unknown": (rename, "'conv_other': the denoiser has none"),
    "surplus": (surplus, "'conv_other': the denoiser has none"),
    "dropped": (drop, "no row for the layer 'conv_in'"),
    "float": (without_bits, "conv_in"),
    "shared": (share, "the manifest says that it has the input of"),
    "structure": (
        lambda m: m["structure"].update(attention=["conv_in"]),
        "'conv_in' is not an attention module",
    ),
    "split": (lambda m: m["structure"].update(splits={"conv_in": 5}), "cannot split"),
    "denoiser": (lambda m: m.update(denoiser="transformer"), "names no 'transformer'"),
}


@pytest.mark.parametrize(("change", "message"), EDITS.values(), ids=EDITS.keys())
def test_a_manifest_that_does_not_fit_the_weights_is_refused(digits_run, tmp_path, change, message):
    copy = edited(digits_run, tmp_path, change)
    open_folder(copy)
    for opened in (open_run, inspect):
        with pytest.raises(TrtqError, match=message) as caught:
            opened(copy)
        assert "\n" not in str(caught.value)


ENTRIES = {
    "four": lambda index: index.update(scheduler=["diffusers", "DDIMScheduler", "x", "y"]),
    "one": lambda index: index.update(scheduler=["diffusers"]),
    "none": lambda index: index.update(scheduler=[]),
    "numbers": lambda index: index.update(scheduler=[1, 2]),
    "nested": lambda index: index.update(unet=[["diffusers"], {"a": 1}]),
    "half": lambda index: index.update(scheduler=["diffusers", None]),
    "path": lambda index: index.update({"../x": ["diffusers", "DDIMScheduler"]}),
    "class path": lambda index: index.update(scheduler=["diffusers", "../x"]),
    "no class": lambda index: index.pop("_class_name"),
    "class number": lambda index: index.update(_class_name=7),
    "class list": lambda index: index.update(_class_name=["DDIMPipeline"]),
    "list": lambda index: [index],
}


@pytest.mark.parametrize("change", ENTRIES.values(), ids=ENTRIES.keys())
def test_a_malformed_index_is_refused(digits_run, tmp_path, change):
    copy = edited(digits_run, tmp_path, change, "model_index.json")
    with pytest.raises(ArtefactError, match=r"model_index\.json") as caught:
        read_index(copy)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtefactError):
        open_run(copy)


CLASSES = {
    "no model": lambda index: index.update(unet=["diffusers", "DDIMScheduler"]),
    "no class": lambda index: index.update(unet=["diffusers", "logging"]),
    "a function": lambda index: index.update(unet=["diffusers", "is_torch_available"]),
    "elsewhere": lambda index: index.update(unet=["os", "path"]),
    "nothing": lambda index: index.update(unet=[None, None]),
    "a number": lambda index: index.update(unet=5),
    "no pipeline": lambda index: index.update(_class_name="DDIMScheduler"),
    "a module": lambda index: index.update(_class_name="logging"),
    "scheduler elsewhere": lambda index: index.update(scheduler=["os", "path"]),
    "scheduler module": lambda index: index.update(scheduler=["diffusers", "logging"]),
    "scheduler unknown": lambda index: index.update(scheduler=["diffusers", "Unknown"]),
    "scheduler a model": lambda index: index.update(scheduler=["diffusers", "UNet2DModel"]),
}


@pytest.mark.parametrize("change", CLASSES.values(), ids=CLASSES.keys())
def test_an_invalid_component_class_is_refused(digits_run, tmp_path, change):
    copy = edited(digits_run, tmp_path, change, "model_index.json")
    with pytest.raises(ArtefactError) as caught:
        load_pipeline_parts(copy, {"unet": skeleton(copy, "unet")})
    assert "\n" not in str(caught.value)


WRONG_SETTINGS: dict[str, list[Any]] = {
    "num_train_timesteps": ["x", None, -1, 1e9, 0, 10**12, True, [1000]],
    "steps_offset": ["x", None, -1, 1e9],
    "beta_start": ["x", None, -0.1, 2, float("nan"), float("inf"), []],
    "clip_sample": ["x", 1, []],
    "clip_sample_range": ["x", None, 0, float("inf")],
    "trained_betas": ["x", [2.0], [None]],
    "prediction_type": [5, [], "x" * 1000],
    "timestep_spacing": [{"a": 1}],
}
SETTINGS = [(key, value) for key, values in WRONG_SETTINGS.items() for value in values]


@pytest.mark.parametrize(("key", "value"), SETTINGS)
def test_settings_of_a_scheduler_have_types_and_ranges(digits_run, tmp_path, key, value):
    file = "scheduler/scheduler_config.json"
    copy = edited(digits_run, tmp_path, lambda config: config.update({key: value}), file)
    with pytest.raises(ArtefactError, match=key):
        read_scheduler(copy)
    with pytest.raises(ArtefactError, match=key):
        load_pipeline_parts(copy, {"unet": skeleton(copy, "unet")})


def test_settings_that_diffusers_writes_are_read(digits_run, tmp_path):
    file = "scheduler/scheduler_config.json"
    more = {"lambda_min_clipped": -float("inf"), "sigma_max": None, "solver_order": 2}
    copy = edited(digits_run, tmp_path, lambda config: config.update(more), file)
    assert read_scheduler(copy)["lambda_min_clipped"] == -float("inf")


@pytest.mark.parametrize("value", [100_000, 11, -1, 10**30, True, 1.0, "x", [], {}])
def test_a_null_class_that_the_model_does_not_have_is_refused(digits_run, tmp_path, value):
    copy = edited(digits_run, tmp_path, lambda _: {"null_class": value}, "classes.json")
    with pytest.raises(ArtefactError, match=r"null_class|64 bits"):
        open_run(copy).source()
    if value in (100_000, 11):
        assert read_null_class(copy) == value


def test_a_graph_whose_manifest_was_edited_is_refused(digits_onnx, tmp_path):
    def other(manifest):
        manifest["timesteps"][0] = 0.5

    copy = edited(digits_onnx, tmp_path, other)
    for opened in (open_any, inspect):
        with pytest.raises(ArtefactError, match="calibrated at the timesteps"):
            opened(copy)
    shutil.rmtree(copy)
    copy = edited(digits_onnx, tmp_path, layer("conv_in", weight_bits=5))
    for opened in (open_any, inspect):
        with pytest.raises(ArtefactError, match="'conv_in': the manifest says 'conv2d w5a8'"):
            opened(copy)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "[2, 1]", '["a"]', "[NaN]", "[true]", "{}"]
)
def test_damaged_metadata_of_a_graph_is_refused(text):
    with pytest.raises(ArtefactError, match=r"trtq\.timesteps is damaged"):
        check_timesteps({"trtq.timesteps": text}, [1.0])
    if text != "{}":
        with pytest.raises(ArtefactError, match=r"trtq\.layers is damaged"):
            check_layers({"trtq.layers": text}, {})
    with pytest.raises(ArtefactError, match=r"trtq\.latent_sizes is damaged"):
        free_sizes({"trtq.latent_sizes": text})


@pytest.mark.parametrize("low", [[0, 1], [8], [16, 16], "x", [1e9, 1], [10**12, 1]])
def test_sizes_of_a_graph_are_checked(low):
    text = json.dumps({"low": low, "high": [8, 8], "cell": 1})
    with pytest.raises(ArtefactError, match=r"trtq\.latent_sizes is damaged"):
        free_sizes({"trtq.latent_sizes": text})


def test_numbers_of_images_and_classes_are_bounded(tiny):
    for count in (0, -1, 10**9, 10**30):
        with pytest.raises(UsageError, match=r"1 \.\. 100000"):
            conditioning_for(tiny, count)
    for label in (-1, 3, 10**30):
        with pytest.raises(UsageError, match=r"0 \.\. 2"):
            conditioning_for(tiny, 1, class_label=label)
    check_sheet(128, 1024, 1024)
    with pytest.raises(UsageError, match="choose at most 128"):
        check_sheet(129, 1024, 1024)


@pytest.mark.parametrize(
    "size",
    [
        "1000000000x1000000000",
        "1099511627776x8",
        "8x",
        "8",
        "x8",
        "-8x8",
        "8x8x8",
        "1_0x8",
        "\uff18x8",
    ],
)
def test_sizes_out_of_range_are_refused(tiny, size):
    with pytest.raises(UsageError, match=r"HEIGHTxWIDTH in pixels, each in 1 \.\. 8192"):
        tiny.latents_of(size)


def test_sizes_far_beyond_the_model_are_refused(tiny):
    assert tiny.latents_of("128x128") == (128, 128)
    with pytest.raises(UsageError, match="up to 128x128, 16 times the size of its training"):
        tiny.latents_of("130x128")
