"""The command `trtq bench` on the digits model, and with stub workers."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from tests.bench.stub_worker import StubWorker, write_result
from trtq.cli import app
from trtq.errors import (
    ArtefactError,
    UsageError,
)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


FEW_ROUNDS = ("--turns", 2, "--images", 1, "--steps", 2, "--threads", 1)


@pytest.fixture(scope="module")
def measured(digits_onnx, tmp_path_factory):
    """JSON result and report of one run: two providers, and the added float model."""
    report = tmp_path_factory.mktemp("bench") / "report"
    providers = ("--provider", "cpu", "--provider", "openvino")
    result = run(digits_onnx, *providers, *FEW_ROUNDS, "--batch", "1,2", "-o", report, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), report


@pytest.mark.slow
def test_measures_every_row_and_adds_the_float_model(measured, digits_onnx):
    result, _ = measured
    labels = [(row["path"], row["provider"], row["added"]) for row in result["rows"]]
    onnx = str(digits_onnx)
    assert labels == [(onnx, "cpu", False), (onnx, "openvino", False), ("digits", "torch", True)]
    assert any("added the float model digits" in note for note in result["notes"])
    for row in result["rows"]:
        latency = row["latency_ms"]
        assert latency["p50"] <= latency["p90"] <= (latency["p99"] or latency["p90"])
        assert (latency["p99"] is None) == (latency["calls"] < 100)
        assert row["device"] == "cpu"
        assert row["images_per_second"] > 0
        assert [entry["batch"] for entry in row["batches"]] == [1, 2]
        assert row["memory"]["peak_bytes"] > row["memory"]["libraries_bytes"] > 1 << 26
        assert row["roofline"]["operations"] == result["rows"][0]["roofline"]["operations"]
    low_bit, float_row = result["rows"][0], result["rows"][-1]
    assert low_bit["bits"] == "w4a4"
    assert 10 < low_bit["psnr_db"] < 60
    assert float_row["psnr_db"] is None
    assert low_bit["speedup"]["baseline"] == "digits@torch"
    assert low_bit["speedup"]["verdict"] == low_bit["images_speedup"]["verdict"] == "too few turns"
    assert low_bit["images_per_second_interval"] is None
    assert float_row["speedup"] is None
    assert result["unjudged"] == result["slower"] == []


@pytest.mark.slow
def test_the_report_has_tables_and_plots(measured):
    _, folder = measured
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "digits@torch" in page
    assert "http" not in page


@pytest.mark.slow
def test_compares_with_an_earlier_result(measured, digits_onnx):
    _, folder = measured
    earlier = folder / "report.json"
    arguments = (f"{digits_onnx}@cpu", "digits", *FEW_ROUNDS, "--batch", 1, "--against", earlier)
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    against = json.loads(result.stdout)["against"]
    onnx = f"{digits_onnx}@cpu"
    assert {row["row"] for row in against["rows"]} == {onnx, "digits@torch"}
    verdicts = {row["what"]: row["verdict"] for row in against["rows"] if row["row"] == onnx}
    assert verdicts["denoiser"] == verdicts["whole images"] == "too few turns"
    assert verdicts["denoiser's files"] == "equal"
    assert {"load", "weights", "activations", "peak memory"} <= set(verdicts)
    assert against["missing"] == [
        f"{digits_onnx}@openvino: only then",
        f"{onnx}, batch 2: only then",
        "digits@torch, batch 2: only then",
    ]
    other = run(*arguments[:2], *FEW_ROUNDS, "--steps", 3, "--batch", 1, "--against", earlier)
    assert other.exit_code == 2
    assert (
        "was measured with steps 2, this run has 3; only results of the same model" in other.stderr
    )


@pytest.mark.slow
def test_rejects_rows_with_different_models():
    result = run("digits", "shapes", *FEW_ROUNDS, "--batch", 1)
    assert result.exit_code == 2
    assert "digits@torch and shapes@torch are different models" in result.stderr


def test_row_names_are_distinguishable_at_80_columns(stubbed, digits_onnx, tmp_path):
    long = "a-name-that-is-much-too-long-for-one-line-of-a-table"
    places = [tmp_path / "folder" / name for name in ("first", "second", long)]
    for place in places:
        shutil.copytree(digits_onnx, place)
    shown = run(*places, "--batch", 1, "--turns", 2).stdout
    assert "first@cpu" in shown
    assert "second@cpu" in shown
    assert "\u2026" not in shown


def test_prints_the_result_if_the_report_cannot_be_written(stubbed, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("trtq.report.folder.write_report", fail)
    done = run("digits", "--batch", 1, "--turns", 2, "--json", "-o", tmp_path / "report")
    assert (done.exit_code, "no space left" in done.stderr) == (1, True)
    assert json.loads(done.stdout)["rows"][0]["measured"]


@pytest.mark.parametrize("name", ["m[/b]", "m[bold]", "m:smile:", "m$^$", "_m"])
def test_row_names_are_shown_unchanged(stubbed, digits_onnx, tmp_path, monkeypatch, name):
    shutil.copytree(digits_onnx, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    done = run(name, "digits", "--batch", "1", "--turns", 2, "-o", "report")
    assert done.exit_code == 0, done.output
    assert f"{name}@cpu" in done.stdout
    assert f"{name}@cpu" in (tmp_path / "report" / "index.html").read_text()


def test_usage_errors_exit_with_two(tmp_path):
    assert run("kernels").exit_code == 2
    assert run().exit_code == 2
    assert run("digits", "--batch", "0").exit_code == 2
    assert run("digits", "--against", tmp_path / "none.json").exit_code == 2
    result = run("--help")
    assert result.exit_code == 0
    assert "Example: trtq bench" in result.stdout


def test_the_gate_rejects_too_few_rounds_before_measuring(stubbed, digits_onnx):
    done = run(digits_onnx, "--batch", 1, "--turns", 6, "--gate")
    assert done.exit_code == 2
    assert "6 rounds are too few for a verdict on 2 comparisons" in done.stderr
    assert "use --turns 7 or more" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": []}, "is not a result of trtq bench: device: Input should be a valid dict"),
        ({"rows": [{}]}, "is not a result of trtq bench: rows.0.path: Field required"),
        ({"steps": 9}, "was measured with steps 9, this run has 4"),
        ({"guidance": 9.5}, "was measured with guidance 9.5, this run has 1.0"),
        ({"shape": [1, 9, 9]}, "was measured with shape [1, 9, 9], this run has [1, 8, 8]"),
        ({"model_class": "DiT"}, "was measured with model_class 'DiT', this run has 'UNet2DModel'"),
    ],
)
def test_rejects_an_incomparable_result_before_measuring(
    stubbed, digits_onnx, tmp_path, changes, message
):
    path = write_result(tmp_path / "old.json", digits_onnx, **changes)
    stubbed.all_questions.clear()
    done = run(digits_onnx, "digits", "--batch", 1, "--threads", 1, "--against", path)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not {"prepare", "time", "draw"} & set(stubbed.all_questions)


def test_lists_slower_rows_and_the_gate_exits_with_one(stubbed, monkeypatch, digits_onnx):
    monkeypatch.setattr(StubWorker, "pace", {"slow": 1e-3, "fast": 4e-3})
    arguments = (digits_onnx, "--batch", 1, "--turns", 7, "--json")
    plain = run(*arguments)
    assert plain.exit_code == 0
    assert json.loads(plain.stdout)["slower"] == [f"{digits_onnx}@cpu"]
    gated = run(*arguments, "--gate")
    assert gated.exit_code == 1
    assert "slower than float" in gated.stderr


@pytest.mark.parametrize("question", ["open", "draw"])
@pytest.mark.parametrize(("error", "code"), [(ArtefactError, 1), (UsageError, 2)])
def test_an_error_if_every_row_fails(stubbed, monkeypatch, question, error, code):
    monkeypatch.setattr(stubbed, "error", error)
    stubbed.dying["digits@torch"] = question
    done = run("digits", "--turns", 2)
    assert done.exit_code == code
    assert "no row could be measured: digits@torch: its process was killed" in done.stderr
