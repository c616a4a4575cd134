"""Generation through the pipeline's own call: the recorded call, the user's changes, and the files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.calls.inpainting import arguments
from trtq.calls.user_call import run_call
from trtq.errors import UsageError
from trtq.evaluation.evaluate import evaluate
from trtq.evaluation.gates import parse_gate
from trtq.pipelines.called import show_call
from trtq.pipelines.generate import generate
from trtq.pipelines.inspect import inspect
from trtq.pipelines.open import open_any
from trtq.png_text import read_texts


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def called(place, seed, index, **changes):
    """The picture of the pipeline's own call."""
    source = open_any(place)
    call = source.call.updated(changes)
    return np.asarray(run_call(source.pipeline, call, seed, "image", index).images[0])


def test_image_i_of_a_seed_is_that_of_the_recorded_call(inpainting_run, tmp_path):
    result = generate(inpainting_run, tmp_path / "out", images=2, seed=5)
    assert (result.images, result.steps, result.media) == (2, 2, None)
    assert result.prompts == ["a red circle"] * 2
    for index, file in enumerate(result.files):
        assert np.array_equal(pixels(file), called(inpainting_run, 5, index))


def test_options_call_and_inputs_change_the_recorded_call(inpainting_run, tmp_path):
    blue = Image.new("RGB", (16, 16), (0, 0, 250))
    file = tmp_path / "call.toml"
    file.write_text('prompt = "overridden"\nguidance_scale = 3.0\n')
    result = generate(
        inpainting_run,
        tmp_path / "out/",
        prompt="a blue square",
        call=file,
        inputs={"image": blue},
        steps=1,
    )
    changes = {"prompt": "a blue square", "guidance_scale": 3.0, "num_inference_steps": 1}
    expected = called(inpainting_run, 0, 0, image=blue, **changes)
    assert np.array_equal(pixels(result.files[0]), expected)
    assert not np.array_equal(expected, called(inpainting_run, 0, 0))
    facts = json.loads(read_texts(Path(result.files[0]).read_bytes())["trtq"])
    assert (facts["prompt"], facts["steps"], facts["guidance"]) == ("a blue square", 1, 3.0)
    assert (facts["width"], facts["height"], facts["seed"], facts["image"]) == (16, 16, 0, 0)


def test_the_batch_of_the_call_gives_more_images_per_call(inpainting_run, tmp_path):
    call = {"num_images_per_prompt": 2}
    result = generate(inpainting_run, tmp_path / "out", images=2, call=call)
    assert result.images == len(result.files) == 4


def test_a_sheet_holds_all_images(inpainting_run, tmp_path):
    generate(inpainting_run, tmp_path / "sheet.png", images=2)
    # Two pictures of 16 pixels, six times as large, with a gap of six pixels.
    assert pixels(tmp_path / "sheet.png").shape == (96, 198, 3)


def test_an_unknown_checkpoint_is_called_with_the_given_inputs(inpainting_model, tmp_path):
    inputs = {name: arguments()[name] for name in ("image", "mask_image", "height", "width")}
    result = generate(inpainting_model, tmp_path / "out", steps=2, prompt="a cat", inputs=inputs)
    assert (result.steps, result.prompts) == (2, ["a cat"])
    assert pixels(result.files[0]).shape == (16, 16, 3)


REFUSED = {
    "an option that it does not take": (
        {"class_label": 3},
        "a.png",
        "takes no class_labels, so --class-label has no effect",
    ),
    "an unknown argument": ({"call": {"strenght": 1}}, "a.png", "did you mean 'strength'"),
    "a generator": ({"call": {"generator": 1}}, "a.png", "comes from trtq"),
    "a wrong type": ({"call": {"strength": "much"}}, "a.png", "must be float, got 'much'"),
    "a video file": ({}, "a.gif", "returns images, which a.gif cannot hold"),
    "two results in one file": ({"images": 2}, "a.wav", "holds one result"),
    "an unknown suffix": ({}, "a.bmp", "--output must end in .png"),
    "no folder": ({}, "none/a.png", "does not exist"),
    "no images": ({"images": 0}, "a.png", "must be 1 .. "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_cannot_be_met_leaves_no_file(inpainting_run, tmp_path, case):
    options, name, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        generate(inpainting_run, tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_of_an_earlier_call_is_not_replaced(inpainting_run, tmp_path):
    (tmp_path / "image-0000.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists"):
        generate(inpainting_run, tmp_path)
    assert (tmp_path / "image-0000.png").read_bytes() == b"mine"


def test_the_shown_call_has_the_recorded_values(inpainting_run, inpainting_model):
    values = {row.name: row.value for row in show_call(inpainting_run).arguments}
    assert values["image"] == "picture 16x16 (WIDTHxHEIGHT)"
    assert values["num_inference_steps"] == "2"
    assert values["strength"] is None
    description = show_call(inpainting_model)
    assert (description.pipeline, description.recorded) == ("StableDiffusionInpaintPipeline", False)


def test_the_float_model_agrees_with_itself(inpainting_model):
    inputs = arguments()
    result = evaluate(inpainting_model, inpainting_model, images=2, inputs=inputs, steps=2)
    assert (result.psnr_db, result.ssim, result.frames) == (100.0, 1.0, 2)
    assert result.to_json()["passed"]


def test_a_run_is_compared_by_pixels_and_its_gates_are_checked(inpainting_run, inpainting_model):
    gates = (parse_gate("psnr_db>=5"), parse_gate("ssim>2"))
    result = evaluate(inpainting_run, inpainting_model, images=2, gates=gates)
    assert list(result.gates.values()) == [True, False]
    assert 5 < result.psnr_db < 100
    assert "pictures" not in result.to_json()


def test_metrics_of_features_are_refused_before_any_work(inpainting_run, inpainting_model):
    with pytest.raises(UsageError, match="fd<=1 cannot be checked"):
        evaluate(inpainting_run, inpainting_model, gates=(parse_gate("fd<=1"),))


def test_another_reference_is_refused(inpainting_run, tmp_path):
    with pytest.raises(UsageError, match="is of kind 'run'"):
        evaluate(inpainting_run, inpainting_run)


def test_inspection_names_the_recorded_denoisers(inpainting_run, inpainting_model):
    (denoiser,) = inspect(inpainting_run).denoisers
    assert (denoiser.name, denoiser.model) == ("unet", "UNet2DConditionModel")
    assert (denoiser.calls, denoiser.timestep, denoiser.graphs) == (2, "timestep", [])
    assert inspect(inpainting_model).denoiser == "UNet2DConditionModel"
