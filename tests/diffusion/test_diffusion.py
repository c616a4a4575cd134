"""Schedules, guidance, initial noise and loading."""

import numpy as np
import pytest
import torch

from tests.conftest import tiny_pipeline
from tests.families.pipelines import build
from trtq.diffusion.loading import open_pipeline, wrap_pipeline
from trtq.diffusion.sampling import Conditions, at_once, predict, seeded_noise
from trtq.diffusion.schedule import NoiseSchedule
from trtq.errors import ArtefactError, QuantizationError, UsageError


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_equals_that_of_diffusers_ddim(prediction, clip, eta):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        prediction_type=prediction, clip_sample=clip, timestep_spacing="leading", steps_offset=1
    )
    scheduler.set_timesteps(20)
    schedule = NoiseSchedule.of(scheduler, 20)
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(20)
    x, predicted, noise = (torch.randn(20, 1, 4, 4, generator=generator) for _ in range(3))
    # In one call, each item is at a different step.
    ours = schedule.step(x, predicted, positions, eta, noise)
    for position, t in enumerate(scheduler.timesteps):
        item = slice(position, position + 1)
        expected = scheduler.step(
            predicted[item], t, x[item], eta=eta, variance_noise=noise[item] if eta else None
        ).prev_sample
        torch.testing.assert_close(ours[item], expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_influence_is_the_effect_of_an_error_at_one_step_on_the_final_sample(prediction):
    """For data of unit variance the optimal denoiser is known: it predicts the noise `sigma x`."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    schedule = NoiseSchedule.of(scheduler, 100)
    signal, sigma = schedule.signal.double(), schedule.sigma.double()
    best = {"epsilon": sigma, "v_prediction": 0 * sigma, "sample": signal}[prediction]

    def end(wrong_at):
        x = torch.ones(1, 1, dtype=torch.float64)
        for position in range(100):
            predicted = best[position] * x + (1e-3 if position == wrong_at else 0.0)
            x = schedule.step(x, predicted, torch.tensor([position]))
        return x.item()

    right = end(None)
    measured = torch.tensor([(end(p) - right) ** 2 for p in range(100)], dtype=torch.float64)
    torch.testing.assert_close(
        schedule.influence().double(), measured / measured.mean(), rtol=0.1, atol=0
    )
    assert schedule.influence().mean().item() == pytest.approx(1)


def test_timesteps_are_those_of_the_scheduler():
    from diffusers import DDIMScheduler, HeunDiscreteScheduler

    ddim = DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    assert NoiseSchedule.of(ddim, 4).timesteps.tolist() == [751, 501, 251, 1]
    heun = NoiseSchedule.of(HeunDiscreteScheduler(), 5).timesteps.tolist()
    assert len(heun) == len(set(heun)) == 5
    with pytest.raises(UsageError, match=r"steps=0 .* 1 \.\. 1000"):
        NoiseSchedule.of(ddim, 0)
    assert NoiseSchedule.of(ddim, 999).timesteps[0] == 999
    with pytest.raises(UsageError, match=r"steps=1000 .* timestep 1000, .* trained on 0 \.\. 999"):
        NoiseSchedule.of(ddim, 1000)


@pytest.mark.parametrize("steps", [3, 7, 20])
def test_noise_levels_that_depend_on_the_size_equal_those_of_flux_bit_for_bit(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    ours = open_pipeline(build("flux")).sized("32x64").rehearsal(steps).scheduler
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(128))
    assert torch.equal(ours.sigmas, scheduler.sigmas)
    assert torch.equal(ours.timesteps, scheduler.timesteps)


def test_guidance_concatenates_unconditional_then_conditional():
    seen = {}

    def denoiser(sample, timestep, class_labels, return_dict):
        seen.update(labels=class_labels.tolist(), t=timestep.tolist())
        return (sample * 0 + class_labels.reshape(-1, 1, 1, 1),)

    conditions = Conditions(
        {"class_labels": torch.tensor([1, 2])}, {"class_labels": torch.tensor([9, 9])}
    )
    out = predict(denoiser, torch.zeros(2, 1, 1, 1), torch.tensor([5.0, 7.0]), conditions, 3.0)
    assert seen == {"labels": [9, 9, 1, 2], "t": [5, 7, 5, 7]}
    assert out.flatten().tolist() == [9 + 3 * (1 - 9), 9 + 3 * (2 - 9)]
    with pytest.raises(UsageError, match="guidance=3"):
        predict(denoiser, torch.zeros(2, 1, 1, 1), 1.0, Conditions({}), 3.0)


@pytest.mark.parametrize(
    ("shape", "max_batch", "count"),
    [((1, 8, 8), 64, 64), ((4, 64, 64), 64, 4), ((4, 128, 128), 64, 1), ((4096, 64), 3, 1)],
)
def test_large_samples_are_denoised_in_small_batches(shape, max_batch, count):
    assert at_once(shape, max_batch) == count


def test_noise_does_not_depend_on_the_batch():
    whole = seeded_noise((1, 4, 4), 3, 0, 6)
    parts = torch.cat([seeded_noise((1, 4, 4), 3, 0, 2), seeded_noise((1, 4, 4), 3, 2, 4)])
    assert torch.equal(whole, parts)


def test_images_do_not_depend_on_the_batch(tiny):
    from trtq.pipelines.draw import conditioning_for, draw

    single, batched = (
        draw(tiny, conditioning_for(tiny, 5), steps=3, seed=0, batch=batch) for batch in (1, 5)
    )
    torch.testing.assert_close(single, batched, rtol=0, atol=1e-5)


def test_diffusers_loads_the_shipped_model():
    from diffusers import DDIMPipeline

    from trtq.checkpoint.shipped import shipped_model

    pipeline = DDIMPipeline.from_pretrained(shipped_model("digits"))
    assert type(pipeline.unet).__name__ == "UNet2DModel"


def test_the_shipped_model_is_small():
    from trtq.checkpoint.shipped import shipped_model

    files = [p for p in shipped_model("digits").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 3e6


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no-such-model", r"ships with trtq \(digits, digits-dit, shapes\)"),
        ("./nowhere", "not a folder"),
        (".", r"holds no model_index\.json"),
    ],
)
def test_an_unknown_model_is_refused(model, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtefactError, match=message):
        open_pipeline(model)


def test_truncated_weights_are_refused(tmp_path):
    import shutil

    from trtq.checkpoint.shipped import shipped_model

    folder = tmp_path / "digits"
    shutil.copytree(shipped_model("digits"), folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ArtefactError, match=r"not a complete safetensors file.*download it again"):
        open_pipeline(folder)


def test_a_pipeline_without_a_denoiser_is_refused():
    class Empty:
        components = {"vae": None}

    with pytest.raises(QuantizationError, match=r"no denoiser.*vae"):
        open_pipeline(Empty())


def test_labels_do_not_bring_the_progress_bar_back(capsys):
    import diffusers

    tiny = tiny_pipeline()
    plain = diffusers.DDIMPipeline(tiny.unet, tiny.scheduler)
    plain.set_progress_bar_config(disable=True)
    labelled = wrap_pipeline(plain)
    assert type(labelled) is not type(plain)
    labelled([0], num_inference_steps=1, output_type="pt")
    assert capsys.readouterr().err == ""
