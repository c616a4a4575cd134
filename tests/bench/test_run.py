"""`benchmark` with stub workers."""

from types import SimpleNamespace

import pytest

from tests.bench.stub_worker import StubWorker, write_result
from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_file import write_manifest
from trtq.artefact.opened import open_folder
from trtq.bench.page import bench_tables, failures, statements
from trtq.bench.run import benchmark
from trtq.errors import (
    ArtefactError,
    MeasurementError,
    NonFiniteError,
    UsageError,
)


def test_the_baseline_is_the_fastest_float_row(stubbed, digits_onnx):
    measured = benchmark([str(digits_onnx)], batches=[1, 2], turns=8, images=2, threads=1)
    low_bit, float_row = measured["rows"]
    assert low_bit["latency_ms"]["p50"] == pytest.approx(1.0)
    assert low_bit["speedup"]["ratio"] == pytest.approx(4.0)
    assert low_bit["speedup"]["verdict"] == "faster"
    assert low_bit["images_per_second"] == pytest.approx(50.0)
    assert low_bit["images_per_second_interval"] == pytest.approx([50.0, 50.0])
    assert low_bit["images_speedup"]["ratio"] == pytest.approx(4.0)
    assert low_bit["images_speedup"]["verdict"] == "faster"
    assert low_bit["batches"][1]["batch_of_images"]["calls"] == 8
    assert measured["comparisons"] == 4
    assert (measured["model_class"], measured["shape"]) == ("UNet2DModel", [1, 8, 8])
    assert low_bit["batches"][1]["images_per_second"] == pytest.approx(100.0)
    assert low_bit["psnr_db"] == 100.0
    assert (low_bit["memory"]["weights_bytes"], low_bit["memory"]["peak_bytes"]) == (2, 6)
    assert low_bit["roofline"]["operations_per_second"] == pytest.approx(1e6)
    assert float_row["added"]
    assert measured["slower"] == measured["unjudged"] == measured["undecided"] == []
    assert measured["steps"] == 4


def test_the_default_number_of_rounds_allows_a_verdict(stubbed, digits_onnx):
    few = benchmark([str(digits_onnx)], batches=[1], turns=6, images=1, threads=1)
    assert few["rows"][0]["speedup"]["verdict"] == "too few turns"
    assert few["undecided"] == [f"{digits_onnx}@cpu"]
    many = benchmark([str(digits_onnx)], batches=[1], images=1, threads=1)
    assert (many["turns"], many["undecided"]) == (10, [])
    sizes = range(1, 17)
    large = benchmark([str(digits_onnx)], batches=sizes, images=1, threads=1)
    assert (large["comparisons"], large["turns"], large["undecided"]) == (32, 11, [])


def test_slower_images_count_as_slower(stubbed, monkeypatch, digits_onnx):
    monkeypatch.setattr(StubWorker, "draw_pace", {"slow": 1e-3, "fast": 4e-3})
    measured = benchmark([str(digits_onnx)], batches=[1], images=1, threads=1)
    row = measured["rows"][0]
    verdicts = [row[key]["verdict"] for key in ("speedup", "images_speedup")]
    assert verdicts == ["faster", "slower"]
    assert measured["slower"] == [f"{digits_onnx}@cpu"]
    assert failures(measured) == [f"slower than float: {digits_onnx}@cpu"]


def test_a_note_names_rows_without_a_measured_float_row(stubbed, digits_onnx):
    stubbed.dying["digits@torch"] = "draw"
    lines = statements(benchmark([str(digits_onnx), "digits"], batches=[1], turns=2, threads=1))
    assert f"note: {digits_onnx}@cpu has no baseline: no float row could be measured" in lines


def test_the_comparison_is_shown_as_a_table(stubbed, monkeypatch, digits_onnx, tmp_path):
    path = write_result(tmp_path / "old.json", digits_onnx)
    monkeypatch.setattr(StubWorker, "pace", {"slow": 8e-3, "fast": 1e-3})
    measured = benchmark([str(digits_onnx), "digits"], batches=[1, 2], threads=1, against=path)
    table = bench_tables(measured)[f"compared with {path}"]
    names = [cells[0] for cells in table.rows]
    assert set(names) == {"onnx@cpu", "digits@torch"}
    ours = {cells[2]: cells[-1] for cells in table.rows if cells[0] == "onnx@cpu"}
    assert ours["denoiser, ms"] == "too few turns"
    assert ours["whole images, images/s"] == "within the spread"
    assert ours["denoiser's files, MB"] == "equal"
    lines = statements(measured)
    assert f"not in both results ({path}): {digits_onnx}@cpu, batch 2: only now" in lines


@pytest.mark.parametrize("question", ["open", "prepare", "time", "draw", "memory"])
@pytest.mark.parametrize("error", [MeasurementError, NonFiniteError, ArtefactError, UsageError])
def test_a_failed_row_is_reported_and_other_rows_continue(
    stubbed, monkeypatch, digits_onnx, question, error
):
    label = f"{digits_onnx}@openvino"
    stubbed.dying[label] = question
    monkeypatch.setattr(stubbed, "error", error)
    measured = benchmark(
        [str(digits_onnx)], providers=["cpu", "openvino"], batches=[1], turns=8, images=1, threads=1
    )
    rows = {f"{row['path']}@{row['provider']}": row for row in measured["rows"]}
    assert not rows[label]["measured"]
    assert rows[label]["reason"] == "its process was killed"
    assert rows[label]["latency_ms"] is None
    assert rows[f"{digits_onnx}@cpu"]["measured"]
    assert rows["digits@torch"]["measured"]
    assert failures(measured) == [f"not measured: {label}"]
    assert bench_tables(measured)


@pytest.mark.parametrize(
    ("name", "question"), [("{}@cpu", "operations"), ("the processor's peak", "cpu_peak")]
)
def test_rows_are_kept_without_a_roofline(stubbed, digits_onnx, name, question, caplog):
    stubbed.dying[name.format(digits_onnx)] = question
    measured = benchmark([str(digits_onnx)], batches=[1], turns=2, images=1, threads=1)
    assert [row["measured"] for row in measured["rows"]] == [True, True]
    assert [row["roofline"] for row in measured["rows"]] == [None, None]
    assert f"no {question}" in caplog.text


@pytest.mark.parametrize("provider", ["cuda", "tensorrt-rtx", "tensorrt"])
def test_a_float_row_on_a_different_device_is_not_a_baseline(
    stubbed, monkeypatch, digits_onnx, provider
):
    monkeypatch.setattr("trtq.bench.artefacts.check_provider", lambda provider: None)
    label = f"{digits_onnx}@{provider}"
    stubbed.on_gpu.add(label)
    measured = benchmark([label, "digits"], batches=[1], turns=2, images=1, threads=1)
    assert [row["device"] for row in measured["rows"]] == ["gpu", "cpu"]
    assert measured["rows"][0]["speedup"] is None
    assert measured["unjudged"] == [label]
    assert any(
        "no measured float row runs on the same device" in note for note in measured["notes"]
    )
    assert failures(measured) == [f"not compared with float: {label}"]


def test_a_run_on_a_gpu_has_the_gpu_peak_and_no_cpu_baseline(stubbed, monkeypatch, digits_run):
    name = "NVIDIA GeForce RTX 4090"
    monkeypatch.setattr("trtq.bench.run.Nvml", lambda: SimpleNamespace(name=name, driver="1"))
    label = f"{digits_run}@torch"
    stubbed.on_gpu.add(label)
    measured = benchmark([str(digits_run), "digits"], batches=[1], turns=2, images=1, threads=1)
    on_gpu, on_cpu = measured["rows"]
    assert on_gpu["roofline"]["peak_is"] == "published peak of GeForce RTX 4090, int8, dense"
    assert on_cpu["roofline"]["peak_is"] == "a stub"
    assert (on_gpu["speedup"], measured["unjudged"]) == (None, [label])


def test_an_engine_that_cannot_run_is_an_unmeasured_row(
    stubbed, digits_onnx, tmp_path, monkeypatch
):
    monkeypatch.setattr("trtq.bench.run.obstacle", lambda provider: f"no GPU for {provider}")
    manifest = open_folder(digits_onnx).manifest
    options = manifest.options.to_json() | {"backend": "tensorrt-rtx", "architectures": ["sm86"]}
    metrics = {"engines": [{"build_seconds": 1.5}, {"build_seconds": 2.0}]}
    update = {"kind": "engine", "options": options, "metrics": metrics, "files": {}}
    engine = tmp_path / "engine"
    engine.mkdir()
    write_manifest(engine, Manifest(**manifest.model_dump() | update))
    measured = benchmark([str(engine), "digits"], batches=[1], turns=2, images=1, threads=1)
    row = measured["rows"][0]
    assert (row["provider"], row["measured"], row["build_seconds"]) == ("tensorrt-rtx", False, 3.5)
    assert row["reason"] == "no GPU for tensorrt-rtx"
