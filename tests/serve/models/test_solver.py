"""DDIM without diffusers equals diffusers' DDIM; other schedulers come from diffusers."""

import numpy as np
import pytest
import torch

from trtq.errors import UsageError
from trtq.seeds import seeded_generator, seeded_normal
from trtq.serve.models.solver import Ddim, SchedulerSolver

SETTINGS = {
    "shipped": {"steps_offset": 1},
    "text": {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False},
    "velocity": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "sample": {"prediction_type": "sample", "timestep_spacing": "linspace"},
    "short": {"num_train_timesteps": 77, "clip_sample_range": 0.5},
}


def ddim(settings):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**settings)
    return scheduler, Ddim({"_class_name": "DDIMScheduler", **scheduler.config})


@pytest.mark.parametrize("steps", [1, 7, 20, 38])
@pytest.mark.parametrize("name", SETTINGS)
def test_ddim_steps_equal_those_of_diffusers(name, steps):
    scheduler, ours = ddim(SETTINGS[name])
    scheduler.set_timesteps(steps)
    solver = ours.solver(steps)
    assert solver.timesteps == [float(t) for t in scheduler.timesteps]
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(1, 2, 4, 4, generator=generator)
    mine = theirs.numpy().copy()
    for position, t in enumerate(scheduler.timesteps):
        predicted = torch.randn(1, 2, 4, 4, generator=generator)
        moved = scheduler.step(predicted, t, theirs)
        mine, clean = solver.step(mine, predicted.numpy(), position)
        theirs = moved.prev_sample
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(clean, moved.pred_original_sample, rtol=2e-3, atol=2e-3)
    assert mine.dtype == np.float32


@pytest.mark.parametrize(
    "settings",
    [
        {"thresholding": True},
        {"rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"_class_name": "EulerDiscreteScheduler"},
    ],
    ids=str,
)
def test_unsupported_schedulers_are_refused(settings):
    config = {"_class_name": "DDIMScheduler"} | settings
    assert not Ddim.knows(config)
    with pytest.raises(UsageError, match="needs diffusers"):
        Ddim(config)


def test_there_is_one_trailing_timestep_per_step_and_none_is_negative():
    trailing = Ddim({"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"})
    for steps in range(1, 1001):
        timesteps = trailing.timesteps(steps)
        assert len(timesteps) == steps
        assert timesteps.min() >= 0


def test_steps_out_of_range_are_refused():
    _, ours = ddim({"steps_offset": 1})
    with pytest.raises(UsageError, match=r"1 \.\. 1000"):
        ours.solver(1001)
    with pytest.raises(UsageError, match=r"1 \.\. 999"):
        ours.solver(1000)  # In this case diffusers reads past the end of its table.
    assert ours.solver(20) is ours.solver(20)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_other_schedulers_keep_their_state_per_image(name):
    import diffusers

    def run(solver, x):
        x = x * solver.initial_scale
        for position in range(len(solver.timesteps)):
            scaled = solver.scaled(x, position)
            x, _ = solver.step(x, np.tanh(scaled), position)
            yield x

    def fresh():
        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(5)
        return SchedulerSolver(scheduler)

    noise = np.random.default_rng(0).standard_normal((2, 1, 1, 4, 4)).astype(np.float32)
    alone = [list(run(fresh(), x))[-1] for x in noise]
    first, second = run(fresh(), noise[0]), run(fresh(), noise[1])
    next(first)
    together = list(zip(first, second, strict=False))
    np.testing.assert_array_equal(together[-1][0], alone[0])
    assert not np.array_equal(alone[0], alone[1])


@pytest.mark.parametrize("shape", [(16,), (1, 8, 8), (3, 7, 5), (4, 64, 64)], ids=str)
def test_noise_without_torch_equals_torchs_noise(shape):
    for seed in (0, 1, 2**31 - 1):
        theirs = torch.randn(shape, generator=seeded_generator(seed, "image", 3)).numpy()
        ours = seeded_normal(shape, seed, "image", 3)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)
