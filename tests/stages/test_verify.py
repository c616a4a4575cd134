"""`trtq verify`: files, rules, and the comparison with torch, layer by layer."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from trtq.cli import app
from trtq.errors import ArtefactError, IntegrityError, UsageError
from trtq.stages.verify import verify


def test_a_run_is_opened_and_its_files_counted(digits_run):
    found = verify(digits_run)
    assert found["ok"]
    assert found["kind"] == "run"
    assert found["files"] > 3


def test_a_graph_is_compared_with_its_run_layer_by_layer(digits_run, digits_onnx):
    found = verify(digits_onnx, against=digits_run, layers=True)
    assert found["ok"]
    assert found["parity_db_min"] > 40
    assert len(found["layers"]) == 51
    assert found["first"] is None
    assert min(row["snr_db"] for row in found["layers"]) > 60
    assert set(found["runtimes"]) == {"onnxruntime", "openvino", "tensorrt-rtx", "tensorrt"}


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


def test_wrong_use_says_what_to_do(digits_run, digits_onnx, tmp_path):
    with pytest.raises(UsageError, match="is no artefact"):
        verify(tmp_path)
    with pytest.raises(UsageError, match="choose one of onnxruntime"):
        verify(digits_onnx, runtimes=["tensorflow"])
    with pytest.raises(UsageError, match="--against RUN"):
        verify(digits_onnx, layers=True)
    with pytest.raises(UsageError, match="for ONNX folders"):
        verify(digits_run, against=digits_run)


def test_the_command_says_so_in_json_and_in_words(digits_run, digits_onnx):
    runner = CliRunner()
    done = runner.invoke(app, ["verify", str(digits_onnx), "--runtime", "tensorrt-rtx", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["runtimes"]["tensorrt-rtx"] == {"legal": True, "findings": []}
    done = runner.invoke(app, ["verify", str(digits_run)])
    assert "all well" in done.stdout
    done = runner.invoke(app, ["verify", str(digits_onnx), "--runtime", "nonsense"])
    assert done.exit_code == 2
