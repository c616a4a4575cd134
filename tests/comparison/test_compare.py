"""`trtq verify A --against B`: any two artefacts, compared by polygraphy at every step."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.comparison.faults import FAULTS, LAYER, plant, scale
from trtq.cli import app
from trtq.comparison import compare as module
from trtq.comparison import package
from trtq.comparison.compare import compare
from trtq.comparison.sides import ordered_sides
from trtq.errors import MissingDependencyError, UsageError
from trtq.exporter import step_check
from trtq.exporter.export import export
from trtq.exporter.verify import verify
from trtq.runs.quantize import quantize

FILES = ["accuracy.json", "inputs.json", "results.json"]


@pytest.fixture(scope="module", autouse=True)
def _few_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_check, "_PARITY_IMAGES", (4, 32))
        yield


@pytest.fixture(scope="module")
def compared(digits_run, digits_onnx):
    return compare(digits_onnx, digits_run)


def test_the_figures_are_those_of_the_parity(compared, digits_run, digits_onnx):
    parity = verify(digits_onnx, against=digits_run, runtimes=["onnxruntime"])
    assert compared.ok
    assert compared.same_numbers
    assert compared.reference == "run (torch)"
    assert compared.other == "onnx (cpu)"
    assert [row.snr_db for row in compared.calls] == pytest.approx(parity.parity_db, abs=0.1)
    assert compared.required_db == parity.parity_required_db
    assert [row.timestep for row in compared.calls][-1] is None
    assert [row.timestep for row in compared.calls][:-1] == sorted(
        row.timestep for row in compared.calls[:-1]
    )


@pytest.mark.parametrize("other", [pytest.param("run", marks=pytest.mark.slow), "onnx"])
def test_openvino_agrees_with_torch_and_with_the_cpu_provider(other, digits_run, digits_onnx):
    against = digits_run if other == "run" else digits_onnx
    result = compare(digits_onnx, against, provider="openvino", layers=other == "run")
    assert result.ok
    assert result.other == "onnx (openvino)"
    # OpenVINO's norms are sums in float32, so that codes flip; without them it agrees.
    assert min(row.snr_db for row in result.calls) > 40
    assert len(result.layers or range(51)) == 51
    assert result.first is None


def test_a_low_bit_model_is_held_to_the_rounding_noise_of_its_formats(digits_run):
    result = compare(digits_run, "digits", layers=True)
    assert result.ok
    assert not result.same_numbers
    assert result.reference == "digits (torch)"
    # 51 layers of 4 bits: their noises add up to about the signal.
    assert -3 < result.required_db < 3
    assert result.snr_db_min > result.required_db
    bounds = [row.required_db for row in result.layers]
    assert bounds == sorted(bounds, reverse=True)
    assert all(row.snr_db < 60 for row in result.layers)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=pytest.mark.slow if place else ())
        for place, fault in enumerate(FAULTS)
    ],
    ids=lambda fault: fault.__name__,
)
def test_layers_and_bisection_name_a_planted_fault(fault, digits_run, digits_onnx, tmp_path):
    folder = plant(digits_onnx, tmp_path / "faulty", fault)
    result = compare(folder, digits_run, layers=True, bisect=True)
    assert not result.ok
    assert result.first == LAYER
    assert result.bisection.layers == [LAYER]
    assert result.bisection.snr_db > 60
    assert result.bisection.policy.splitlines()[:3] == [
        "[[rule]]",
        f'layers = ["{LAYER}"]',
        'bits = "float"',
    ]


@pytest.mark.slow
def test_a_planted_fault_is_caught_on_openvino(digits_run, digits_onnx, tmp_path):
    """Codes flip in a third of the images by themselves there; a fault changes all of them."""
    good = compare(digits_onnx, digits_run, provider="openvino")
    faulty = compare(
        plant(digits_onnx, tmp_path / "faulty", scale), digits_run, provider="openvino"
    )
    assert good.ok
    assert not faulty.ok
    assert sum(not row.ok for row in faulty.calls) >= len(faulty.calls) // 2
    # An error of 1 % in one layer is smaller than the flips of the right graph at the first step.
    assert min(row.pooled_db for row in faulty.calls) > 15
    assert min(row.pooled_db for row in good.calls) < 35


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_layers_and_bisection_name_a_planted_fault_on_openvino(
    fault, digits_run, digits_onnx, tmp_path, monkeypatch
):
    # Only with this number of images can one call alone separate a fault from flips.
    monkeypatch.setattr(step_check, "_PARITY_IMAGES", (4, 128))
    folder = plant(digits_onnx, tmp_path / "faulty", fault)
    result = compare(folder, digits_run, provider="openvino", layers=True, bisect=True)
    assert not result.ok
    assert result.first == LAYER
    assert result.bisection.layers == [LAYER]


def test_the_results_are_files_of_polygraphy(compared, digits_run, digits_onnx, tmp_path):
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    result = compare(digits_onnx, digits_run, results=tmp_path / "out")
    assert sorted(set(result.files) - {"trtq-files.json"}) == FILES
    stored = RunResults.load(str(tmp_path / "out" / "results.json"))
    assert list(stored.keys()) == ["run (torch)", "onnx (cpu)"]
    assert len(stored["onnx (cpu)"]) == len(compared.calls)
    accuracy = load_json(str(tmp_path / "out" / "accuracy.json"))
    assert bool(accuracy) == result.ok
    (rows,) = accuracy[0].values()
    assert [row["out_sample"].snr for row in rows] == pytest.approx(
        [row.snr_db for row in result.calls], abs=0.01
    )
    inputs = load_json(str(tmp_path / "out" / "inputs.json"))
    assert set(inputs[0]) == {"sample", "timestep", "class_labels"}
    with pytest.raises(UsageError, match="--overwrite"):
        compare(digits_onnx, digits_run, results=tmp_path / "out")


def repeated(folder):
    """Run the command of a script in a process that knows neither trtq nor this folder."""
    command = (folder / "run.sh").read_text(encoding="utf-8").splitlines()[-1]
    words = shlex.split(command)
    assert words[0] == "polygraphy"
    main = "import sys; from polygraphy.tools import main; sys.exit(main())"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", main, *words[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "trtq" not in (folder / "compare.py").read_text(encoding="utf-8").partition("import")[2]
    return done


@pytest.mark.slow
def test_the_script_repeats_the_comparison_without_trtq(digits_run, digits_onnx, tmp_path):
    good = compare(digits_onnx, digits_run, script=tmp_path / "good")
    assert good.command in (tmp_path / "good" / "run.sh").read_text(encoding="utf-8")
    done = repeated(tmp_path / "good")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Pass Rate: 100.00%" in done.stdout
    faulty = plant(digits_onnx, tmp_path / "faulty", scale)
    bad = compare(faulty, digits_run, script=tmp_path / "bad")
    done = repeated(tmp_path / "bad")
    assert done.returncode == 1, done.stdout + done.stderr
    passed = sum(row.ok for row in bad.calls)
    assert f"Passed: {passed}/{len(bad.calls)} iterations" in done.stdout


def test_a_script_needs_something_that_polygraphy_runs(digits_run, tmp_path):
    with pytest.raises(UsageError, match=r"polygraphy does not run run \(torch\)"):
        compare(digits_run, "digits", script=tmp_path / "script")
    assert not (tmp_path / "script").exists()


def test_models_with_different_inputs_are_refused_in_one_line(digits_onnx):
    done = CliRunner().invoke(app, ["verify", str(digits_onnx), "--against", "shapes"])
    assert done.exit_code == 2
    message = " ".join(done.stderr.split())
    assert (
        "the inputs differ: onnx (cpu) takes sample, timestep, class_labels, and shapes" in message
    )
    assert "compare artefacts of one model" in message


def test_outputs_without_a_common_name_are_refused_in_one_line(
    digits_run, digits_onnx, monkeypatch
):
    from trtq.diffusion.families import Family

    monkeypatch.setattr(Family, "output", property(lambda self: "another"))
    with pytest.raises(
        UsageError, match=r"has the output another, and onnx \(cpu\) has out_sample"
    ):
        compare(digits_onnx, digits_run)


def test_a_missing_and_an_old_polygraphy_are_named_with_the_remedy(
    digits_run, digits_onnx, monkeypatch
):
    monkeypatch.setattr(package.metadata, "version", lambda _: "0.49.26")
    with pytest.raises(MissingDependencyError, match=r"0\.49\.26 is installed.*0\.53\.6 or later"):
        compare(digits_onnx, digits_run)
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'trtq\[polygraphy\]'"):
        compare(digits_onnx, digits_run)


def test_sides_are_ordered_from_the_float_model_on(digits_run, digits_onnx):
    reference, other = ordered_sides(digits_onnx, "digits")
    assert (reference.label, other.label) == ("digits (torch)", "onnx (cpu)")
    reference, other = ordered_sides(digits_onnx, digits_onnx, ("openvino", "cpu"))
    assert (reference.label, other.label) == ("onnx (cpu)", "onnx (openvino)")
    with pytest.raises(UsageError, match=r"both sides are onnx \(cpu\)"):
        ordered_sides(digits_onnx, digits_onnx)
    with pytest.raises(UsageError, match="in torch only, not with openvino"):
        ordered_sides(digits_run, digits_onnx, ("openvino", None))


def test_the_command_prints_a_table_or_json(digits_run, digits_onnx, monkeypatch, compared):
    monkeypatch.setattr(module, "judge", lambda *_: None)
    runner = CliRunner()
    monkeypatch.setattr("trtq.comparison.compare.compare", lambda *_, **__: compared)
    done = runner.invoke(app, ["verify", str(digits_onnx), "--against", str(digits_run)])
    assert done.exit_code == 0, done.output
    assert "onnx (cpu) against run (torch)" in done.stdout
    assert "all well" in done.stdout
    done = runner.invoke(app, ["verify", str(digits_onnx), "--against", str(digits_run), "--json"])
    record = json.loads(done.stdout)
    assert record["ok"]
    assert "layers" not in record
    assert record["calls"][0]["output"] == "out_sample"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bisect"], "--bisect needs --against OTHER"),
        (["--script", "x"], "--script needs --against OTHER"),
        (["--against", "digits", "--run", "run"], "--run does not go with --against"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message, digits_onnx):
    done = CliRunner().invoke(app, ["verify", str(digits_onnx), *arguments])
    assert done.exit_code == 2
    assert message in done.stderr


def test_polygraphy_is_imported_only_when_it_is_used():
    code = (
        "import sys; from trtq.cli import app; import trtq.comparison.compare; "
        "print([name for name in sys.modules if name.startswith('polygraphy')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["shapes", "digits-dit"])
def test_all_pairs_of_the_other_shipped_models_agree_with_the_parity(model, tmp_path):
    settings = {"method": "search", "steps": 4, "calibration": {"images": 16}}
    quantize(model, settings, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "onnx")
    parity = verify(tmp_path / "onnx", against=tmp_path / "run", runtimes=["onnxruntime"])
    result = compare(tmp_path / "onnx", tmp_path / "run", layers=True)
    assert [row.snr_db for row in result.calls] == pytest.approx(parity.parity_db, abs=0.1)
    assert result.ok == parity.ok
    assert result.first is None
    assert compare(tmp_path / "onnx", tmp_path / "run", provider="openvino").ok
    assert compare(tmp_path / "onnx", tmp_path / "onnx", provider="openvino").ok
    assert compare(tmp_path / "onnx", model).ok


def test_bits_of_inputs_do_not_change_in_the_files(digits_run, tmp_path, digits_onnx):
    """A copy of the folder is the same artefact, wherever it lies."""
    shutil.copytree(digits_onnx, tmp_path / "copy")
    result = compare(tmp_path / "copy", digits_onnx)
    assert result.same_numbers
    assert result.ok
    assert np.isclose(result.snr_db_min, 200)


def test_graphs_are_shown_by_polygraphys_inspector(digits_run, digits_onnx):
    from trtq.pipelines.inspect import inspect

    (text,) = inspect(digits_onnx, graphs=True).graphs.values()
    assert "3 Graph Input(s)" in text
    assert "out_sample" in text
    assert inspect(digits_onnx).graphs is None
    with pytest.raises(UsageError, match="has no graphs"):
        inspect(digits_run, graphs=True)
