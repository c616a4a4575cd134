"""The default call of a pipeline that is recorded without the user's own call."""

import pytest

from tests.families.pipelines import build
from trtq.calib.recipe import Recipe
from trtq.calls.user_call import run_call
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.prompts import PromptSet
from trtq.runs.given_calls import user_calls


def opened(name, denoiser, prompts=None):
    return LoadedPipeline(name, None, build(name), denoiser, prompts)


def test_a_class_conditional_model_of_ten_classes_runs_with_its_default_call():
    # DiTPipeline's default guidance takes label 1000 for "no class".
    source = opened("dit", "transformer")
    (call,) = user_calls(source, recipe=Recipe(method="minmax", steps=2))
    assert call.arguments == {
        "class_labels": [0],
        "guidance_scale": 1.0,
        "num_inference_steps": 2,
    }
    assert len(run_call(source.pipeline, call, 0, "image").images) == 1


@pytest.mark.parametrize(
    ("prompts", "given", "expected"),
    [
        (PromptSet(guidance=3.5, calibration=("a hill",)), None, 3.5),
        (PromptSet(guidance=3.5, calibration=("a hill",)), 2.0, 2.0),
        (None, None, None),
    ],
    ids=["the model's prompts", "the user's guidance", "general prompts"],
)
def test_a_default_call_passes_the_guidance_of_the_user_else_of_the_model(prompts, given, expected):
    source = opened("sd_1", "unet", prompts)
    (call,) = user_calls(source, recipe=Recipe(method="minmax", guidance=given))
    assert call.arguments.get("guidance_scale") == expected
