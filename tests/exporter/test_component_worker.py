"""Export of text encoders and autoencoder in a second process: same files, errors are raised."""

import contextlib
import json
import subprocess
import sys

import onnx
import pytest

from tests.families.pipelines import build
from trtq import processes
from trtq.artefact.manifest_file import file_hashes
from trtq.errors import ArtefactError, GateError, UsageError
from trtq.exporter import component_worker as parts
from trtq.exporter import export as stage
from trtq.exporter.component_worker import exporting_parts
from trtq.runs.quantize import quantize


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("parts") / "run"
    settings = {"method": "minmax", "steps": 2, "calibration": {"images": 2}}
    quantize(build("sd_1"), settings, out)
    return out


@pytest.fixture
def worthwhile(monkeypatch):
    monkeypatch.setattr(parts, "_WORTH_BYTES", 0)
    monkeypatch.setattr(parts, "processors", lambda: 2)


def does(monkeypatch, body):
    """Make the process run `body` instead; the answer's file is `sys.argv[3]`."""
    code = f"import json, os, sys, time\n{body}"
    monkeypatch.setattr(
        processes, "worker_command", lambda _, *a: [sys.executable, "-c", code, *map(str, a)]
    )


@pytest.mark.slow
def test_a_second_process_writes_the_same_graphs(run, tmp_path, worthwhile):
    second, alone = tmp_path / "second", tmp_path / "alone"
    with exporting_parts(run, second) as waiting:
        result = waiting()
    assert result.parity.keys() == {"text_encoder", "vae_decoder", "vae_encoder"}
    assert result.peak_rss_bytes > 1e8
    assert parts._export(run, alone)["parity"].keys() == result.parity.keys()
    assert len(file_hashes(second)) >= 6
    assert file_hashes(second).keys() == file_hashes(alone).keys()
    for path in second.glob("*/model.onnx"):
        nodes = [
            [(node.op_type, len(node.input)) for node in onnx.load(each).graph.node]
            for each in (path, alone / path.relative_to(second))
        ]
        assert nodes[0] == nodes[1]


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (
            "print('no such thing', file=sys.stderr); sys.exit(3)",
            ArtefactError,
            "3; last output: no such thing",
        ),
        ("os.kill(os.getpid(), 9)", ArtefactError, "because memory ran out"),
        (
            "json.dump({'raised': 'GateError', 'message': 'only 3 dB'}, open(sys.argv[3], 'w'))",
            GateError,
            "only 3 dB",
        ),
    ],
    ids=["crash", "killed", "gate"],
)
def test_errors_of_the_process_are_raised_in_the_parent(
    body, error, message, run, tmp_path, worthwhile, monkeypatch
):
    does(monkeypatch, body)
    with exporting_parts(run, tmp_path) as waiting, pytest.raises(error, match=message):
        waiting()


def test_an_export_whose_components_fail_leaves_no_output(run, tmp_path, worthwhile, monkeypatch):
    does(
        monkeypatch,
        "json.dump({'raised': 'OSError', 'message': 'disk full'}, open(sys.argv[3], 'w'))",
    )
    monkeypatch.setattr(stage, "write_graph", lambda folder, *_, **__: folder.mkdir())
    monkeypatch.setattr(stage, "_compare_with_torch", lambda *_: {})
    with pytest.raises(ArtefactError, match=r"nothing of it is left: (\S+: )?disk full"):
        stage.export(run, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_the_process_ends_with_the_block(run, tmp_path, worthwhile, monkeypatch):
    does(monkeypatch, "time.sleep(600)")
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    with contextlib.suppress(UsageError), exporting_parts(run, tmp_path):
        assert started[0].poll() is None
        raise UsageError("stop")
    assert started[0].poll() is not None


def test_errors_of_reading_are_part_of_the_answer(run, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "X", "unet": ["a", "b"]}))
    answer = parts._export(tmp_path, tmp_path)
    assert answer["raised"] == "ArtefactError"
    assert "only diffusers and transformers are supported" in answer["message"]


@pytest.mark.parametrize(
    ("bytes_", "count"), [(1 << 40, 2), (0, 1)], ids=["small", "one processor"]
)
def test_the_process_is_only_started_if_it_saves_time(bytes_, count, run, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_WORTH_BYTES", bytes_)
    monkeypatch.setattr(parts, "processors", lambda: count)
    with exporting_parts(run, tmp_path) as waiting:
        assert waiting is None


def test_a_pipeline_without_such_components_needs_no_process(digits_run, tmp_path, worthwhile):
    with exporting_parts(digits_run, tmp_path) as waiting:
        assert waiting is None
