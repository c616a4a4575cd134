"""`trtq verify A --against B` for pipelines that are used through their own call."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.comparison.faults import FAULTS, LAYER, doubled, plant
from tests.comparison.test_compare import repeated
from tests.train.called import WAN, wan
from trtq.calls.form import CallForm
from trtq.calls.user_call import run_call
from trtq.cli import app
from trtq.comparison import judge as judging
from trtq.comparison.compare import compare
from trtq.comparison.recorded_calls import RecordedCalls, record_parts
from trtq.comparison.sides import ordered_sides
from trtq.errors import UsageError
from trtq.exporter.export import export
from trtq.exporter.verify import verify
from trtq.runs.quantize import quantize

RECIPE = {"method": "minmax", "bits": "w4a8", "steps": 4, "calibration": {"images": 1}}


@pytest.fixture(scope="module")
def inpainting_onnx(inpainting_run):
    folder = inpainting_run.parent / "compared-onnx"
    export(inpainting_run, folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A video pipeline with two denoisers: model, run and ONNX folder."""
    folder = tmp_path_factory.mktemp("two")
    wan().save_pretrained(folder / "model")
    call = WAN | {"num_inference_steps": 4}
    quantize(folder / "model", RECIPE, folder / "run", calls=[call])
    export(folder / "run", folder / "onnx")
    return folder


@pytest.fixture(scope="module")
def compared(inpainting_run, inpainting_onnx):
    return compare(inpainting_onnx, inpainting_run, layers=True)


def test_the_figures_are_those_of_the_parity(compared, inpainting_run, inpainting_onnx):
    parity = verify(inpainting_onnx, against=inpainting_run, runtimes=["onnxruntime"])
    assert compared.ok
    assert compared.same_numbers
    assert (compared.reference, compared.other) == ("run (torch)", "compared-onnx (cpu)")
    assert [row.snr_db for row in compared.calls] == pytest.approx(parity.parity_db, abs=0.1)
    assert {row.denoiser for row in compared.calls} == {"unet"}
    # The order of the calls is that of the pipeline: from the noisiest step on.
    timesteps = [row.timestep for row in compared.calls]
    assert timesteps == sorted(timesteps, reverse=True)
    assert len(compared.layers) == 83
    assert compared.first is None


def test_the_table_names_the_denoiser(compared, inpainting_onnx, inpainting_run, monkeypatch):
    monkeypatch.setattr("trtq.comparison.compare.compare", lambda *_, **__: compared)
    arguments = ["verify", str(inpainting_onnx), "--against", str(inpainting_run), "--layers"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    header = [line.split() for line in done.stdout.splitlines() if "denoiser" in line]
    assert [words[:2] for words in header] == [["denoiser", "output"], ["denoiser", "layer"]]
    assert sum(line.startswith("unet ") for line in done.stdout.splitlines()) == 2 + 83


def test_the_inputs_are_those_of_the_users_call(inpainting_run, inpainting_onnx):
    sides = ordered_sides(inpainting_onnx, inpainting_run)
    (part,) = record_parts(sides)
    seen = []
    pipeline = sides[0].source.pipeline
    handle = pipeline.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0].clone()), with_kwargs=True
    )
    run_call(pipeline, sides[0].source.call, 0, "parity")
    handle.remove()
    assert len(seen) == len(part.calls.feeds) == 2
    for sample, feeds in zip(seen, part.calls.feeds, strict=True):
        np.testing.assert_array_equal(feeds["sample"], sample.numpy())
        assert feeds["sample"].shape[1] == 9


@pytest.mark.parametrize("other", ["run", "onnx"])
def test_openvino_agrees_with_torch_and_with_the_cpu_provider(
    other, inpainting_run, inpainting_onnx
):
    against = inpainting_run if other == "run" else inpainting_onnx
    result = compare(inpainting_onnx, against, provider="openvino")
    assert result.ok
    assert result.other == "compared-onnx (openvino)"


@pytest.mark.parametrize("provider", [None, "cpu"])
def test_a_low_bit_model_is_held_to_the_rounding_noise_of_its_formats(
    provider, inpainting_model, inpainting_run, inpainting_onnx
):
    low_bit = inpainting_run if provider is None else inpainting_onnx
    result = compare(low_bit, inpainting_model, provider=provider, layers=True)
    assert result.ok
    assert not result.same_numbers
    assert result.reference == "model (torch)"
    assert result.required_db < 10 < result.snr_db_min
    assert all(row.snr_db < 60 for row in result.layers)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_layers_name_a_planted_fault(fault, inpainting_run, inpainting_onnx, tmp_path):
    """In calls of two images codes flip by themselves, so the output may stay within its bound."""
    folder = plant(inpainting_onnx, tmp_path / "faulty", fault)
    result = compare(folder, inpainting_run, layers=True)
    assert not result.ok
    assert result.first == LAYER


@pytest.mark.slow
def test_bisection_names_a_fault_that_moves_the_output(inpainting_run, inpainting_onnx, tmp_path):
    folder = plant(inpainting_onnx, tmp_path / "faulty", doubled)
    result = compare(folder, inpainting_run, bisect=True)
    assert not result.ok
    assert result.bisection.layers == [LAYER]
    assert f'layers = ["{LAYER}"]' in result.bisection.policy


def test_the_script_repeats_the_comparison_without_trtq(inpainting_run, inpainting_onnx, tmp_path):
    good = compare(inpainting_onnx, inpainting_run, script=tmp_path / "good")
    done = repeated(tmp_path / "good")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Passed: {len(good.calls)}/{len(good.calls)} iterations" in done.stdout
    faulty = plant(inpainting_onnx, tmp_path / "faulty", doubled)
    bad = compare(faulty, inpainting_run, script=tmp_path / "bad")
    done = repeated(tmp_path / "bad")
    assert done.returncode == 1, done.stdout + done.stderr
    passed = sum(row.ok for row in bad.calls)
    assert f"Passed: {passed}/{len(bad.calls)} iterations" in done.stdout


@pytest.mark.slow
def test_several_denoisers_are_compared_one_by_one(two, tmp_path):
    parity = verify(two / "onnx", against=two / "run", runtimes=["onnxruntime"])
    result = compare(two / "onnx", two / "run", layers=True, script=tmp_path / "out")
    assert result.ok
    assert [row.snr_db for row in result.calls] == pytest.approx(parity.parity_db, abs=0.1)
    names = [row.denoiser for row in result.calls]
    assert names == 4 * ["transformer"] + 4 * ["transformer_2"]
    assert [row.denoiser for row in result.layers] == 17 * ["transformer"] + 17 * ["transformer_2"]
    # Each denoiser has its inputs, its graph and its command in a folder of its own.
    assert {"transformer/inputs.json", "transformer_2/model.onnx", "run.sh"} < set(result.files)
    assert "(cd transformer && polygraphy run" in result.command
    assert " && (cd transformer_2 && polygraphy run" in result.command
    against_float = compare(two / "onnx", two / "model")
    assert against_float.ok
    assert {row.denoiser for row in against_float.calls} == {"transformer", "transformer_2"}


def test_a_fault_in_the_second_denoiser_is_found_there(two, tmp_path, monkeypatch):
    """A change of a layer's weights in torch stands for a wrong graph."""
    sides = ordered_sides(two / "onnx", two / "run")
    layer = "blocks.0.ffn.net.2"
    pipeline = sides[0].source.pipeline
    module = pipeline.transformer_2.denoiser.get_submodule(layer)
    module.weight_scale.mul_(2)
    monkeypatch.setattr("trtq.comparison.compare.ordered_sides", lambda *_: sides)
    result = compare(two / "onnx", two / "run", layers=True, bisect=True)
    assert not result.ok
    assert {row.denoiser for row in result.calls if not row.ok} == {"transformer_2"}
    first = next(row for row in result.layers if not row.ok)
    assert (first.denoiser, first.name) == ("transformer_2", layer)
    assert result.bisection.layers == [layer]


def test_a_list_of_images_is_compared_image_by_image(monkeypatch):
    """Some pipelines pass and receive one tensor per image: each output is one whole image."""
    form = CallForm({"x": {"list": [{"tensor": "x.0"}, {"tensor": "x.1"}]}})
    tensors = {"x.0": torch.randn(3, 4), "x.1": torch.randn(3, 4)}
    feeds = {name: value.numpy() for name, value in tensors.items()}
    calls = RecordedCalls([feeds], [1.0], [None], [tensors], form)
    outputs = calls.call(lambda x: [each + 1 for each in x], feeds)
    assert list(outputs) == ["output_0", "output_1"]
    np.testing.assert_array_equal(outputs["output_1"], feeds["x.1"] + 1)
    given = outputs | {"output_1": outputs["output_1"] * 1.5}
    side = dataclasses.make_dataclass("S", ["layers", "provider"])([], "cpu")
    flips = judging.flips_of((side, side), calls, None)
    parities = judging.output_parities(
        calls, [outputs], [given], dict.fromkeys(outputs, 40.0), flips, whole=True
    )
    assert [len(calls.feeds)] == [1]
    assert parities[0].row.db == 200
    assert parities[1].row.db < 10
    assert all(parity.bound.whole for parity in parities)


def test_artefacts_of_other_models_are_refused_in_one_line(
    inpainting_run, digits_run, two, inpainting_model
):
    with pytest.raises(UsageError, match=r"recorded inside its pipeline's call, and .* was not"):
        ordered_sides(inpainting_run, digits_run)
    with pytest.raises(UsageError, match=r"the denoisers differ: .* has unet, and .* transformer"):
        compare(two / "onnx", inpainting_run)
    with pytest.raises(UsageError, match="StableDiffusionInpaintPipeline"):
        compare(two / "onnx", inpainting_model)


def test_a_graph_of_another_call_is_refused_with_the_remedy(
    inpainting_run, inpainting_onnx, tmp_path
):
    other = shutil.copytree(inpainting_run, tmp_path / "run")
    sides = ordered_sides(inpainting_onnx, other)
    call = sides[1].source.call.updated({"height": 32, "width": 32})
    sides[1].source.call = call
    with pytest.raises(UsageError, match="trtq export RUN --size"):
        record_parts(sides)
