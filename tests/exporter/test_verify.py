"""`trtq verify`: files, rules, and the comparison with torch, layer by layer."""

import json
import shutil
from collections import Counter

import onnx
import pytest
from typer.testing import CliRunner

from trtq.artefact import manifest_file
from trtq.artefact.files import sha256
from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_rows import SourceRow
from trtq.artefact.opened import open_folder
from trtq.cli import app
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.errors import ArtefactError, IntegrityError, UsageError
from trtq.exporter import graph_check
from trtq.exporter.graph_check import check_engines, require_graphs
from trtq.exporter.verify import verify
from trtq.pipelines.generate import generate


def test_a_run_is_opened_and_its_files_counted(digits_run):
    result = verify(digits_run)
    assert result.ok
    assert result.kind == "run"
    assert result.files > 3


def test_a_graph_is_compared_with_its_run_layer_by_layer(digits_run, digits_onnx):
    result = verify(digits_onnx, against=digits_run, layers=True)
    assert result.ok
    assert result.parity_db_min > 40
    assert len(result.layers) == 51
    assert result.first is None
    assert min(layer.snr_db for layer in result.layers) > 60
    assert set(result.runtimes) == {"onnxruntime", "openvino", "tensorrt-rtx", "tensorrt"}


def test_another_run_is_refused(digits_run, digits_onnx, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(digits_run, other)
    path = other / "manifest.json"
    record = json.loads(path.read_text())
    record["metrics"]["seconds"] = 1.0
    path.write_text(json.dumps(record))
    with pytest.raises(ArtefactError, match="was not exported from"):
        verify(digits_onnx, against=other)


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_damaged_weights_are_found(damage, digits_onnx, tmp_path):
    folder = tmp_path / "onnx"
    shutil.copytree(digits_onnx, folder)
    data = folder / "unet" / "model.onnx_data"
    if damage == "missing":
        data.unlink()
    else:
        content = bytearray(data.read_bytes())
        content[100] ^= 1
        data.write_bytes(content if damage == "changed" else content[: len(content) // 2])
    with pytest.raises(IntegrityError, match=r"model\.onnx_data"):
        verify(folder)


def test_the_message_about_wrong_use_names_the_remedy(digits_run, digits_onnx, tmp_path):
    with pytest.raises(UsageError, match="is no artefact"):
        verify(tmp_path)
    with pytest.raises(UsageError, match="choose one of onnxruntime"):
        verify(digits_onnx, runtimes=["tensorflow"])
    with pytest.raises(UsageError, match="--run RUN"):
        verify(digits_onnx, layers=True)
    with pytest.raises(UsageError, match="for ONNX folders"):
        verify(digits_run, against=digits_run)


def test_the_command_reports_the_result_as_json_and_as_text(digits_run, digits_onnx):
    runner = CliRunner()
    done = runner.invoke(app, ["verify", str(digits_onnx), "--runtime", "tensorrt-rtx", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["runtimes"]["tensorrt-rtx"] == {"legal": True, "findings": []}
    done = runner.invoke(app, ["verify", str(digits_run)])
    assert "all well" in done.stdout
    done = runner.invoke(app, ["verify", str(digits_onnx), "--runtime", "nonsense"])
    assert done.exit_code == 2


def _edited(folder, copy, change):
    """A copy with a changed graph and recomputed hashes."""
    shutil.copytree(folder, copy)
    path = copy / "unet" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    record = json.loads((copy / "manifest.json").read_text())
    record["files"]["unet/model.onnx"] = sha256(path)
    (copy / "manifest.json").write_text(json.dumps(record))
    return copy


def _rename_sample(model):
    model.graph.input[0].name = "evil"
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "sample":
                node.input[place] = "evil"


def _unknown_operator(model):
    model.graph.node[0].op_type = "EvilOp"


def _elsewhere(model):
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../other"


def _beyond_the_end(model):
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = str(1 << 40)


def _integers_out(model):
    (out,) = model.graph.output
    for node in model.graph.node:
        for place, name in enumerate(node.output):
            if name == out.name:
                node.output[place] = "before"
    model.graph.node.append(onnx.helper.make_node("Cast", ["before"], [out.name], to=7))
    out.type.tensor_type.elem_type = 7


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_unknown_operator, "No Op registered for EvilOp"),
        (_rename_sample, "has no input 'sample'"),
        (_elsewhere, "outside its folder"),
        (_beyond_the_end, "it was cut"),
        (_integers_out, "'out_sample' is of type int64"),
    ],
)
def test_a_graph_that_cannot_be_used_is_a_failed_check(change, problem, digits_onnx, tmp_path):
    folder = _edited(digits_onnx, tmp_path / "onnx", change)
    result = verify(folder)
    assert not result.ok
    assert problem in result.graphs["unet"]
    with pytest.raises(ArtefactError, match=r"unet/model\.onnx cannot be used: .*trtq verify"):
        require_graphs(folder, open_folder(folder).manifest)


def test_a_graph_that_the_manifest_does_not_list_is_not_opened(digits_onnx, tmp_path, caplog):
    folder = tmp_path / "onnx"
    shutil.copytree(digits_onnx, folder)
    (folder / "backup").mkdir()
    (folder / "backup" / "model.onnx").write_text("not a graph")
    result = verify(folder, runtimes=["onnxruntime"])
    assert result.ok
    assert set(result.graphs) == {"unet"}
    assert "e.g. backup; left alone" in caplog.text


@pytest.mark.parametrize("command", [["verify"], ["package", "triton"], ["build"]], ids=" ".join)
def test_every_command_that_opens_graphs_accepts_a_time_limit(command, digits_onnx, tmp_path):
    out = [] if command == ["verify"] else ["-o", str(tmp_path / "out")]
    if command == ["build"] and not BACKENDS["tensorrt-rtx"].installed:
        pytest.skip("needs tensorrt-rtx")
    done = CliRunner().invoke(app, [*command, str(digits_onnx), *out, "--timeout", "0"])
    assert done.exit_code == 2
    assert "time limit must be a number of seconds above 0, got 0" in done.stderr


def test_generating_hashes_each_file_of_an_artefact_once(digits_onnx, tmp_path, monkeypatch):
    hashed = Counter()

    def counted(path):
        hashed[path] += 1
        return sha256(path)

    monkeypatch.setattr(manifest_file, "sha256", counted)
    generate(digits_onnx, tmp_path / "digit.png", steps=1)
    assert hashed
    assert set(hashed.values()) == {1}


def test_the_command_fails_in_one_line_if_a_graph_has_no_outputs(digits_onnx, tmp_path):
    folder = _edited(digits_onnx, tmp_path / "onnx", lambda model: model.graph.ClearField("output"))
    done = CliRunner().invoke(app, ["verify", str(folder)])
    assert done.exit_code == 1
    assert "unet: it has no outputs" in done.stdout
    assert "all well" not in done.stdout
    done = CliRunner().invoke(app, ["package", "triton", str(folder), "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "it has no outputs" in done.stderr
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, ["generate", str(folder), "-o", str(tmp_path / "out.png")])
    assert done.exit_code == 1
    assert "one output, this one has none" in done.stderr


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"no engine" * 9, "no engine of TensorRT-RTX"),
        (b"vtrt" + bytes(12) + (99).to_bytes(8, "little"), "it was cut"),
        (b"vtrt" + bytes(12) + (24).to_bytes(8, "little"), None),
    ],
)
def test_the_header_of_an_engine_is_checked(content, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_check, "obstacle", lambda _: "no GPU")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.engine").write_bytes(content)
    options = {"backend": "tensorrt-rtx"}
    manifest = Manifest(
        kind="engine",
        files={"unet/model.engine": "0" * 64},
        source=SourceRow(name="onnx", files={}),
        denoiser="unet",
        options=options,
    )
    (problem,) = check_engines(tmp_path, manifest).values()
    assert problem is None if expected is None else expected in problem
