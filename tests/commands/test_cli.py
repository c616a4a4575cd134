"""The command line as users see it: results, errors, exit codes, no partial output."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from trtq.checkpoint.shipped import shipped_model
from trtq.cli import app
from trtq.demo.digits import demo

VERBS = (
    *("doctor", "quantize", "export", "build", "generate", "eval", "inspect", "verify", "demo"),
    *("bench", "serve", "selftest"),
)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_help_of_every_command_has_an_example():
    for verb in VERBS:
        result = run(verb, "--help")
        assert result.exit_code == 0
        assert f"Example: trtq {verb}" in result.stdout


def test_help_lists_the_commands_in_the_order_of_use():
    text = run("--help").stdout
    listed = [line.split()[0] for line in text[text.index("Commands:") :].splitlines()[1:]]
    assert listed == [
        *("doctor", "quantize", "export", "build", "generate", "eval", "bench", "inspect"),
        *("verify", "serve", "package", "plugins", "demo", "selftest"),
    ]


FORMER_NAMES = {
    "export": (("export", "digits", "-o", "{}"), "--batch", "--batch-range", "9:1"),
    "build": (("build", "digits", "-o", "{}"), "--batch", "--batch-range", "9:1"),
    "bench": (("bench", "digits", "-o", "{}"), "--batch", "--batch-sizes", "0"),
    "bench, baseline": (("bench", "digits"), "--against", "--baseline", "/nonexistent"),
}


@pytest.mark.parametrize("form", ["{} {}", "{}={}"], ids=["space", "equals"])
@pytest.mark.parametrize(
    ("arguments", "former", "name", "value"), FORMER_NAMES.values(), ids=FORMER_NAMES.keys()
)
def test_former_names_of_options_are_accepted(arguments, former, name, value, form, tmp_path):
    filled = [argument.format(tmp_path / "out") for argument in arguments]
    results = [run(*filled, *form.format(option, value).split()) for option in (former, name)]
    assert results[0].exit_code == results[1].exit_code != 0
    assert results[0].stderr == results[1].stderr
    assert "No such option" not in results[0].stderr
    text = run(arguments[0], "--help").stdout
    assert f"{name} " in text
    assert f"{former} " not in text


def test_doctor_lists_providers_and_models():
    result = run("doctor", "--json")
    record = json.loads(result.stdout)
    assert result.exit_code == 0, record["problems"]
    assert {"torch", "cpu"} <= set(record["providers"])
    assert "digits" in record["models"]


def test_a_missing_optional_package_is_not_a_problem_in_doctor(monkeypatch):
    from trtq.engine import doctor

    installed_version = doctor._version
    missing = ("matplotlib", "jinja2", "torch")
    monkeypatch.setattr(
        doctor, "_version", lambda p: None if p in missing[:2] else installed_version(p)
    )
    record = doctor.doctor()
    assert record["ok"]
    assert any("trtq[eval]" in hint for hint in record["hints"])
    monkeypatch.setattr(
        doctor, "_version", lambda p: None if p in missing else installed_version(p)
    )
    assert doctor.doctor()["problems"] == ["torch is missing: pip install trtq"]


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    result = run("quantize", "digits", "-o", tmp_path / "run", "--dry-run", "--json")
    record = json.loads(result.stdout)
    assert (record["layers_quantized"], record["layers_float"]) == (51, 0)
    assert record["bytes_after"] < 0.2 * record["bytes_before"]
    assert 1 < record["estimated_seconds"] < 10000
    assert record["estimated_peak_bytes"] > 1e8
    assert list(tmp_path.iterdir()) == []


def test_quantize_and_export_print_their_json_keys(tmp_path):
    fast = ["--method", "minmax", "--steps", 2, "--bits", "w4a8", "--json"]
    quantized = run("quantize", "digits", "-o", tmp_path / "run", *fast)
    assert quantized.exit_code == 0, quantized.stderr
    assert {
        "seconds",
        "peak_rss_bytes",
        "layers_quantized",
        "layers_float",
        "bytes_before",
        "bytes_after",
    } <= set(json.loads(quantized.stdout))
    exported = run("export", tmp_path / "run", "-o", tmp_path / "onnx", "--json")
    assert {"parity_db_min", "seconds", "peak_rss_bytes"} <= set(json.loads(exported.stdout))


def test_generate_writes_a_sheet(digits_onnx, tmp_path):
    from PIL import Image

    out = tmp_path / "x.png"
    result = run("generate", digits_onnx, "-o", out, "--images", 4, "--class-label", 7, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["labels"] == [7] * 4
    with Image.open(out) as sheet:
        assert sheet.size == (2 * 96 + 12, 2 * 96 + 12)


def test_generate_writes_one_file_per_image_with_its_settings(digits_onnx, tmp_path):
    from trtq.png_text import read_texts

    out = tmp_path / "pictures"
    result = run("generate", digits_onnx, "-o", out, "--images", 3, "--seed", 5, "--json")
    assert result.exit_code == 0, result.stderr
    names = sorted(path.name for path in out.iterdir())
    assert names == ["image-0000.png", "image-0001.png", "image-0002.png"]
    assert json.loads(result.stdout)["files"] == [str(out / name) for name in names]
    facts = [json.loads(read_texts((out / name).read_bytes())["trtq"]) for name in names]
    assert [(f["class"], f["seed"], f["image"]) for f in facts] == [(0, 5, 0), (1, 5, 1), (2, 5, 2)]
    assert facts[0]["steps"] == 4


def test_snr_psnr_and_ssim_need_no_classifier(digits_run, tmp_path):
    from trtq.checkpoint.shipped import shipped_model

    model = tmp_path / "model"
    shutil.copytree(shipped_model("digits"), model)
    shutil.rmtree(model / "classifier")
    arguments = ["eval", digits_run, "--reference", model, "--images", 10, "--json"]
    result = run(*arguments, "-o", tmp_path / "report", "--gate", "psnr_db>=5")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["fd"] is record["fd_reference"] is record["features"] is None
    assert len(record["snr_db"]) == 4
    low, high = record["psnr_db_interval"]
    assert low < record["psnr_db"] < high
    assert 0 < record["ssim"] <= 1
    assert "fd" in record["not_computed"]
    assert "Not computed" in (tmp_path / "report" / "index.html").read_text()
    refused = run(*arguments, "--gate", "fd<=1")
    assert refused.exit_code == 2
    assert "--features" in refused.stderr


def test_eval_reports_and_gates(digits_onnx, tmp_path):
    arguments = ["eval", digits_onnx, "--reference", "digits", "--images", 40, "--json"]
    good = run(*arguments, "-o", tmp_path / "report", "--gate", "fd<=1000")
    assert good.exit_code == 0, good.stderr
    record = json.loads(good.stdout)
    assert {"fd", "fd_reference", "class_accuracy", "class_accuracy_reference"} <= set(record)
    assert len(record["snr_db"]) == record["steps"] == 4
    assert record["images"] == 40
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # Two grids, their difference, a plot.
    assert "http" not in page
    bad = run(*arguments, "--gate", "class_accuracy>1")
    assert bad.exit_code == 1
    assert "not met: class_accuracy>1" in bad.stderr


def test_inspect_shows_layers_bits_and_tables(digits_run):
    record = json.loads(run("inspect", digits_run, "--json").stdout)
    assert record["precisions"] == {"w8a8": 10, "w4a4": 41}
    assert len(record["timesteps"]) == 4
    rows = {row["name"]: row for row in record["layers"]}
    assert len(rows["mid_block.resnets.0.conv1"]["scale"]["activation"]) == 4
    assert rows["conv_in"]["zero_points"] == [128]
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["inspect", str(digits_run)])
    # Names are not abbreviated even in the narrowest common terminal.
    assert rows.keys() <= set(shown.stdout.split())
    assert "…" not in shown.stdout


def test_a_run_and_its_export_generate_the_same_images(digits_run, digits_onnx):
    import numpy as np
    import torch

    import trtq

    images = []
    for path, provider in ((digits_run, None), (digits_onnx, "cpu")):
        pipeline = trtq.load(path, provider)
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline([3, 7], 4, generator=generator, output_type="np").images)
    np.testing.assert_allclose(*images, atol=0.02)
    assert images[0].shape == (2, 8, 8, 1)


@pytest.mark.slow
def test_demo_makes_everything(tmp_path):
    result = demo(tmp_path / "demo", images=20, iterations=2)
    assert result["rows"][0]["name"] == "float"
    page = (tmp_path / "demo" / "report" / "index.html").read_text()
    assert "Handwritten digits in four bits" in page
    assert (tmp_path / "demo" / "digits.png").is_file()


WRONG_USE = {
    "bits": (("quantize", "digits", "-o", "{}", "--bits", "w4a77"), "bits=77"),
    "method": (("quantize", "digits", "-o", "{}", "--method", "magic"), "choose one of"),
    "tables": (("quantize", "digits", "-o", "{}", "--tables", "x"), "'per-step' or 'static'"),
    "recipe": (("quantize", "digits", "-o", "{}", "--recipe", "no.toml"), "cannot read"),
    "steps": (("quantize", "digits", "-o", "{}", "--steps", 100000), "steps"),
    "precision": (("export", "digits", "-o", "{}", "--precision", "fp8"), "fp32, fp16"),
    "target": (("export", "digits", "-o", "{}", "--target", "x"), "choose one of qdq, plugin"),
    "form": (("bench", "kernels", "--form", "w2a2", "-o", "{}"), "choose from w8a8, w4a8, w4a4"),
    "batch": (("export", "digits", "-o", "{}", "--batch-range", "9:1"), "MIN:MAX"),
    "class": (("generate", "digits", "-o", "{}.png", "--class-label", 10), r"0 .. 9"),
    "suffix": (("generate", "digits", "-o", "{}.gif"), "end in .png"),
    "prompt": (("generate", "digits", "-o", "{}.png", "--prompt", "x"), "--class-label"),
    "provider": (("generate", "digits", "-o", "{}.png", "--provider", "tpu"), "choose one of"),
    "checkpoint provider": (
        ("generate", "digits", "-o", "{}.png", "--provider", "cpu"),
        "trtq export digits",
    ),
    "gate": (("eval", "digits", "--reference", "digits", "--gate", "fd=1"), "fd<=1.5"),
    "metric": (("eval", "digits", "--reference", "digits", "--gate", "fid<1"), "unknown metric"),
    "features": (
        ("eval", "digits", "--reference", "digits", "--features", "nowhere"),
        "is not a folder",
    ),
    "generate steps": (("generate", "digits", "-o", "{}.png", "--steps", 2000), "1 .. 1000"),
    "budget": (("quantize", "digits", "-o", "{}", "--budget", "size=2"), "size=0.15x"),
    "lora scale": (("quantize", "digits", "-o", "{}", "--lora", "x:strong"), "not a number"),
    "iterations": (
        ("quantize", "digits", "-o", "{}", "--method", "minmax", "--iterations", 5),
        "does not fine-tune",
    ),
    "option": (("quantize", "digits", "-o", "{}", "--bitz", "w4a4"), "No such option"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_USE.values(), ids=WRONG_USE.keys())
def test_wrong_use_exits_with_code_2_and_one_line_and_writes_no_file(arguments, message, tmp_path):
    filled = [str(a).format(tmp_path / "out") for a in arguments]
    result = run(*filled)
    assert result.exit_code == 2, result.stderr
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_lora_exits_with_code_1(tmp_path):
    result = run("quantize", "digits", "-o", tmp_path / "run", "--lora", tmp_path / "x.safetensors")
    assert result.exit_code == 1
    assert "there is no LoRA file" in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", ["", "sub"])
def test_an_input_is_not_overwritten_by_its_own_output(inside, digits_run):
    result = run("export", digits_run, "-o", digits_run / inside, "--overwrite")
    assert result.exit_code == 2
    assert "the same place or inside each other" in " ".join(result.stderr.split())
    assert run("inspect", digits_run).exit_code == 0


def test_a_run_is_not_accepted_as_a_reference(digits_run):
    result = run("eval", digits_run, "--reference", digits_run, "--images", 4)
    assert result.exit_code == 2
    assert "give the float checkpoint" in " ".join(result.stderr.split())


def test_a_run_cannot_be_quantised_again_without_a_lora(digits_run, tmp_path):
    result = run("quantize", digits_run, "-o", tmp_path / "run", "--method", "minmax")
    assert result.exit_code == 2
    assert "together with --lora" in " ".join(result.stderr.split())


@pytest.mark.parametrize("verb", ["quantize", "export", "generate", "inspect"])
def test_a_missing_model_exits_with_code_1(verb, tmp_path):
    output = [] if verb == "inspect" else ["-o", tmp_path / "out.png"]
    result = run(verb, tmp_path / "nowhere", *output)
    assert result.exit_code == 1
    assert "there is no model" in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def damaged(source, tmp_path, change):
    folder = tmp_path / "artefact"
    shutil.copytree(source, folder)
    change(folder)
    return folder


def rewrite(**fields):
    def change(folder):
        path = folder / "manifest.json"
        record = json.loads(path.read_text())
        for key, value in fields.items():
            record[key] = value(record[key]) if callable(value) else value
        path.write_text(json.dumps(record))

    return change


DAMAGE = {
    "changed tensors": (
        lambda folder: (folder / "quantized.safetensors").write_bytes(b"x" * 100),
        "SHA-256 differs",
    ),
    "missing file": (
        lambda folder: (folder / "quantized.safetensors").unlink(),
        "is missing, though the manifest lists it",
    ),
    "path that leaves": (
        rewrite(files=lambda files: files | {"../../etc/passwd": "0" * 64}),
        "leaves the folder",
    ),
    "absolute path": (
        rewrite(files=lambda files: files | {"/etc/passwd": "0" * 64}),
        "leaves the folder",
    ),
    "other version": (rewrite(format_version=99), "format version 99"),
    "unlisted file that would be read": (
        lambda folder: (folder / "prompts.json").write_text("{}"),
        "is not in the manifest",
    ),
    "unknown key": (rewrite(surprise=1), "not a manifest of trtq: surprise"),
    "no json": (lambda folder: (folder / "manifest.json").write_text("{"), "not a manifest"),
    "foreign class": (
        lambda folder: (folder / "model_index.json").write_text('{"unet": ["os", "system"]}'),
        "SHA-256 differs",
    ),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("verb", ["export", "generate", "inspect"])
def test_damaged_runs_are_refused(verb, change, message, digits_run, tmp_path):
    folder = damaged(digits_run, tmp_path, change)
    output = [] if verb == "inspect" else ["-o", tmp_path / "out.png"]
    result = run(verb, folder, *output)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["artefact"]


def test_a_link_out_of_the_folder_is_refused(digits_run, tmp_path):
    secret = tmp_path / "secret"
    shutil.copy(digits_run / "quantized.safetensors", secret)

    def change(folder):
        (folder / "quantized.safetensors").unlink()
        (folder / "quantized.safetensors").symlink_to(secret)

    result = run("inspect", damaged(digits_run, tmp_path, change))
    assert result.exit_code == 1
    assert "leaves the folder" in result.stderr.replace("\n", " ")


def test_corrupt_tensors_with_a_matching_hash_are_refused(digits_run, tmp_path):
    from trtq.artefact.files import sha256

    def change(folder):
        path = folder / "quantized.safetensors"
        path.write_bytes(path.read_bytes()[:5000])
        rewrite(files=lambda files: files | {"quantized.safetensors": sha256(path)})(folder)

    result = run("inspect", damaged(digits_run, tmp_path, change))
    assert result.exit_code == 1
    assert "cannot read" in result.stderr


def test_zero_layers_is_an_error(tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text('family="x"\n[[rule]]\nlayers=["nothing.*"]\nbits="target"\nreason="r"\n')
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'method = "minmax"\npolicy = "{policy}"\n')
    result = run("quantize", "digits", "-o", tmp_path / "run", "--recipe", recipe)
    assert result.exit_code == 1
    assert "zero layers" in result.stderr
    assert not (tmp_path / "run").exists()


def test_an_existing_output_is_not_lost(digits_run, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    for extra in ([], ["--overwrite"]):
        result = run("quantize", "digits", "-o", precious, "--method", "minmax", *extra)
        assert result.exit_code == 2
        assert "not an artefact of trtq" in " ".join(result.stderr.split())
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert run("quantize", "digits", "-o", digits_run, "--method", "minmax").exit_code == 2


def test_checkpoints_of_an_interrupted_run_are_not_lost(tmp_path):
    fine_tune = tmp_path / ".run.trtq-partial" / "checkpoints" / "fine-tune"
    checkpoint = fine_tune / "iteration-0000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text("{}")
    result = run("quantize", "digits", "-o", tmp_path / "run", "--steps", 2)
    assert result.exit_code == 2
    assert "--resume" in result.stderr
    result = run("quantize", "no-such-model", "-o", tmp_path / "run", "--overwrite")
    assert result.exit_code == 1
    assert checkpoint.is_dir()


def test_a_model_with_nan_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(shipped_model("digits"), folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.weight"][0] = float("nan")
    save_file(tensors, weights)
    result = run("quantize", folder, "-o", tmp_path / "run", "--method", "minmax", "--steps", 2)
    assert result.exit_code == 1
    assert "NaN or infinity" in result.stderr.replace("\n", " ")
    assert "layer '" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["quantize", "digits", "--method", "minmax", "--steps", 2],
        ["export", "digits"],
    ],
    ids=["quantize", "export"],
)
def test_a_full_disk_is_reported_in_one_line_and_leaves_no_file(command, tmp_path):
    import resource

    former, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Larger files fail as on a full disk; Python ignores the signal that would end the process.
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard_limit))
    try:
        done = run(*command, "-o", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (former, hard_limit))
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "failed, nothing of it is left" in line
    assert list(tmp_path.iterdir()) == []
