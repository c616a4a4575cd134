"""Calls of several series in one batch: the same points, bit-equal resuming, what cannot be joined."""

import logging

import pytest
import torch

from tests.conftest import tiny_pipeline
from tests.families.pipelines import build
from tests.train.called import FLUX, WAN, learn, tuned, wan
from trtq.calls.form import result_tensors
from trtq.calls.joined import BatchAxes, Joined, batch_axes, flattened
from trtq.calls.paused import DenoiserCall
from trtq.errors import ArtefactError
from trtq.quant.timestep import float_scope
from trtq.runs import joint_calls
from trtq.runs.fine_tune_calls import _batches
from trtq.runs.joint_calls import joint_axes, steps_per_item

CPU = torch.device("cpu")
SD = {"prompt": "a red circle", "height": 16, "width": 16, "guidance_scale": 3.0}


def joined(run, name):
    (part,) = [part for part in run.parts if part.name == name]
    return joint_axes(run.plan, part, run.models[name], CPU)


@pytest.fixture(scope="module")
def flux():
    run = tuned(build("flux"), FLUX)
    return run, joined(run, "transformer")


@pytest.fixture(scope="module")
def sd():
    """A model whose guidance puts two rows per image into each call."""
    run = tuned(build("sd_1"), SD)
    return run, joined(run, "unet")


@pytest.mark.parametrize(("made", "name", "rows"), [("flux", "transformer", 1), ("sd", "unet", 2)])
def test_a_joint_point_holds_the_points_of_its_series(made, name, rows, request):
    run, axes = request.getfixturevalue(made)
    assert axes
    model = run.models[name]
    singles = run.trajectories(name, slots=4)
    with run.trajectories(name, axes=axes, together=4) as points, singles:
        for iteration in range(4):
            alone = [singles.next(slot, iteration) for slot in range(4)]
            batch = points.next(0, iteration)
            assert (batch.calls.count, batch.calls.rows) == (4, rows)
            # Items are in the order of the series: at the first point all have waited equally long.
            order = [batch.timestep.tolist().index(float(each.timestep)) for each in alone]
            if len(set(order)) < 4:
                order = nearest(batch, alone)
            for place, each in zip(order, alone, strict=True):
                torch.testing.assert_close(
                    batch.teacher[place : place + 1], each.teacher, rtol=1e-3, atol=1e-4
                )
                assert batch.timestep[place] == each.timestep
            with steps_per_item(model, True):
                together = points.predict(model, batch)
            assert together.shape == batch.teacher.shape
            assert together.requires_grad


def nearest(batch, alone):
    """Places of single points in a joint one, by the teacher's results."""
    return [int((batch.teacher - each.teacher).abs().sum(1).argmin()) for each in alone]


def test_low_bit_results_of_a_joint_call_are_those_of_single_calls(sd):
    run, axes = sd
    model = run.models["unet"]
    with run.trajectories("unet", slots=2) as points, torch.no_grad(), steps_per_item(model, True):
        first, second = points.next(0, 0).calls, points.next(1, 0).calls
        calls = [DenoiserCall(each.args, dict(each.kwargs)) for each in (first, second)]
        seen = [flattened(model.denoiser, "unet", call) for call in calls]
        (rule,) = axes.values()
        assert rule.fit(*seen)
        both = Joined.of(calls, seen, rule)
        timesteps = both.kwargs["timestep"].tolist()
        assert timesteps == 2 * [float(call.tensors["timestep"]) for call in seen]
        assert timesteps[0] != timesteps[1]
        for result, call in zip(both.compute(model), calls, strict=True):
            (expected,) = result_tensors(model(*call.args, **call.kwargs))
            (given,) = result_tensors(result)
            error = (given - expected).square().mean() / expected.square().mean()
            assert error < 1e-3


def test_a_resumed_state_gives_the_same_joint_points_bit_for_bit(sd):
    run, axes = sd
    options = {"axes": axes, "together": 3, "slots": 2}
    with run.trajectories("unet", **options) as points:
        for iteration in range(4):
            for slot in (0, 1):
                points.next(slot, iteration)
        state = points.state()
        expected = [points.next(slot, 4) for slot in (0, 1)]
    with run.trajectories("unet", **options) as points:
        points.load_state(state)
        assert {key: value.tolist() for key, value in points.state().items()} == {
            key: value.tolist() for key, value in state.items()
        }
        resumed = [points.next(slot, 4) for slot in (0, 1)]
    for ours, theirs in zip(resumed, expected, strict=True):
        assert torch.equal(ours.teacher, theirs.teacher)
        assert torch.equal(ours.calls.kwargs["sample"], theirs.calls.kwargs["sample"])
    other = run.trajectories("unet", axes=axes, together=2, slots=2)
    with pytest.raises(ArtefactError, match=r"holds 6 calls in 2 micro-batches.*has 4 in 2"):
        other.load_state(state)


def test_calls_that_differ_in_form_or_shape_take_turns(flux):
    run, axes = flux
    calls = [run.plan.call.updated({"max_sequence_length": length}) for length in (4, 8)]
    options = {"calls": calls, "axes": axes, "together": 4, "staggered": False}
    with run.trajectories("transformer", **options) as points:
        batches = [points.next(0, index) for index in range(6)]
        served = [(series.paused.index, series.paused.position) for series in points._slots[0]]
    lengths = [batch.calls.kwargs["encoder_hidden_states"].shape[1] for batch in batches]
    assert set(lengths) == {4, 8}
    # No series starves: after six points each has advanced.
    assert all(place > (0, 1) for place in served)


def test_turns_continue_after_resuming(flux):
    run, axes = flux
    calls = [run.plan.call.updated({"max_sequence_length": length}) for length in (4, 8)]
    options = {"calls": calls, "axes": axes, "together": 4}
    with run.trajectories("transformer", **options) as points:
        for index in range(5):
            points.next(0, index)
        state = points.state()
        expected = [points.next(0, index) for index in range(5, 9)]
    assert len(set(state["0.waited"].tolist())) > 1
    with run.trajectories("transformer", **options) as points:
        points.load_state(state)
        resumed = [points.next(0, index) for index in range(5, 9)]
    for ours, theirs in zip(resumed, expected, strict=True):
        assert torch.equal(ours.teacher, theirs.teacher)


def test_equal_arguments_without_a_batch_are_shared_and_different_ones_do_not_fit(flux):
    run, axes = flux
    (rule,) = axes.values()
    assert "img_ids" not in rule.axes
    with run.trajectories("transformer", slots=2) as points:
        calls = [DenoiserCall((), dict(points.next(slot, 0).calls.kwargs)) for slot in (0, 1)]
    module = run.models["transformer"].denoiser
    seen = [flattened(module, "transformer", call) for call in calls]
    assert rule.fit(*seen)
    assert Joined.of(calls, seen, rule).kwargs["img_ids"] is calls[0].kwargs["img_ids"]
    calls[1].kwargs["img_ids"] = calls[1].kwargs["img_ids"] + 1
    assert not rule.fit(seen[0], flattened(module, "transformer", calls[1]))


def test_a_video_model_whose_rows_are_not_the_batch_is_tuned_call_by_call(caplog):
    run = tuned(wan(), WAN)
    (part,) = [part for part in run.parts if part.name == "transformer_2"]
    model = run.models["transformer_2"]
    with caplog.at_level(logging.INFO):
        axes = joint_axes(run.plan, part, model, CPU)
    training = run.plan.recipe.training.model_copy(update={"batch": 6, "accumulate": 2})
    slots, together = _batches(training, part, 1, joint=bool(axes))
    assert slots * together == 12
    assert not model.per_item
    if not axes:
        assert (slots, together) == (12, 1)
        assert "are fine-tuned one by one" in caplog.text


def test_a_model_that_mixes_its_rows_is_not_joined(caplog):
    run = tuned(tiny_pipeline(), {"class_labels": [1]})
    unet = run.models["unet"].denoiser
    forward = unet.forward

    def mixing(sample, timestep, *args, **kwargs):
        (result,) = forward(
            sample - sample.mean(0), timestep, *args, **kwargs | {"return_dict": False}
        )
        return (result,)

    assert joined(run, "unet")
    unet.forward = mixing
    with caplog.at_level(logging.INFO):
        assert joined(run, "unet") == {}
    assert "joint calls reach" in caplog.text


def test_a_code_that_flips_by_chance_does_not_prevent_joining(monkeypatch):
    run = tuned(tiny_pipeline(), {"class_labels": [1]})
    tried = []

    def unlucky(quantized, pair, axes):
        tried.append(pair)
        if len(tried) < 3:
            raise ValueError("joint calls reach 25.0 dB against single calls")

    monkeypatch.setattr(joint_calls, "_check", unlucky)
    assert joined(run, "unet")
    assert len(tried) == 3
    first, second = (pair[1].tensors["sample"] for pair in tried[:2])
    assert not torch.equal(first, second)


def test_batch_axes_leave_out_what_does_not_grow_with_the_images(sd):
    run, _ = sd
    modules = {"unet": run.plan.source.pipeline.unet}
    with float_scope():
        axes = batch_axes(run.plan.source.pipeline, modules, "unet", "timestep", run.plan.call)
    (rule,) = axes.values()
    assert rule.axes == {"sample": 0, "encoder_hidden_states": 0}
    assert isinstance(rule, BatchAxes)


def test_joint_training_lowers_the_error_at_other_points():
    run = tuned(tiny_pipeline(), {"class_labels": [1]}, bits="w3a8")
    model, axes = run.models["unet"], joined(run, "unet")

    def error():
        options = {"axes": axes, "together": 8, "stream": 70, "staggered": False}
        with run.trajectories("unet", **options) as points, torch.no_grad():
            batches = [points.next(0, index) for index in range(3)]
            return sum(
                float((points.predict(model, b) - b.teacher).square().sum()) for b in batches
            )

    with steps_per_item(model, True):
        before = error()
        with run.trajectories("unet", axes=axes, together=8) as points:
            learn(model, points, iterations=20)
        assert error() < 0.9 * before
