"""`trtq bench` on the digits: what it measures, adds, refuses and says."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_file import read_manifest, write_manifest
from trtq.bench.artefacts import (
    Target,
    baseline,
    find_checkpoint,
    parse_batches,
    parse_targets,
)
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


QUICK = ("--turns", 2, "--images", 1, "--steps", 2, "--threads", 1)


@pytest.fixture(scope="module")
def measured(digits_onnx, tmp_path_factory):
    """One run for all that is asked of a result: two providers, and the float model that is added."""
    report = tmp_path_factory.mktemp("bench") / "report"
    providers = ("--provider", "cpu", "--provider", "openvino")
    result = run(digits_onnx, *providers, *QUICK, "--batch", "1,2", "-o", report, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), report


@pytest.mark.slow
def test_every_row_is_measured_and_float_stands_beside(measured, digits_onnx):
    found, _ = measured
    labels = [(row["path"], row["provider"], row["added"]) for row in found["rows"]]
    onnx = str(digits_onnx)
    assert labels == [(onnx, "cpu", False), (onnx, "openvino", False), ("digits", "torch", True)]
    assert any("added the float model digits" in note for note in found["notes"])
    for row in found["rows"]:
        latency = row["latency_ms"]
        assert latency["p50"] <= latency["p90"] <= (latency["p99"] or latency["p90"])
        assert (latency["p99"] is None) == (latency["calls"] < 100)
        assert row["device"] == "cpu"
        assert row["images_per_second"] > 0
        assert [one["batch"] for one in row["batches"]] == [1, 2]
        assert row["memory"]["peak_bytes"] > row["memory"]["libraries_bytes"] > 1 << 26
        assert row["roofline"]["operations"] == found["rows"][0]["roofline"]["operations"]
    low_bit, float_row = found["rows"][0], found["rows"][-1]
    assert low_bit["bits"] == "w4a4"
    assert 10 < low_bit["psnr_db"] < 60
    assert float_row["psnr_db"] is None
    assert low_bit["speedup"]["baseline"] == "digits@torch"
    assert low_bit["speedup"]["verdict"] == low_bit["images_speedup"]["verdict"] == "too few turns"
    assert low_bit["images_per_second_interval"] is None
    assert float_row["speedup"] is None
    assert found["unjudged"] == found["slower"] == []


@pytest.mark.slow
def test_the_report_holds_tables_and_plots(measured):
    _, folder = measured
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "digits@torch" in page
    assert "http" not in page


@pytest.mark.slow
def test_a_former_result_is_compared_with(measured, digits_onnx):
    _, folder = measured
    former = folder / "report.json"
    arguments = (f"{digits_onnx}@cpu", "digits", *QUICK, "--batch", 1, "--against", former)
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    against = json.loads(result.stdout)["against"]
    onnx = f"{digits_onnx}@cpu"
    assert {row["row"] for row in against["rows"]} == {onnx, "digits@torch"}
    told = {row["what"]: row["verdict"] for row in against["rows"] if row["row"] == onnx}
    assert told["denoiser"] == told["whole images"] == "too few turns"
    assert told["denoiser's files"] == "equal"
    assert {"load", "weights", "activations", "peak memory"} <= set(told)
    assert against["missing"] == [
        f"{digits_onnx}@openvino: only then",
        f"{onnx}, batch 2: only then",
        "digits@torch, batch 2: only then",
    ]
    other = run(*arguments[:2], *QUICK, "--steps", 3, "--batch", 1, "--against", former)
    assert other.exit_code == 2
    assert "was measured with steps 2, here it is 3; only the same model" in other.stderr


@pytest.mark.slow
def test_different_models_do_not_stand_side_by_side():
    result = run("digits", "shapes", *QUICK, "--batch", 1)
    assert result.exit_code == 2
    assert "digits@torch and shapes@torch are different models" in result.stderr


def test_providers_of_paths(digits_run, digits_onnx):
    onnx, run_folder = str(digits_onnx), str(digits_run)
    found = parse_targets([f"{onnx}@openvino", onnx, run_folder, "digits"], ["cpu"])
    assert [(one.path, one.provider) for one in found] == [
        (onnx, "openvino"),
        (onnx, "cpu"),
        (run_folder, "torch"),
        ("digits", "torch"),
    ]
    assert [one.kind for one in found] == ["onnx", "onnx", "run", "checkpoint"]
    assert [one.low_bit for one in found] == [True, True, True, False]
    assert found[0].denoiser_bytes > found[2].denoiser_bytes > 1e5


def test_a_provider_with_a_package_of_its_own_is_offered_where_that_is_installed(
    digits_onnx, tmp_path, monkeypatch
):
    text = f"{digits_onnx}@tensorrt-rtx"
    with pytest.raises(UsageError, match="has no provider 'tensorrt-rtx'"):
        parse_targets([text])
    (tmp_path / "onnxruntime_ep_nv_tensorrt_rtx.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert parse_targets([text])[0].provider == "tensorrt-rtx"


def test_a_folder_with_an_at_sign_is_a_folder(digits_run, tmp_path):
    folder = tmp_path / "run@home"
    shutil.copytree(digits_run, folder)
    (target,) = parse_targets([str(folder)])
    assert (target.path, target.provider) == (str(folder), "torch")


@pytest.mark.parametrize(
    ("paths", "providers", "error", "message"),
    [
        (["{onnx}@torch"], [], UsageError, "an ONNX folder, which torch cannot run; choose one of"),
        (["digits@cpu"], [], UsageError, "a float checkpoint, which cpu cannot run"),
        (["digits@tpu"], [], UsageError, "unknown provider 'tpu'"),
        (["{onnx}"], ["tpu"], UsageError, "unknown provider 'tpu'"),
        (["{onnx}@cuda"], [], UsageError, "has no provider 'cuda'"),
        (["{onnx}", "{onnx}@cpu"], [], UsageError, "is given twice"),
        (["kernels"], [], UsageError, "is no path here; write ./kernels"),
        (["nothing"], [], ArtefactError, "there is no model 'nothing'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(
    digits_onnx, paths, providers, error, message
):
    with pytest.raises(error, match=message):
        parse_targets([path.format(onnx=digits_onnx) for path in paths], providers)


@pytest.mark.parametrize(
    ("files", "size"),
    [
        ({"diffusion_pytorch_model.safetensors": 30}, 30),
        (
            {
                "diffusion_pytorch_model.safetensors": 30,
                "diffusion_pytorch_model.fp16.safetensors": 15,
                "diffusion_pytorch_model.non_ema.safetensors": 30,
                "diffusion_pytorch_model.bin": 31,
            },
            30,
        ),
        ({"diffusion_pytorch_model.fp16.safetensors": 15}, None),
        ({"diffusion_pytorch_model.bin": 31}, None),
        (
            {
                "diffusion_pytorch_model.safetensors.index.json": {
                    "weight_map": {"a": "1", "b": "2"}
                },
                "1": 5,
                "2": 7,
                "3": 9,
            },
            12,
        ),
        ({"diffusion_pytorch_model.safetensors.index.json": {"weight_map": {"a": "1"}}}, None),
        ({"diffusion_pytorch_model.safetensors.index.json": []}, None),
        ({}, None),
    ],
)
def test_the_size_of_a_checkpoint_is_that_of_what_is_loaded(tmp_path, files, size):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    for name, content in files.items():
        data = bytes(content) if isinstance(content, int) else json.dumps(content).encode()
        (tmp_path / "unet" / name).write_bytes(data)
    assert Target(str(tmp_path), "torch").denoiser_bytes == size


@pytest.mark.parametrize("text", ["0", "a", "1,1", "", "1,,2"])
def test_batches_are_understood_or_refused(text):
    assert parse_batches("1,4") == (1, 4)
    with pytest.raises(UsageError, match=r"write e\.g\. 1 or 1,4"):
        parse_batches(text)


def test_the_checkpoint_is_followed_through_the_run(digits_run, digits_onnx, tmp_path):
    manifest = read_manifest(digits_onnx)
    assert find_checkpoint(digits_onnx, manifest) == "digits"
    # A run of that name that is another one does not count.
    alone = tmp_path / "onnx"
    shutil.copytree(digits_onnx, alone)
    assert find_checkpoint(alone, manifest) is None
    notes = []
    assert baseline(parse_targets([str(alone)]), notes) == []
    assert "was not found (it was made from 'run'); give it as one more PATH" in notes[0]


def test_a_changed_checkpoint_is_not_the_baseline(digits_run):
    manifest = read_manifest(digits_run)
    files = manifest.source.files | {"model_index.json": "0" * 64}
    source = manifest.source.model_copy(update={"files": files})
    changed = manifest.model_copy(update={"source": source})
    assert find_checkpoint(digits_run, changed) is None


def test_nothing_is_added_where_a_float_row_is_asked_for(digits_run):
    notes = []
    assert baseline(parse_targets([str(digits_run), "digits"]), notes) == []
    assert notes == []


def row(path, *, low_bit=True, verdict="faster", images=None, measured=True):
    summary = {"p50": 2.0, "q1": 1.0, "q3": 3.0, "p90": 4.0, "p99": None, "calls": 60}
    speedup = {"baseline": "digits@torch", "ratio": 0.5, "low": 0.4, "high": 0.6}
    speedup["verdict"] = verdict
    one = {"batch": 1, "parts": {"denoiser": summary}, "images_per_second": 3.0}
    one |= {"joules_per_image": 1.5, "speedup": speedup if low_bit else None}
    one |= {"images_per_second_interval": [2.0, 4.0], "batch_of_images": summary | {"calls": 8}}
    one |= {"images_speedup": one["speedup"] and one["speedup"] | {"verdict": images or verdict}}
    found = {"path": path, "provider": "cpu", "bits": "w8a8", "low_bit": low_bit}
    found |= {"measured": measured, "reason": None if measured else "its process was killed"}
    found |= {"batches": [one] if measured else [], "speedup": one["speedup"], "psnr_db": 30.0}
    found |= {"load_seconds": 1.0, "build_seconds": None, "denoiser_bytes": 10, "roofline": None}
    return found | {"memory": {"gpu_bytes": 5 << 20}}


def result(*rows, slower=(), unjudged=(), undecided=()):
    found = {"rows": list(rows), "notes": ["see there"], "against": None}
    found |= {"undecided": list(undecided)}
    return found | {"slower": list(slower), "unjudged": list(unjudged)}


def test_slower_is_said_plainly_and_fails_the_gate():
    found = result(row("onnx", verdict="slower", images="within the spread"), slower=["onnx@cpu"])
    lines = statements(found)
    assert lines[0] == "onnx@cpu, batch 1, one step: SLOWER than digits@torch: 0.50 x (0.40-0.60)"
    assert lines[1] == (
        "onnx@cpu, batch 1, whole images: no faster or slower, beyond the spread, than digits@torch: "
        "0.50 x (0.40-0.60), at 30.0 dB"
    )
    assert lines[-1] == "note: see there"
    assert failures(found) == ["slower than float: onnx@cpu"]
    assert failures(result(row("onnx"))) == []


def test_what_was_not_measured_or_compared_fails_the_gate():
    lost = result(row("onnx", measured=False))
    assert failures(lost) == ["not measured: onnx@cpu"]
    assert "onnx@cpu: not measured: its process was killed" in statements(lost)
    assert failures(result(row("onnx"), unjudged=["onnx@cuda"])) == [
        "not compared with float: onnx@cuda"
    ]
    assert failures(result(row("onnx"), undecided=["onnx@cpu"])) == [
        "too few turns to tell it from float: onnx@cpu"
    ]
    assert failures(result(row("digits", low_bit=False))) == [
        "no low-bit row at all: nothing to judge"
    ]


def test_the_tables_show_gpu_and_energy_where_they_were_counted():
    tables = bench_tables(result(row("onnx"), row("gone", measured=False)))
    memory = tables["loading, memory in MB, share of the device"]
    assert memory.header[-2:] == ("GPU", "J per image")
    assert memory.rows[0][-1] == "1.5"
    shares = [cells[memory.header.index("of peak")] for cells in memory.rows]
    assert shares == ["not known", "-"]
    for table in tables.values():
        assert all(len(cells) == len(table.header) for cells in table.rows)


def test_how_many_calls_a_number_comes_from_is_shown():
    tables = bench_tables(result(row("onnx")))
    step, images = tables["one denoising step"], tables["whole images"]
    shown = dict(zip(step.header, step.rows[0], strict=True))
    assert (shown["p90"], shown["p99"], shown["calls"]) == ("4", "not measured", "60")
    shown = dict(zip(images.header, images.rows[0], strict=True))
    assert (shown["images/s"], shown["draws"]) == ("3 (2-4)", "8")
    assert shown["to float"] == "0.50 x (0.40-0.60)"


@pytest.mark.parametrize(
    ("paths", "names", "shared"),
    [
        (["/tmp/w/a/onnx", "/tmp/w/b/onnx"], ["a/onnx", "b/onnx"], "/tmp/w"),
        (["/tmp/w/onnx", "digits"], ["onnx", "digits"], "/tmp/w"),
        (["runs/a/", "runs/b"], ["a", "b"], "runs"),
        (["../a", "../b"], ["a", "b"], ".."),
        (["onnx", "float"], ["onnx", "float"], ""),
        (["./onnx", "./float"], ["./onnx", "./float"], ""),
        (["/a/onnx", "/b/onnx"], ["/a/onnx", "/b/onnx"], ""),
        (["/a/onnx", "b/onnx"], ["/a/onnx", "b/onnx"], ""),
        (["/tmp/w/digits", "digits"], ["/tmp/w/digits", "digits"], ""),
    ],
)
def test_tables_leave_out_what_all_names_begin_with(paths, names, shared):
    found = result(*(row(path) for path in paths))
    for table in bench_tables(found).values():
        assert [cells[0] for cells in table.rows] == [f"{name}@cpu" for name in names]
    assert [line for line in statements(found) if "names in the tables" in line] == (
        [f"names in the tables are below {shared}"] if shared else []
    )


def test_rows_of_one_folder_can_be_told_apart_at_80_columns(stubbed, digits_onnx, tmp_path):
    long = "a-name-that-is-much-too-long-for-one-line-of-a-table"
    places = [tmp_path / "folder" / name for name in ("first", "second", long)]
    for place in places:
        shutil.copytree(digits_onnx, place)
    shown = run(*places, "--batch", 1, "--turns", 2).stdout
    assert "first@cpu" in shown
    assert "second@cpu" in shown
    assert "\u2026" not in shown


def test_a_report_that_cannot_be_written_costs_no_result(stubbed, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("trtq.report.folder.write_report", fail)
    found = run("digits", "--batch", 1, "--turns", 2, "--json", "-o", tmp_path / "report")
    assert (found.exit_code, "no space left" in found.stderr) == (1, True)
    assert json.loads(found.stdout)["rows"][0]["measured"]


@pytest.mark.parametrize("name", ["m[/b]", "m[bold]", "m:smile:", "m$^$", "_m"])
def test_names_are_shown_as_they_are(stubbed, digits_onnx, tmp_path, monkeypatch, name):
    shutil.copytree(digits_onnx, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found = run(name, "digits", "--batch", "1", "--turns", 2, "-o", "report")
    assert found.exit_code == 0, found.output
    assert f"{name}@cpu" in found.stdout
    assert f"{name}@cpu" in (tmp_path / "report" / "index.html").read_text()


def test_wrong_use_exits_with_two(tmp_path):
    assert run("kernels").exit_code == 2
    assert run().exit_code == 2
    assert run("digits", "--batch", "0").exit_code == 2
    assert run("digits", "--against", tmp_path / "none.json").exit_code == 2
    result = run("--help")
    assert result.exit_code == 0
    assert "Example: trtq bench" in result.stdout


class StubWorker:
    """Answers like a worker at once; rows named in `dying` end in the middle."""

    dying: dict[str, str] = {}
    on_gpu: set[str] = set()
    error: type[TrtqError] = MeasurementError
    pace = {"slow": 4e-3, "fast": 1e-3}
    draw_pace: dict[str, float] = {}
    asked_of_all: list[str] = []

    def __init__(self, module, name):
        self.name = name
        self.asked = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.asked.append("close")

    def ask(self, question, **arguments):
        self.asked.append(question)
        self.asked_of_all.append(question)
        if self.dying.get(self.name) == question:
            raise self.error(f"{self.name}: its process was killed")
        pace = "slow" if "torch" in self.name else "fast"
        seconds = self.pace[pace]
        drawing = 20 * (self.draw_pace or self.pace)[pace]
        if question == "draw" and arguments["out"] is not None:
            np.save(arguments["out"], np.zeros((arguments["batch"], 1, 2, 2), np.float32))
        memory = {"libraries_bytes": 1, "weights_bytes": 2, "load_peak_bytes": 3}
        return {
            "open": {"load_seconds": 1.0, "memory": memory, "shape": [1, 8, 8], "prompts": None}
            | {"model_class": "UNet2DModel", "parts": ["denoiser"], "guidance": 1.0}
            | {"weight_bytes": 4, "device": "gpu" if self.name in self.on_gpu else "cpu"},
            "prepare": {"first_call_seconds": 1.0, "calls": 2},
            "time": {"seconds": [seconds, seconds]},
            "draw": {"seconds": drawing, "joules": None},
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


def test_speed_is_told_against_the_fastest_float_row(stubbed, digits_onnx):
    found = benchmark([str(digits_onnx)], batches=[1, 2], turns=8, images=2, threads=1)
    low_bit, float_row = found["rows"]
    assert low_bit["latency_ms"]["p50"] == pytest.approx(1.0)
    assert low_bit["speedup"]["ratio"] == pytest.approx(4.0)
    assert low_bit["speedup"]["verdict"] == "faster"
    assert low_bit["images_per_second"] == pytest.approx(50.0)
    assert low_bit["images_per_second_interval"] == pytest.approx([50.0, 50.0])
    assert low_bit["images_speedup"]["ratio"] == pytest.approx(4.0)
    assert low_bit["images_speedup"]["verdict"] == "faster"
    assert low_bit["batches"][1]["batch_of_images"]["calls"] == 8
    assert found["comparisons"] == 4
    assert (found["model_class"], found["shape"]) == ("UNet2DModel", [1, 8, 8])
    assert low_bit["batches"][1]["images_per_second"] == pytest.approx(100.0)
    assert low_bit["psnr_db"] == 100.0
    assert (low_bit["memory"]["weights_bytes"], low_bit["memory"]["peak_bytes"]) == (2, 6)
    assert low_bit["roofline"]["operations_per_second"] == pytest.approx(1e6)
    assert float_row["added"]
    assert found["slower"] == found["unjudged"] == found["undecided"] == []
    assert found["steps"] == 4


def test_turns_are_as_many_as_a_verdict_needs(stubbed, digits_onnx):
    few = benchmark([str(digits_onnx)], batches=[1], turns=6, images=1, threads=1)
    assert few["rows"][0]["speedup"]["verdict"] == "too few turns"
    assert few["undecided"] == [f"{digits_onnx}@cpu"]
    many = benchmark([str(digits_onnx)], batches=[1], images=1, threads=1)
    assert (many["turns"], many["undecided"]) == (10, [])
    sizes = range(1, 17)
    most = benchmark([str(digits_onnx)], batches=sizes, images=1, threads=1)
    assert (most["comparisons"], most["turns"], most["undecided"]) == (32, 11, [])


def test_the_gate_does_not_begin_with_too_few_turns(stubbed, digits_onnx):
    found = run(digits_onnx, "--batch", 1, "--turns", 6, "--gate")
    assert found.exit_code == 2
    assert "6 turns are too few to tell slower from chance in 2 comparisons" in found.stderr
    assert "at least 7 turns" in found.stderr


def test_images_that_are_slower_count_as_slower(stubbed, monkeypatch, digits_onnx):
    monkeypatch.setattr(StubWorker, "draw_pace", {"slow": 1e-3, "fast": 4e-3})
    found = benchmark([str(digits_onnx)], batches=[1], images=1, threads=1)
    row = found["rows"][0]
    verdicts = [row[key]["verdict"] for key in ("speedup", "images_speedup")]
    assert verdicts == ["faster", "slower"]
    assert found["slower"] == [f"{digits_onnx}@cpu"]
    assert failures(found) == [f"slower than float: {digits_onnx}@cpu"]


def test_float_rows_that_cannot_be_measured_are_said_to_be_missing(stubbed, digits_onnx):
    stubbed.dying["digits@torch"] = "draw"
    lines = statements(benchmark([str(digits_onnx), "digits"], batches=[1], turns=2, threads=1))
    assert (
        f"note: {digits_onnx}@cpu is compared with nothing: no float row could be measured" in lines
    )


def former(path, digits_onnx, **changes):
    """A result on disk, with some of its fields changed."""
    found = (
        benchmark([str(digits_onnx), "digits"], batches=[1], turns=2, threads=1).to_json() | changes
    )
    path.write_text(json.dumps(found))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": []}, "is no result of trtq bench: device: Input should be a valid dict"),
        ({"rows": [{}]}, "is no result of trtq bench: rows.0.path: Field required"),
        ({"steps": 9}, "was measured with steps 9, here it is 4"),
        ({"guidance": 9.5}, "was measured with guidance 9.5, here it is 1.0"),
        ({"shape": [1, 9, 9]}, "was measured with shape [1, 9, 9], here it is [1, 8, 8]"),
        ({"model_class": "DiT"}, "was measured with model_class 'DiT', here it is 'UNet2DModel'"),
    ],
)
def test_a_result_that_does_not_compare_is_refused_before_measuring(
    stubbed, digits_onnx, tmp_path, changes, message
):
    path = former(tmp_path / "old.json", digits_onnx, **changes)
    stubbed.asked_of_all.clear()
    found = run(digits_onnx, "digits", "--batch", 1, "--threads", 1, "--against", path)
    assert found.exit_code == 2, found.output
    assert message in found.stderr
    assert not {"prepare", "time", "draw"} & set(stubbed.asked_of_all)


def test_the_comparison_is_shown_with_plain_words(stubbed, monkeypatch, digits_onnx, tmp_path):
    path = former(tmp_path / "old.json", digits_onnx)
    monkeypatch.setattr(StubWorker, "pace", {"slow": 8e-3, "fast": 1e-3})
    found = benchmark([str(digits_onnx), "digits"], batches=[1, 2], threads=1, against=path)
    table = bench_tables(found)[f"against {path}"]
    names = [cells[0] for cells in table.rows]
    assert set(names) == {"onnx@cpu", "digits@torch"}
    ours = {cells[2]: cells[-1] for cells in table.rows if cells[0] == "onnx@cpu"}
    assert ours["denoiser, ms"] == "too few turns"
    assert ours["whole images, images/s"] == "within the spread"
    assert ours["denoiser's files, MB"] == "equal"
    lines = statements(found)
    assert f"not on both sides of {path}: {digits_onnx}@cpu, batch 2: only now" in lines


def test_slower_rows_are_listed_and_the_gate_exits_with_one(stubbed, monkeypatch, digits_onnx):
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
def test_a_row_that_fails_is_told_and_the_others_go_on(
    stubbed, monkeypatch, digits_onnx, question, error
):
    label = f"{digits_onnx}@openvino"
    stubbed.dying[label] = question
    monkeypatch.setattr(stubbed, "error", error)
    found = benchmark(
        [str(digits_onnx)], providers=["cpu", "openvino"], batches=[1], turns=8, images=1, threads=1
    )
    rows = {f"{row['path']}@{row['provider']}": row for row in found["rows"]}
    assert not rows[label]["measured"]
    assert rows[label]["reason"] == "its process was killed"
    assert rows[label]["latency_ms"] is None
    assert rows[f"{digits_onnx}@cpu"]["measured"]
    assert rows["digits@torch"]["measured"]
    assert failures(found) == [f"not measured: {label}"]
    assert bench_tables(found)


@pytest.mark.parametrize(
    ("name", "question"), [("{}@cpu", "operations"), ("the processor's peak", "cpu_peak")]
)
def test_a_roof_that_cannot_be_found_costs_no_row(stubbed, digits_onnx, name, question, caplog):
    stubbed.dying[name.format(digits_onnx)] = question
    found = benchmark([str(digits_onnx)], batches=[1], turns=2, images=1, threads=1)
    assert [row["measured"] for row in found["rows"]] == [True, True]
    assert [row["roofline"] for row in found["rows"]] == [None, None]
    assert f"no {question}" in caplog.text


@pytest.mark.parametrize("question", ["open", "draw"])
@pytest.mark.parametrize(("error", "code"), [(ArtefactError, 1), (UsageError, 2)])
def test_nothing_measured_is_an_error(stubbed, monkeypatch, question, error, code):
    monkeypatch.setattr(stubbed, "error", error)
    stubbed.dying["digits@torch"] = question
    found = run("digits", "--turns", 2)
    assert found.exit_code == code
    assert "no row could be measured: digits@torch: its process was killed" in found.stderr


@pytest.mark.parametrize("provider", ["cuda", "tensorrt-rtx", "tensorrt"])
def test_a_float_model_of_another_device_is_no_baseline(
    stubbed, monkeypatch, digits_onnx, provider
):
    monkeypatch.setattr("trtq.bench.artefacts.check_provider", lambda provider: None)
    label = f"{digits_onnx}@{provider}"
    stubbed.on_gpu.add(label)
    found = benchmark([label, "digits"], batches=[1], turns=2, images=1, threads=1)
    assert [row["device"] for row in found["rows"]] == ["gpu", "cpu"]
    assert found["rows"][0]["speedup"] is None
    assert found["unjudged"] == [label]
    assert any("runs on another device than every float row" in note for note in found["notes"])
    assert failures(found) == [f"not compared with float: {label}"]


def test_a_run_on_the_gpu_has_the_gpu_s_roof_and_no_cpu_baseline(stubbed, monkeypatch, digits_run):
    name = "NVIDIA GeForce RTX 4090"
    monkeypatch.setattr("trtq.bench.run.Nvml", lambda: SimpleNamespace(name=name, driver="1"))
    label = f"{digits_run}@torch"
    stubbed.on_gpu.add(label)
    found = benchmark([str(digits_run), "digits"], batches=[1], turns=2, images=1, threads=1)
    on_gpu, on_cpu = found["rows"]
    assert on_gpu["roofline"]["peak_is"] == "published peak of GeForce RTX 4090, int8, dense"
    assert on_cpu["roofline"]["peak_is"] == "a stub"
    assert (on_gpu["speedup"], found["unjudged"]) == (None, [label])


def test_engines_stand_there_unmeasured(stubbed, digits_onnx, tmp_path, monkeypatch):
    monkeypatch.setattr("trtq.bench.run.obstacle", lambda provider: f"no GPU for {provider}")
    manifest = read_manifest(digits_onnx)
    options = manifest.options.to_json() | {"backend": "tensorrt-rtx", "architectures": ["sm86"]}
    metrics = {"engines": [{"build_seconds": 1.5}, {"build_seconds": 2.0}]}
    update = {"kind": "engine", "options": options, "metrics": metrics, "files": {}}
    engine = tmp_path / "engine"
    engine.mkdir()
    write_manifest(engine, Manifest(**manifest.model_dump() | update))
    found = benchmark([str(engine), "digits"], batches=[1], turns=2, images=1, threads=1)
    row = found["rows"][0]
    assert (row["provider"], row["measured"], row["build_seconds"]) == ("tensorrt-rtx", False, 3.5)
    assert row["reason"] == "no GPU for tensorrt-rtx"
