"""`trtq bench` on the digits model."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from trtq.artefact.manifest import Manifest, read_manifest, write_manifest
from trtq.bench.page import bench_tables, failures, statements
from trtq.bench.run import benchmark
from trtq.cli import app
from trtq.errors import (
    ArtefactError,
    MeasurementError,
    NonFiniteError,
    TrtqError,
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
    former = folder / "report.json"
    arguments = (f"{digits_onnx}@cpu", "digits", *FEW_ROUNDS, "--batch", 1, "--against", former)
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
    other = run(*arguments[:2], *FEW_ROUNDS, "--steps", 3, "--batch", 1, "--against", former)
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


class StubWorker:
    """Answers like a worker, without work; rows in `dying` fail at the named question."""

    dying: dict[str, str] = {}
    on_gpu: set[str] = set()
    error: type[TrtqError] = MeasurementError
    pace = {"slow": 4e-3, "fast": 1e-3}
    draw_pace: dict[str, float] = {}
    all_questions: list[str] = []

    def __init__(self, module, name):
        self.name = name
        self.questions = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.questions.append("close")

    def ask(self, question, **arguments):
        self.questions.append(question)
        self.all_questions.append(question)
        if self.dying.get(self.name) == question:
            raise self.error(f"{self.name}: its process was killed")
        pace = "slow" if "torch" in self.name else "fast"
        seconds = self.pace[pace]
        draw_seconds = 20 * (self.draw_pace or self.pace)[pace]
        if question == "draw" and arguments["out"] is not None:
            np.save(arguments["out"], np.zeros((arguments["batch"], 1, 2, 2), np.float32))
        memory = {"libraries_bytes": 1, "weights_bytes": 2, "load_peak_bytes": 3}
        return {
            "open": {"load_seconds": 1.0, "memory": memory, "shape": [1, 8, 8], "prompts": None}
            | {"model_class": "UNet2DModel", "parts": ["denoiser"], "guidance": 1.0}
            | {"weight_bytes": 4, "device": "gpu" if self.name in self.on_gpu else "cpu"},
            "prepare": {"first_call_seconds": 1.0, "calls": 2},
            "time": {"seconds": [seconds, seconds]},
            "draw": {"seconds": draw_seconds, "joules": None},
            "memory": {"activations_bytes": 5, "run_peak_bytes": 6},
            "operations": {"operations": 1000},
            "cpu_peak": {"operations": 1e9, "bytes": 1e9, "what": "a stub"},
        }[question]


@pytest.fixture
def stubbed(monkeypatch):
    monkeypatch.setattr("trtq.bench.run.Worker", StubWorker)
    monkeypatch.setattr(StubWorker, "dying", {})
    monkeypatch.setattr(StubWorker, "on_gpu", set())
    return StubWorker


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


def test_the_gate_rejects_too_few_rounds_before_measuring(stubbed, digits_onnx):
    done = run(digits_onnx, "--batch", 1, "--turns", 6, "--gate")
    assert done.exit_code == 2
    assert "6 rounds are too few for a verdict on 2 comparisons" in done.stderr
    assert "use --turns 7 or more" in done.stderr


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


def former(path, digits_onnx, **changes):
    """A result file with some fields changed."""
    measured = benchmark([str(digits_onnx), "digits"], batches=[1], turns=2, threads=1)
    path.write_text(json.dumps(measured.to_json() | changes))
    return path


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
    path = former(tmp_path / "old.json", digits_onnx, **changes)
    stubbed.all_questions.clear()
    done = run(digits_onnx, "digits", "--batch", 1, "--threads", 1, "--against", path)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not {"prepare", "time", "draw"} & set(stubbed.all_questions)


def test_the_comparison_is_shown_as_a_table(stubbed, monkeypatch, digits_onnx, tmp_path):
    path = former(tmp_path / "old.json", digits_onnx)
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


def test_lists_slower_rows_and_the_gate_exits_with_one(stubbed, monkeypatch, digits_onnx):
    monkeypatch.setattr(StubWorker, "pace", {"slow": 1e-3, "fast": 4e-3})
    arguments = (digits_onnx, "--batch", 1, "--turns", 7, "--json")
    plain = run(*arguments)
    assert plain.exit_code == 0
    assert json.loads(plain.stdout)["slower"] == [f"{digits_onnx}@cpu"]
    gated = run(*arguments, "--gate")
    assert gated.exit_code == 1
    assert "slower than float" in gated.stderr


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


@pytest.mark.parametrize("question", ["open", "draw"])
@pytest.mark.parametrize(("error", "code"), [(ArtefactError, 1), (UsageError, 2)])
def test_an_error_if_every_row_fails(stubbed, monkeypatch, question, error, code):
    monkeypatch.setattr(stubbed, "error", error)
    stubbed.dying["digits@torch"] = question
    done = run("digits", "--turns", 2)
    assert done.exit_code == code
    assert "no row could be measured: digits@torch: its process was killed" in done.stderr


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
    manifest = read_manifest(digits_onnx)
    options = manifest.options | {"backend": "tensorrt-rtx", "architectures": ["sm86"]}
    metrics = {"engines": [{"build_seconds": 1.5}, {"build_seconds": 2.0}]}
    update = {"kind": "engine", "options": options, "metrics": metrics, "files": {}}
    engine = tmp_path / "engine"
    engine.mkdir()
    write_manifest(engine, Manifest(**manifest.model_dump() | update))
    measured = benchmark([str(engine), "digits"], batches=[1], turns=2, images=1, threads=1)
    row = measured["rows"][0]
    assert (row["provider"], row["measured"], row["build_seconds"]) == ("tensorrt-rtx", False, 3.5)
    assert row["reason"] == "no GPU for tensorrt-rtx"
