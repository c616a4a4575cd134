"""Opening an artefact: every command hashes each file once."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from trtq.artefact.manifest_file import parse_manifest
from trtq.artefact.opened import (
    Checkpoint,
    EngineFolder,
    OnnxFolder,
    Run,
    open_artefact,
    open_folder,
)
from trtq.errors import ArtefactError, IntegrityError
from trtq.evaluation.evaluate import evaluate
from trtq.exporter.verify import verify
from trtq.pipelines.generate import generate
from trtq.pipelines.inspect import inspect
from trtq.pipelines.open import load
from trtq.serve.hosting import open_model


@pytest.fixture
def hashed(monkeypatch):
    """Number of computations of each file's SHA-256, by path."""
    counts = Counter()
    digest = hashlib.file_digest

    def count(file, *args, **kwargs):
        counts[str(Path(file.name).resolve())] += 1
        return digest(file, *args, **kwargs)

    monkeypatch.setattr(hashlib, "file_digest", count)
    return counts


def verbs(tmp_path):
    return {
        "generate": lambda place: generate(place, tmp_path / "image.png", steps=1),
        "evaluate": lambda place: evaluate(place, "digits", images=2, steps=1),
        "serve": lambda place: open_model(place, "digits"),
        "inspect": inspect,
        "verify": verify,
        "load": load,
    }


@pytest.mark.parametrize("kind", ["run", "onnx"])
@pytest.mark.parametrize("verb", ["generate", "evaluate", "serve", "inspect", "verify", "load"])
def test_a_command_hashes_each_file_exactly_once(
    digits_run, digits_onnx, tmp_path, hashed, kind, verb
):
    folder = Path({"run": digits_run, "onnx": digits_onnx}[kind])
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    hashed.clear()
    verbs(tmp_path)[verb](str(folder))
    inside = {path: count for path, count in hashed.items() if Path(path).is_relative_to(folder)}
    assert inside == {str((folder / name).resolve()): 1 for name in listed}


def test_an_opened_artefact_is_returned_unchanged_and_not_hashed_again(
    digits_onnx, tmp_path, hashed
):
    opened = open_artefact(digits_onnx)
    assert set(hashed.values()) == {1}
    hashed.clear()
    assert open_artefact(opened) is opened
    generate(opened, tmp_path / "image.png", steps=1)
    assert inspect(opened).kind == "onnx"
    assert not [path for path in hashed if Path(path).is_relative_to(digits_onnx)]


def test_an_opened_artefact_has_the_settings_of_its_manifest(digits_run, digits_onnx):
    run, onnx = open_artefact(digits_run), open_artefact(digits_onnx)
    assert type(run) is Run
    assert (run.kind, run.denoiser, run.steps, run.guidance, run.bits) == (
        ("run", "unet", 4, 1.0, "w4a4")
    )
    assert type(onnx) is OnnxFolder
    assert (onnx.kind, onnx.size, onnx.smallest_size, onnx.batch, onnx.precision, onnx.target) == (
        ("onnx", "8x8", "8x8", (1, 8), "fp32", "qdq")
    )


@pytest.mark.parametrize("place", ["digits", "some/hub-id", object()])
def test_anything_but_an_artefact_is_a_checkpoint(place):
    opened = open_artefact(place)
    assert type(opened) is Checkpoint
    assert opened.place is place
    assert (opened.kind, opened.low_bit, opened.steps, opened.guidance) == (
        ("checkpoint", False, None, None)
    )
    assert (opened.bits, opened.size) == ("fp32", None)


def test_a_changed_file_is_named_whenever_it_is_verified(digits_onnx, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(digits_onnx, copy)
    opened = open_artefact(copy, verify=False)
    (copy / "model_index.json").write_text("{}")
    for action in (
        lambda: open_artefact(copy),
        lambda: open_artefact(opened),
        lambda: generate(opened, tmp_path / "image.png"),
    ):
        with pytest.raises(
            IntegrityError, match=r"model_index\.json is not what the manifest says"
        ):
            action()


def test_a_folder_of_another_kind_is_refused_before_it_is_hashed(digits_run, tmp_path, hashed):
    with pytest.raises(ArtefactError, match="is of kind 'run'; onnx is required"):
        open_folder(digits_run, "onnx")
    with pytest.raises(ArtefactError, match=r"cannot read .*manifest\.json"):
        open_folder(tmp_path)
    assert not hashed


def test_an_output_must_not_overlap_an_opened_input(digits_run):
    from trtq.errors import UsageError
    from trtq.exporter.export import export

    opened = open_artefact(digits_run, verify=False)
    with pytest.raises(UsageError, match="are the same place or inside each other"):
        export(opened, Path(digits_run) / "onnx")


def test_an_engine_folder_has_its_backend(digits_onnx, tmp_path):
    copy = tmp_path / "engine"
    shutil.copytree(digits_onnx, copy)
    record = json.loads((copy / "manifest.json").read_text())
    record["kind"] = "engine"
    record["options"] |= {"backend": "tensorrt-rtx", "architectures": ["sm86"]}
    record["options"]["graph_metadata"] = {"trtq.timesteps": "[1.0]"}
    (copy / "manifest.json").write_text(json.dumps(record))
    engines = open_artefact(copy)
    assert type(engines) is EngineFolder
    assert engines.backend == "tensorrt-rtx"
    assert engines.graph_metadata == {"trtq.timesteps": "[1.0]"}


@pytest.mark.parametrize("kind", ["run", "onnx"])
def test_a_rewritten_manifest_is_unchanged(digits_run, digits_onnx, tmp_path, kind):
    folder = Path({"run": digits_run, "onnx": digits_onnx}[kind])
    record = json.loads((folder / "manifest.json").read_text())
    record["options"]["of_a_later_version"] = {"nested": [1, None]}
    record["metrics"]["another"] = 2
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    text = parse_manifest(tmp_path).model_dump_json()
    assert json.dumps(json.loads(text)) == json.dumps(record)
