"""A survey sees every call of the denoisers without computing every step."""

import inspect
import warnings

import pytest
import torch
from torch import nn

from tests.families.pipelines import build
from trtq.calls.recorder import TIMESTEP_NAMES, observed
from trtq.calls.survey import survey
from trtq.calls.user_call import UserCall, default_call, run_call
from trtq.checkpoint.components import denoisers_of
from trtq.errors import ArtefactError, QuantizationError, UsageError

CALL = UserCall({"prompt": "a red circle", "num_inference_steps": 3, "output_type": "pt"})


@pytest.fixture(scope="module")
def pipeline():
    return build("sd_1")


def test_a_survey_computes_one_step_and_sees_all(pipeline):
    computed = []
    handle = pipeline.unet.conv_in.register_forward_hook(lambda *_: computed.append(1))
    forward = pipeline.unet.forward
    calls = survey(pipeline, denoisers_of(pipeline), CALL)["unet"]
    handle.remove()
    assert len(computed) == 1
    assert pipeline.unet.forward == forward
    assert calls.argument == "timestep"
    assert list(calls.timesteps) == [667.0, 334.0, 1.0]
    (first,) = calls.first.values()
    assert first.shapes["encoder_hidden_states"][0] == 2


def schedulers():
    import diffusers

    for name in dir(diffusers):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cls = getattr(diffusers, name, None)
        if name.endswith("Scheduler") and inspect.isclass(cls):
            yield cls


def test_the_timesteps_are_those_that_the_pipeline_passes_with_every_scheduler(pipeline):
    """Every scheduler of diffusers with which the float pipeline runs."""
    original, tried = pipeline.scheduler, []
    modules = denoisers_of(pipeline)
    try:
        for cls in schedulers():
            try:
                pipeline.scheduler = cls.from_config(original.config)
                passed = []
                with observed(modules, lambda call: passed.append(float(call.tensors["timestep"]))):  # noqa: B023
                    run_call(pipeline, CALL, 0, "survey")
            except Exception:
                continue
            surveyed = survey(pipeline, modules, CALL)["unet"]
            assert list(surveyed.timesteps) == passed, cls.__name__
            tried.append(cls.__name__)
    finally:
        pipeline.scheduler = original
    assert {"EulerDiscreteScheduler", "LCMScheduler", "HeunDiscreteScheduler"} <= set(tried)
    assert len(tried) >= 15


def test_the_timestep_of_an_unknown_name_is_the_smallest_tensor_that_changes():
    assert "moment" not in TIMESTEP_NAMES
    pipeline = Fake(lambda x, moment: x * moment)
    assert survey(pipeline, {"unet": pipeline.unet}, UserCall())["unet"].argument == "moment"


class Fake:
    """A pipeline whose denoiser is called with `x` and a value that changes."""

    def __init__(self, forward, calls=2):
        self.unet = Model(forward)
        self.calls = calls

    def __call__(self, prompt="", *, generator=None):
        for index in range(self.calls):
            self.unet(torch.ones(2, 3), torch.tensor([float(index)]))


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, moment):
        return self.function(x, moment)


def test_a_pipeline_that_never_calls_its_denoiser_is_refused():
    pipeline = Fake(lambda x, moment: x, calls=0)
    with pytest.raises(UsageError, match="does not call its unet with these arguments"):
        survey(pipeline, {"unet": pipeline.unet}, UserCall())


def test_a_pipeline_without_a_denoiser_lists_its_components():
    with pytest.raises(QuantizationError, match=r"has no denoiser: a component unet, .* none"):
        denoisers_of(object())


def test_an_error_inside_the_pipeline_is_one_line(pipeline):
    call = CALL.updated({"prompt": 3})
    with pytest.raises(
        ArtefactError, match=r"cannot be called with prompt, .*ValueError"
    ) as caught:
        run_call(pipeline, call, 0, "x")
    assert "\n" not in str(caught.value)


def test_unknown_and_missing_arguments_are_named(pipeline):
    with pytest.raises(UsageError, match=r"has no argument 'promt'.*its arguments are prompt, "):
        UserCall({"promt": "a"}).check(pipeline)
    with pytest.raises(UsageError, match="'generator' comes from trtq"):
        UserCall({"generator": None}).check(pipeline)

    class Edits:
        def __call__(self, image, prompt=None):
            pass

    with pytest.raises(UsageError, match=r"requires image; give a file with --input image=FILE"):
        default_call(Edits(), ["a"], {})


def test_the_same_seed_gives_the_same_result_and_leaves_the_global_generator(pipeline):
    torch.manual_seed(5)
    first = run_call(pipeline, CALL, 1, "image", 0).images
    state = torch.get_rng_state()
    again = run_call(pipeline, CALL, 1, "image", 0).images
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())
