"""Calibration inside the user's calls covers every step of every call, and varies what a call varies."""

import pytest
import torch

import trtq
from tests.conftest import tiny_pipeline
from tests.families.pipelines import build
from trtq.calib.recipe import load_recipe
from trtq.runs.folder import open_run
from trtq.runs.plan_calls import plan_calls
from trtq.runs.quantize import quantize


def test_calls_with_different_numbers_of_steps_are_calibrated_to_their_ends(tmp_path):
    recipe = {
        "method": "minmax",
        "bits": "w8a8",
        "calibration": {"images": 2, "samples_per_step": 16},
    }
    calls = [{"prompt": "a", "num_inference_steps": steps} for steps in (1, 3)]
    result = quantize(build("sd_1"), recipe, tmp_path / "run", calls=calls)
    assert result.layers_float == 0
    # One step visits timestep 1, three steps visit 1, 334 and 667.
    assert open_run(tmp_path / "run").table.timesteps.tolist() == [1, 334, 667]


@pytest.mark.parametrize("labels", [2, [2], [0, 2]], ids=["one", "a list of one", "two"])
def test_class_labels_vary_in_the_form_of_the_users_call(labels):
    recipe = load_recipe(None, {"method": "minmax", "steps": 2, "calibration": {"images": 24}})
    plan = plan_calls(tiny_pipeline(), recipe, [{"class_labels": labels}])
    given = [call.arguments["class_labels"] for call in plan.calls]
    count = len(labels) if isinstance(labels, list) else 1
    assert len(given) == 24 // count
    assert given[0] == labels
    assert {type(each) for each in given} == {type(labels)}
    assert {len(each) for each in given if isinstance(each, list)} <= {count}
    seen = {label for each in given for label in (each if isinstance(each, list) else [each])}
    assert seen == {0, 1, 2}


def test_a_class_conditional_model_goes_the_whole_way_inside_its_call(tmp_path):
    recipe = {"method": "minmax", "bits": "w4a8", "steps": 2, "calibration": {"images": 2}}
    trtq.quantize(tiny_pipeline(), recipe, tmp_path / "run", calls=[{"class_labels": [1]}])
    trtq.export(tmp_path / "run", tmp_path / "onnx")
    images = []
    for folder in ("run", "onnx"):
        pipeline = trtq.load(tmp_path / folder)
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        made = pipeline([0, 2], 2, generator=generators, output_type="pt").images
        images.append(made)
    assert torch.equal(*images)
