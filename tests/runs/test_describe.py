"""`trtq quantize --dry-run` for pipelines that are calibrated inside their own call."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import LCMScheduler

from tests.families.pipelines import build
from tests.runs.test_memory import half, small_weights_are_large  # noqa: F401
from trtq.calib.recipe import load_recipe
from trtq.errors import UsageError
from trtq.quant.stored_weight import _StoredWeight
from trtq.runs.describe import describe_quantize
from trtq.runs.estimate import estimate_calls
from trtq.runs.plan_calls import plan_calls
from trtq.runs.quantize import quantize

CALL = {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "latent"}


def recipe_of(method="minmax", **changes):
    calibration = {"images": 2, "samples_per_step": 64}
    return load_recipe(
        None, {"method": method, "bits": "w4a8", "calibration": calibration} | changes
    )


@pytest.mark.parametrize("name", ["sd_1", "flux"])
def test_the_plan_is_that_of_the_run(name, tmp_path):
    recipe = recipe_of()
    plan = describe_quantize(build(name), recipe, calls=[CALL])
    made = quantize(build(name), recipe, tmp_path / "run", calls=[CALL])
    assert plan.layers_quantized == made.layers_quantized
    assert plan.layers_float == made.layers_float
    assert plan.bytes_before == made.bytes_before
    assert plan.calibration_images == made.calibration_images == 2
    assert plan.timesteps == 2
    # The size of a header's entry is an upper bound, which counts in a tiny model.
    assert made.bytes_after <= plan.bytes_after < 1.5 * made.bytes_after


def test_a_pipeline_without_noise_levels_in_closed_form_is_planned_by_its_default_call():
    pipeline = build("sd_1")
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    plan = describe_quantize(pipeline, recipe_of(steps=3))
    assert plan.timesteps == 3
    assert plan.layers_quantized > 0


def test_weights_in_their_files_are_planned_like_those_in_memory(half):  # noqa: F811
    recipe = recipe_of(rotate=16)
    whole = describe_quantize(half, recipe, calls=[CALL], memory="100GB")
    stored = describe_quantize(half, recipe, calls=[CALL], memory="1MB")
    for field in ("layers_quantized", "precisions", "bytes_before", "bytes_after", "timesteps"):
        assert getattr(whole, field) == getattr(stored, field)


def test_the_peak_with_weights_in_files_counts_the_largest_layer(half):  # noqa: F811
    plan = plan_calls(half, recipe_of(), [CALL], stored=True)
    (part,) = plan.denoisers
    peaks = [estimate_calls(plan, stored=stored).peak_bytes for stored in (False, True)]
    largest = max(
        math.prod(module.weight.shape)
        for name, module in part.module.named_modules()
        if name in part.plan.calls
    )
    assert peaks[0] - peaks[1] == part.plan.bytes_before() - 16 * largest


def test_the_estimate_reads_no_weights(half, monkeypatch):  # noqa: F811
    plan = plan_calls(half, recipe_of(method="search"), [CALL], stored=True)
    monkeypatch.setattr(_StoredWeight, "forward", lambda *_: pytest.fail("a weight was read"))
    assert estimate_calls(plan, stored=True).seconds > 0
    assert plan.denoisers[0].plan.bytes_after() > 0


def test_more_images_and_updates_take_longer():
    plans = [
        plan_calls(build("sd_1"), recipe_of(method, calibration={"images": images}), [CALL])
        for method, images in (("minmax", 2), ("minmax", 64), ("efficientdm", 64))
    ]
    seconds = [estimate_calls(plan, stored=False).seconds for plan in plans]
    assert seconds[0] < seconds[1] < seconds[2]


def test_an_unknown_argument_of_the_call_is_refused():
    with pytest.raises(UsageError, match="colour"):
        describe_quantize(build("sd_1"), recipe_of(), calls=[CALL | {"colour": "red"}])


def test_a_plan_changes_no_weight():
    pipeline = build("sd_1")
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    describe_quantize(pipeline, recipe_of(), calls=[CALL])
    after = pipeline.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_fine_tuning_takes_the_same_for_a_call_of_one_image_and_of_two():
    """The batch of an update counts images, not calls."""
    recipe = recipe_of("efficientdm", calibration={"images": 2})
    plans = [
        plan_calls(build("sd_1"), recipe, [CALL | {"num_images_per_prompt": number}])
        for number in (1, 2)
    ]
    tuning = []
    for plan in plans:
        with_tuning = estimate_calls(plan, stored=False).peak_bytes
        part = plan.denoisers[0]
        without = replace(part.plan, recipe=part.plan.recipe.model_copy(update={"training": None}))
        plain = replace(plan, denoisers=[replace(part, plan=without)])
        tuning.append(with_tuning - estimate_calls(plain, stored=False).peak_bytes)
    assert tuning[0] == pytest.approx(tuning[1], rel=1e-6)
