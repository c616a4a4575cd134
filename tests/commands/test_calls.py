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
    recipe = ("--recipe", user / "recipe.toml")
    planned = run("quantize", inpainting_model, "-o", user / "x", "--dry-run", *recipe, *options)
    assert planned.exit_code == 0, planned.output
    assert "would quantize" in planned.stdout
    assert not (user / "x").exists()


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


@pytest.fixture(scope="module")
def inpainting_onnx(inpainting_run):
    """The ONNX folder of a recorded run."""
    folder = inpainting_run.parent / "onnx"
    made = run("export", inpainting_run, "-o", folder)
    assert made.exit_code == 0, made.output
    return folder


@pytest.mark.slow
def test_an_onnx_folder_draws_is_inspected_and_verified(inpainting_run, inpainting_onnx, tmp_path):
    made = run("generate", inpainting_onnx, "-o", tmp_path / "out.png", "--json")
    assert made.exit_code == 0, made.output
    record = json.loads(run("inspect", inpainting_onnx, "--json").stdout)
    (graph,) = record["denoisers"][0]["graphs"]
    assert "sample" in graph["inputs"]
    assert graph["free"]["sample"] == ["axis 0: 1 or more (batch)"]
    checked = run("verify", inpainting_onnx, "--run", inpainting_run, "--json")
    assert checked.exit_code == 0, checked.output
    record = json.loads(checked.stdout)
    assert record["graphs"] == {"unet": None}
    assert len(record["parity_db"]) == 2
    assert record["parity_db_min"] >= record["parity_required_db"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "texts",
    [
        ("package", "triton", "ONNX", "-o", "repository"),
        ("verify", "ONNX", "--run", "RUN", "--layers"),
    ],
)
def test_a_command_without_support_for_recorded_graphs_refuses_them(
    inpainting_run, inpainting_onnx, tmp_path, monkeypatch, texts
):
    monkeypatch.chdir(tmp_path)
    places = {"ONNX": inpainting_onnx, "RUN": inpainting_run}
    result = run(*(places.get(text, text) for text in texts))
    refused(result, "its pipeline's own call" if "triton" in texts else "call, which")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_onnx_folder_is_measured_beside_its_float_checkpoint(inpainting_onnx):
    made = run("bench", inpainting_onnx, "--turns", "2", "--images", "1", "--json")
    assert made.exit_code == 0, made.output
    rows = json.loads(made.stdout)["rows"]
    assert [row["kind"] for row in rows] == ["onnx", "checkpoint"]
    assert all(row["batches"][0]["parts"]["denoiser"]["p50"] > 0 for row in rows)
    assert rows[0]["batches"][0]["batch"] == 1


@pytest.mark.slow
def test_a_graph_that_was_edited_fails_its_check(inpainting_onnx, tmp_path):
    import shutil

    copy = shutil.copytree(inpainting_onnx, tmp_path / "onnx")
    (copy / "unet" / "model.onnx").write_bytes(b"no graph")
    result = run("verify", copy)
    assert result.exit_code == 1
    assert "unet/model.onnx" in result.output
    assert "Traceback" not in result.output
