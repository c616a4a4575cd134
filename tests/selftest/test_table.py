"""`--read`: measured against predicted per row, and bad files as one line each."""

from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

from tests.selftest.samples import sample
from trtq.bench.kernel_prediction import predict_kernels
from trtq.cli import app
from trtq.selftest.predicted import predict_row
from trtq.selftest.record import GpuRow, TrialRow, write_selftest
from trtq.selftest.table import table_lines


def test_the_prediction_of_a_known_gpu_is_that_of_the_benchmark():
    gpu = sample().gpus[0]
    for row in predict_kernels("sm89").rows[:5]:
        assert predict_row(gpu, row.shape, row.form) == row


def test_an_unknown_gpu_is_predicted_by_what_its_driver_reports():
    """The 4090's own numbers under another name predict nearly what its data sheet predicts."""
    described = GpuRow(
        name="NVIDIA GeForce RTX 4091",
        architecture="sm89",
        processors=128,
        memory_bytes=24 << 30,
        clock_mhz=2520,
        memory_mhz=10501,
        bus_bits=384,
        cache_bytes=72 << 20,
    )
    for row in predict_kernels("sm89").rows:
        predicted = predict_row(described, row.shape, row.form)
        assert predicted.product_microseconds == pytest.approx(row.product_microseconds, rel=0.01)
        assert predicted.fp16_microseconds == pytest.approx(row.fp16_microseconds, rel=0.01)
    half = described.model_copy(update={"processors": 64})
    slower = predict_row(half, row.shape, row.form)
    assert slower.fp16_microseconds > 1.8 * row.fp16_microseconds


@pytest.mark.parametrize("missing", ["clock_mhz", "memory_mhz", "bus_bits", "cache_bytes"])
def test_a_gpu_that_is_described_too_little_has_no_prediction(missing):
    values = {"clock_mhz": 2000, "memory_mhz": 9000, "bus_bits": 256, "cache_bytes": 1 << 20}
    fields = {"name": "GPU", "architecture": "sm86", "processors": 30, "memory_bytes": 1 << 30}
    shape = sample().rows[0].shape
    assert predict_row(GpuRow(**fields, **values), shape, "w4a8") is not None
    assert predict_row(GpuRow(**fields, **values | {missing: None}), shape, "w4a8") is None


def test_each_row_has_measured_and_predicted_time_and_their_ratio():
    lines = list(table_lines(sample()))
    predicted = predict_kernels("sm89", ["w4a8"]).rows
    for measured, row in zip(sample().rows, predicted, strict=False):
        both = row.quantise_microseconds + row.product_microseconds
        (line,) = [text for text in lines if f", {measured.shape} |" in text]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1:7] == ["W4A8", "5.0", "16.0", "20.0", "60.0", "3.00"]
        assert cells[7:] == [f"{both:.1f}", f"{20 / both:.2f}", f"{row.speedup:.2f}"]
    text = "\n".join(lines)
    assert "### NVIDIA GeForce RTX 4090 (sm89), trtq 0.1.0, commit 0123456" in text
    assert "1 of 2 checks passed, 0 failed; driver 580 (CUDA 13.0)." in text
    assert "- stage 3, torch, skipped: pip install torch" in text
    assert "W4A8: mean speed-up 3.00, predicted " in text


def test_failures_and_wrong_values_are_in_the_table():
    wrong = sample().rows[0].model_copy(update={"wrong_values": 7})
    bad = TrialRow(stage=2, name="tiles/x", ok=False, seconds=0.1, error="first at channel 3")
    text = "\n".join(table_lines(sample(checks=[bad] * 25, rows=[wrong], complete=False)))
    assert "(7 wrong values)" in text
    assert text.count("- stage 2, tiles/x: first at channel 3") == 20
    assert "- and 5 more" in text
    assert "the command was interrupted" in text


def test_a_file_without_times_and_a_gpu_without_prediction_say_so():
    assert list(table_lines(sample(rows=[])))[-1] == "The file has no times: stage 6 did not run."
    gpu = GpuRow(name="GPU", architecture="sm86", processors=9, memory_bytes=1, tested=True)
    text = "\n".join(table_lines(sample(gpus=[gpu])))
    assert "no prediction for this GPU" in text
    assert "| 3.00 | - | - | - |" in text


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["selftest", *map(str, arguments)])


def test_bad_files_are_one_line_each_and_the_others_are_printed(run, tmp_path):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    write_selftest(good, sample())
    bad.write_text("{")
    done = run("--read", bad, good, tmp_path / "none.json")
    assert done.exit_code == 1
    assert "### NVIDIA GeForce RTX 4090" in done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: cannot read ") for line in lines)
    assert run("--read", good).exit_code == 0
    records = json.loads(run("--read", good, "--json").stdout)
    assert [record["rows"][0]["both"] for record in records["files"]] == [20.0]


def make_folder(path):
    path.mkdir()


BAD_FILES = {
    "a folder": (make_folder, "it is a folder"),
    "a pipe": (os.mkfifo, "it is a named pipe"),
    "another file": (lambda p: p.write_text('{"kind": "run"}'), "is not a file of trtq selftest"),
    "a list": (lambda p: p.write_text("[]"), "must hold a JSON object"),
    "not a number": (lambda p: p.write_text('{"a": NaN}'), "NaN is not a valid JSON number"),
    "deep": (lambda p: p.write_text('{"a": ' + "[" * 99 + "]" * 99 + "}"), "nested more than"),
    "binary": (lambda p: p.write_bytes(b"\x89PNG\x00"), "is not UTF-8"),
    "large": (lambda p: p.write_text(" " * 300_000), "at most 200,000 are allowed"),
    "empty": (lambda p: p.write_text(""), "cannot read"),
}


@pytest.mark.parametrize(("make", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_one_line(run, tmp_path, make, message):
    make(tmp_path / "bad.json")
    done = run("--read", tmp_path / "bad.json")
    assert (done.exit_code, done.stdout) == (1, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--read"], "--read needs files"),
        (["--read", "x.json", "--quick"], "--read only prints"),
        (["x.json"], "is an argument of --read"),
        (["--cases", "nothing*"], "no case has a name like 'nothing*'"),
        (["-o", "none/selftest.json"], "the folder none does not exist"),
    ],
)
def test_wrong_use_is_one_line(run, tmp_path, arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_without_a_driver_there_is_one_line_and_no_file(run, tmp_path):
    done = run("-o", "selftest.json")
    assert done.exit_code == 1
    assert done.stderr == (
        "error: trtq selftest needs an NVIDIA GPU: there is no NVIDIA driver here\n"
    )
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())
