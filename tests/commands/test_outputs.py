"""No command loses the user's data: folders, files, measurements, checkpoints."""

import json
import os
import shutil

import pytest
from typer.testing import CliRunner

from trtq.cli import app
from trtq.errors import ArtefactError
from trtq.pipelines import generate as generate_stage
from trtq.pipelines.generate import generate


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def message_of(result):
    return " ".join(result.stderr.split())


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def verbs(digits_onnx):
    """The commands that write a folder, and their arguments before `-o`."""
    return {
        "quantize": ("quantize", "digits", "--method", "minmax", "--steps", 2),
        "export": ("export", "digits"),
        "eval": ("eval", "digits", "--reference", "digits", "--images", 2, "--steps", 2),
        "bench": ("bench", "digits", "--batch-sizes", 1, "--turns", 2),
        "package": ("package", "triton", digits_onnx),
        "demo": ("demo", "--images", 20, "--iterations", 1),
    }


FOLDERS = ("quantize", "export", "eval", "bench", "package", "demo")
MINE = {
    "a web app": {"manifest.json": '{"name": "mine"}', "src/thesis.txt": "years"},
    "an extension": {"manifest.json": '{"manifest_version": 3}', "thesis.txt": "years"},
    "a report": {"report.json": '{"mine": 1}', "index.html": "mine", "thesis.txt": "years"},
    "a release": {"SHA256SUMS": "0  x", "pipeline/x": "mine", "thesis.txt": "years"},
    "pictures": {"digits.png": "mine", "report/thesis.txt": "years"},
}


@pytest.mark.parametrize("files", MINE.values(), ids=MINE.keys())
@pytest.mark.parametrize("verb", FOLDERS)
def test_a_folder_of_the_user_is_refused_with_overwrite(verb, files, verbs, tmp_path):
    place = tmp_path / "mine"
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    before = tree(tmp_path)
    result = run(*verbs[verb], "-o", place, "--overwrite")
    assert result.exit_code == 2, result.output
    assert "exists and is not" in message_of(result)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("verb", ["export", "eval", "bench", "package", "demo"])
def test_a_run_is_replaced_by_runs_only(verb, verbs, digits_run, tmp_path):
    shutil.copytree(digits_run, tmp_path / "run")
    before = tree(tmp_path)
    result = run(*verbs[verb], "-o", tmp_path / "run", "--overwrite")
    assert result.exit_code == 2, result.output
    assert "is a run, which is not replaced by" in message_of(result)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("verb", FOLDERS)
def test_links_files_and_paths_inside_artefacts_are_refused(verb, verbs, digits_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    shutil.copytree(digits_run, tmp_path / "run")
    before = tree(tmp_path)
    for place in ("file", "link", "run/inside", "file/below", "run/unet"):
        result = run(*verbs[verb], "-o", tmp_path / place, "--overwrite")
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.stderr
    assert tree(tmp_path) == before


def test_an_image_is_replaced_only_with_overwrite(digits_onnx, tmp_path):
    out = tmp_path / "cat.png"
    out.write_bytes(b"mine")
    refused = run("generate", digits_onnx, "-o", out)
    assert (refused.exit_code, out.read_bytes()) == (2, b"mine")
    assert "pass --overwrite" in message_of(refused)
    done = run("generate", digits_onnx, "-o", out, "--steps", 1, "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]


def test_an_image_is_not_written_into_an_artefact(digits_onnx):
    result = run("generate", "digits", "-o", digits_onnx / "cat.png")
    assert result.exit_code == 2
    assert "lies inside" in message_of(result)


def test_an_image_that_cannot_be_written_leaves_nothing(digits_onnx, tmp_path, monkeypatch):
    save = generate_stage.save_png

    def fail(sheet, path, texts, **options):
        monkeypatch.setattr("PIL.Image.Image.save", lambda *_, **__: full())
        save(sheet, path, texts, **options)

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generate_stage, "save_png", fail)
    with pytest.raises(ArtefactError, match=r"cat\.png failed, nothing of it is left.*No space"):
        generate(digits_onnx, tmp_path / "cat.png", steps=1)
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_that_cannot_be_written_is_printed(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trtq.report.folder.render", fail)
    arguments = ("--reference", "digits", "--images", 2, "--steps", 2, "--json")
    result = run("eval", "digits", *arguments, "-o", tmp_path / "report")
    assert (result.exit_code, "No space left" in message_of(result)) == (1, True)
    assert str(tmp_path / "report") in message_of(result)
    assert json.loads(result.stdout)["images"] == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["again", "resume"])
def test_a_half_written_first_checkpoint_does_not_block_the_next_run(resume, tmp_path):
    stage = tmp_path / ".run.trtq-partial" / "checkpoints" / "fine-tune"
    for name in (".iteration-0000002.partial", "iteration-0000002"):
        (stage / name).mkdir(parents=True)
        (stage / name / "model.safetensors").write_text("half")
    fast = ("--method", "minmax", "--steps", 2)
    result = run("quantize", "digits", "-o", tmp_path / "run", *fast, *resume)
    assert result.exit_code == 0, result.stderr
    assert ("no complete checkpoint" in message_of(result)) == bool(resume)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_input_file_must_not_be_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for arguments in (
        ("bench", "digits", "--baseline", tmp_path / "pipe"),
        ("quantize", "digits", "-o", tmp_path / "run", "--recipe", tmp_path / "pipe"),
        ("serve", "digits", "--api-key-file", tmp_path / "pipe"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "is a named pipe; give a regular file" in message_of(result)
