"""The options `--call`, `--input` and `--show-call` on the command line."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.calls.inpainting import RECIPE, arguments
from trtq.calls.stored import CALL_FOLDER, load_call
from trtq.cli import app

INPUTS = {"image": "cat.png", "mask_image": "mask.png"}


def run(*texts):
    return CliRunner().invoke(app, [str(text) for text in texts])


def refused(result, message):
    """Exit code 2, and one line that holds the message."""
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.output


@pytest.fixture
def user(tmp_path):
    """A user's folder with a picture, a mask, a recipe and a call."""
    arguments()["image"].save(tmp_path / "cat.png")
    arguments()["mask_image"].save(tmp_path / "mask.png")
    recipe = {key: value for key, value in RECIPE.items() if key != "calibration"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in recipe.items()]
    (tmp_path / "recipe.toml").write_text("\n".join([*lines, "[calibration]", "images = 1\n"]))
    text = 'prompt = "a red circle"\nheight = 16\nwidth = 16\nimage = { file = "cat.png" }\n'
    (tmp_path / "call.toml").write_text(text)
    return tmp_path


def test_quantize_records_the_call_of_the_files(user, inpainting_model):
    mask = ("--input", f"mask_image={user / 'mask.png'}")
    options = ("--call", user / "call.toml", *mask)
    out = user / "run"
    made = run("quantize", inpainting_model, "-o", out, "--recipe", user / "recipe.toml", *options)
    assert made.exit_code == 0, made.output
    call = load_call(out / CALL_FOLDER)
    expected = arguments()
    assert call.arguments["prompt"] == expected["prompt"]
    assert call.steps == 2
    for name in ("image", "mask_image"):
        assert call.arguments[name].tobytes() == expected[name].tobytes()
    refused(run("quantize", inpainting_model, "-o", user / "x", "--dry-run", *options), "--dry-run")


def test_quantize_with_inputs_alone_chooses_a_prompt(user, inpainting_model):
    Image.new("RGB", (16, 16)).save(user / "cat.png")
    inputs = [f"--input={name}={user / file}" for name, file in INPUTS.items()]
    size = ("--size", "16x16", "--recipe", user / "recipe.toml")
    made = run("quantize", inpainting_model, "-o", user / "run", *size, *inputs)
    assert made.exit_code == 0, made.output
    arguments = load_call(user / "run" / CALL_FOLDER).arguments
    assert isinstance(arguments["prompt"], str)
    assert (arguments["height"], arguments["image"].size) == (16, (16, 16))


def test_quantize_refuses_an_argument_that_the_call_does_not_have(user, inpainting_model):
    options = ("--input", f"picture={user / 'cat.png'}")
    result = run("quantize", inpainting_model, "-o", user / "run", *options)
    refused(result, "has no argument 'picture'")
    assert not (user / "run").exists()


def test_generate_takes_pictures_and_shows_the_call(user, inpainting_run):
    Image.new("RGB", (16, 16), (0, 0, 250)).save(user / "blue.png")
    options = ("--input", f"image={user / 'blue.png'}", "--prompt", "a blue square", "--json")
    made = run("generate", inpainting_run, "-o", user / "out.png", *options)
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["prompts"] == ["a blue square"]
    shown = run("generate", inpainting_run, "--show-call")
    assert "mask_image: " in shown.stdout
    assert "recorded: picture 16x16" in shown.stdout
    record = json.loads(run("generate", inpainting_run, "--show-call", "--json").stdout)
    assert record["pipeline"] == "StableDiffusionInpaintPipeline"


REFUSED = {
    "no output": (("generate", "RUN"), "missing option -o / --output"),
    "no file": (("generate", "RUN", "-o", "a.png", "--input", "image=none"), "there is no file"),
    "no picture": (
        ("generate", "RUN", "-o", "a.png", "--input", "image=call.toml"),
        "unknown kind",
    ),
    "no call": (("generate", "RUN", "-o", "a.png", "--call", "none.toml"), "cannot read the call"),
    "bench": (("bench", "RUN"), "trtq eval compares it"),
    "serve": (("serve", "RUN"), "does not support yet"),
    "verify --layers": (("verify", "RUN", "--layers"), "--run RUN"),
    "export of a known model": (
        ("export", "digits", "-o", "onnx", "--input", "image=cat.png"),
        "was not recorded inside its pipeline's call",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_command_that_cannot_use_the_call_says_so(user, inpainting_run, monkeypatch, case):
    monkeypatch.chdir(user)
    texts, message = REFUSED[case]
    refused(run(*(inpainting_run if text == "RUN" else text for text in texts)), message)
