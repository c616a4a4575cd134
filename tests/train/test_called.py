"""Training points inside a pipeline's call: the float trajectory, errors, threads and resuming."""

import threading
from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree

from tests.conftest import tiny_pipeline
from tests.families.pipelines import build
from tests.train.called import FLUX, TWO_CALLS, WAN, Tuned, learn, noisy, tuned, wan
from trtq.calls.user_call import UserCall
from trtq.errors import ArtefactError, QuantizationError
from trtq.runs.fine_tune_calls import step_weight
from trtq.train import rounding
from trtq.train.called import CalledTrajectories
from trtq.train.efficientdm import guided_error


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("trtq")]


def tensors(value):
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def assert_equal_calls(batch, expected):
    args, kwargs, output = expected
    ours, theirs = tensors((batch.calls.args, dict(batch.calls.kwargs))), tensors((args, kwargs))
    assert len(ours) == len(theirs) > 1
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(batch.teacher, torch.cat([t.flatten() for t in tensors(output)])[None])


def expected_points(run, name, trajectories, stream, first):
    """The float pipeline's calls of a denoiser in one stream, from a position of the first call."""
    index = 0
    while True:
        calls = run.float_calls(name, trajectories.planned_call(stream, index))
        yield from calls[first if index == 0 else 0 :]
        index += 1


def test_pipelines_that_draw_global_random_numbers_do_not_disturb_each_other():
    pipeline = noisy()
    run = Tuned(pipeline, None, (), {})
    modules = {"unet": pipeline.unet}
    options = {"calls": [UserCall({})], "numbers": [3], "length": 3, "staggered": False}
    with CalledTrajectories(pipeline, modules, "unet", "timestep", slots=2, **options) as points:
        expected = [expected_points(run, "unet", points, stream, 0) for stream in (0, 1)]
        batches = [(points.next(0, i), points.next(1, i)) for i in range(4)]
        for pair in batches:
            for batch, calls in zip(pair, expected, strict=True):
                assert_equal_calls(batch, next(calls))


@pytest.fixture(scope="module")
def flux():
    return tuned(build("flux"), FLUX)


@pytest.mark.parametrize(
    ("made", "call", "name"),
    [
        (lambda: build("flux"), FLUX, "transformer"),
        (lambda: build("flux"), TWO_CALLS, "transformer"),
        (wan, WAN, "transformer_2"),
    ],
    ids=["embedded guidance", "guidance by two calls", "two denoisers"],
)
def test_the_points_are_the_calls_of_the_float_pipeline_bit_for_bit(made, call, name):
    run = tuned(made(), call)
    (part,) = [part for part in run.parts if part.name == name]
    length = len(part.calls.timesteps)
    assert length == {"transformer_2": 4}.get(name, 6 if call is TWO_CALLS else 3)
    with run.trajectories(name, slots=2) as points:
        expected = [
            expected_points(run, name, points, stream, stream * length // 2)
            for stream in points.streams
        ]
        for iteration in range(length + 1):
            for slot in (0, 1):
                batch = points.next(slot, iteration)
                assert_equal_calls(batch, next(expected[slot]))
                assert batch.timestep.shape == batch.weight.shape == (1,)


def test_the_student_is_called_with_the_point_and_all_values_are_compared(flux):
    model = flux.models["transformer"]
    with flux.trajectories("transformer") as points:
        batch = points.next(0, 0)
        student = points.predict(model, batch)
        assert torch.equal(points.predict(model.teacher, batch), batch.teacher)
    assert student.requires_grad
    assert student.shape == batch.teacher.shape == (1, 64 * 16 // 4)
    assert not torch.equal(student, batch.teacher)


def test_another_call_follows_with_other_prompts_and_random_numbers(flux):
    calls = [flux.plan.call.with_prompts([text]) for text in ("a", "red", "blue", "square")]
    with flux.trajectories("transformer", calls=calls, numbers=[3]) as points:
        planned = [points.planned_call(stream, index) for stream in (0, 1) for index in range(6)]
        assert len({call.call.arguments["prompt"] for call in planned}) > 2
        assert len({call.purpose for call in planned}) == 12
        batches = [points.next(0, index) for index in range(7)]
    starts = [tensors((b.calls.args, dict(b.calls.kwargs)))[0] for b in batches[::3]]
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])


def test_a_state_is_resumed_at_the_same_point(flux):
    with flux.trajectories("transformer", slots=2) as points:
        for iteration in range(4):
            for slot in (0, 1):
                points.next(slot, iteration)
        state = points.state()
        expected = [points.next(slot, 4).teacher for slot in (0, 1)]
    assert (state["0"].tolist(), state["1"].tolist()) == ([[1, 1]], [[1, 2]])
    with flux.trajectories("transformer", slots=2) as points:
        points.next(0, 0)
        points.load_state(state)
        assert points.state()["1"].tolist() == [[1, 2]]
        resumed = [points.next(slot, 4).teacher for slot in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(expected, resumed, strict=True))
    other = flux.trajectories("transformer", slots=3)
    with pytest.raises(
        ArtefactError, match="2 micro-batches per update, and the recipe has 3 in 3"
    ):
        other.load_state(state)


def test_random_numbers_outside_and_the_pipeline_stay_as_they_are(flux):
    before = torch.get_rng_state()
    scheduler = flux.plan.source.pipeline.scheduler
    settings = {key: repr(value) for key, value in vars(scheduler).items()}
    with flux.trajectories("transformer", slots=2) as points:
        for slot in (0, 1, 0, 0, 0, 1):
            points.next(slot, 0)
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)
    assert {key: repr(value) for key, value in vars(scheduler).items()} == settings


def test_threads_and_the_interception_end_with_the_stage(flux):
    module = flux.parts[0].module
    assert "forward" not in vars(module)

    def interrupted():
        with flux.trajectories("transformer", slots=3) as points:
            for slot in range(3):
                points.next(slot, 0)
            assert len(threads()) == 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not threads()
    assert "forward" not in vars(module)


def test_an_error_in_the_pipeline_is_one_line(flux):
    def fail(pipeline, step, timestep, values):
        raise ValueError("the second step\nfails")

    call = flux.plan.call.updated({"callback_on_step_end": fail})
    with flux.trajectories("transformer", calls=[call], staggered=False) as points:
        points.next(0, 0)
        with pytest.raises(
            ArtefactError, match=r"^FluxPipeline cannot be called.*ValueError"
        ) as err:
            points.next(0, 1)
        assert not threads()
        with pytest.raises(ArtefactError, match="ValueError"):
            points.next(0, 2)
    assert "\n" not in str(err.value)


def test_a_pipeline_that_does_not_call_the_denoiser_is_an_error(flux):
    with flux.trajectories("transformer", calls=[flux.plan.call]) as points:
        points._slots[0][0].paused._pipeline = Silent()
        with pytest.raises(
            QuantizationError, match="64 calls of Silent do not call its transformer"
        ):
            points.next(0, 0)


class Silent:
    def __call__(self, **arguments):
        return None


def test_training_lowers_the_error_at_other_points():
    run = tuned(build("flux"), FLUX, bits="w3a8")
    model = run.models["transformer"]

    def error():
        with run.trajectories("transformer", stream=70, staggered=False) as points, torch.no_grad():
            batches = [points.next(0, index) for index in range(9)]
            return sum(float(guided_error(points.predict(model, b), b.teacher)) for b in batches)

    before = error()
    with run.trajectories("transformer", slots=2) as points:
        learn(model, points, iterations=40, accumulate=2)
    assert error() < 0.97 * before


def test_rounding_is_learned_from_prompts_of_different_lengths(flux):
    calls = [flux.plan.call.updated({"max_sequence_length": length}) for length in (4, 8)]
    model = flux.models["transformer"]
    layers = dict(model.layers())
    text = next(name for name in layers if name.endswith("add_k_proj"))
    image = next(name for name in layers if name.endswith("attn.to_k"))
    with flux.trajectories("transformer", calls=calls, slots=4) as points:
        chosen = [points.planned_call(stream, 0).call for stream in points.streams]
        assert len({call.arguments["max_sequence_length"] for call in chosen}) == 2
        rounding.learn_rounding(model, points, [text, image], iterations=3, seed=0)
    for name in (text, image):
        assert layers[name].alpha.shape == layers[name].weight.shape
        layers[name].alpha = None


def test_influence_weights_need_known_noise_levels(caplog):
    weighted = {"training": {"step_weights": "influence", "batch": 1, "iterations": 4}}
    known = tuned(tiny_pipeline(), {"class_labels": [1]}, **weighted)
    training = known.plan.recipe.training
    weight = step_weight(known.parts[0], training, 3)
    schedule = known.plan.source.schedule(3)
    ours = [weight(timestep) for timestep in schedule.timesteps.tolist()]
    assert ours == pytest.approx(schedule.influence().tolist())
    with known.trajectories("unet", weight=weight) as points:
        assert float(points.next(0, 0).weight) == pytest.approx(ours[0])
    assert not caplog.records
    other = replace(known.parts[0].calls, timesteps=(1.5, 700.5))
    assert step_weight(replace(known.parts[0], calls=other), training, 3) is None
    assert "all steps of unet have weight 1: its timesteps are not those" in caplog.text
