"""The default number of calibration images follows from the size of the model."""

import pytest
import torch

import trtq
from tests.families.pipelines import build
from trtq.artefact.opened import open_folder
from trtq.calib.recipe import load_recipe
from trtq.runs import calibration_images
from trtq.runs.calibration_images import default_images
from trtq.runs.plan import plan_quantize
from trtq.runs.plan_calls import plan_calls

CPU_LIMIT = calibration_images._CPU_MULTIPLICATIONS


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("multiplications", "images"),
    [(0, 64), (CPU_LIMIT / 64, 64), (CPU_LIMIT / 63, 32), (CPU_LIMIT / 8, 8), (CPU_LIMIT, 8)],
)
def test_a_large_model_takes_fewer_images(multiplications, images):
    assert default_images(multiplications) == images


def test_a_gpu_calibrates_more_images(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_images(CPU_LIMIT / 8) == 64


def test_a_plan_counts_all_calls_of_one_image(monkeypatch):
    """A recorded call of two images with guidance: twice the rows of an image, at three steps."""
    pipeline = build("sd_1")
    seen = []
    monkeypatch.setattr(
        calibration_images, "default_images", lambda total: seen.append(total) or 16
    )
    recipe = load_recipe(None, {"method": "minmax"})
    call = {
        "prompt": "a red circle",
        "num_inference_steps": 3,
        "num_images_per_prompt": 2,
        "output_type": "latent",
    }
    plan = plan_calls(pipeline, recipe, [call])
    (part,) = plan.denoisers
    each = sum(layer.multiplications for layer in part.plan.calls.values())
    assert seen == [each * 3 / 2]
    assert plan.recipe.calibration.images == part.plan.recipe.calibration.images == 16
    assert sum(call.images for call in plan.calls) == 16
    single = plan_calls(pipeline, recipe, [call | {"num_images_per_prompt": 1}])
    assert seen[1] == pytest.approx(seen[0])
    assert len(single.calls) == 16


def test_a_plan_with_noise_levels_in_closed_form_counts_guidance(monkeypatch):
    seen = []
    monkeypatch.setattr(calibration_images, "default_images", lambda total: seen.append(total) or 8)
    recipe = {"method": "minmax", "steps": 4}
    plan = plan_quantize("digits", load_recipe(None, recipe | {"guidance": 1.0}))
    plan_quantize("digits", load_recipe(None, recipe | {"guidance": 3.0}))
    each = sum(layer.multiplications for layer in plan.calls.values())
    assert seen == [4 * each, 8 * each]
    assert plan.recipe.calibration.images == 8


def test_a_number_in_the_recipe_is_kept(monkeypatch):
    monkeypatch.setattr(calibration_images, "default_images", pytest.fail)
    recipe = load_recipe(None, {"method": "minmax", "calibration": {"images": 5}})
    assert plan_quantize("digits", recipe).recipe.calibration.images == 5


def test_run_and_plan_say_how_many_images(tmp_path):
    recipe = {"method": "minmax", "bits": "w8a8", "steps": 2}
    made = trtq.quantize("digits", recipe, tmp_path / "run")
    assert made.calibration_images == 64
    manifest = open_folder(tmp_path / "run", "run").manifest
    assert manifest.recipe.calibration.images == manifest.metrics.calibration_images == 64
