"""Timesteps and noise levels equal those of the pipeline's call, or are refused in one line."""

from functools import cache

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from tests.families.pipelines import build, conditional_unet, stable_diffusion
from trtq.artefact.opened import open_artefact
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.schedule import NoiseSchedule
from trtq.diffusion.scheduler_rules import KNOWN_SCHEDULERS
from trtq.errors import UsageError
from trtq.pipelines.called import is_called
from trtq.pipelines.draw import conditioning_for, draw
from trtq.pipelines.open import open_any
from trtq.runs.given_calls import knows_pipeline
from trtq.runs.quantize import quantize

# diffusers' own code emits these warnings.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
KARRAS = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
# This scheduler requires torchsde, which is not a dependency of this project.
WITHOUT = "DPMSolverSDEScheduler"
TEXT = {"prompt": "a red circle", "height": 16, "width": 16, "output_type": "latent"}
CALLS = {
    "sd_1": TEXT,
    "sd_2": TEXT,
    "ldm_vq": {"batch_size": 1, "output_type": "np"},
    "dit": {"class_labels": [1], "guidance_scale": 1.0, "output_type": "np"},
    "pixart": TEXT | {"height": 256, "width": 256, "use_resolution_binning": False},
    "sd_3": TEXT,
    "flux": TEXT,
    "unconditional": {"batch_size": 1, "output_type": "np"},
    "classes": {"class_labels": [1], "output_type": "pt"},
}
RECIPE = {
    "method": "minmax",
    "bits": "w8a8",
    "steps": 4,
    "calibration": {"images": 8, "samples_per_step": 64},
}


def unet(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            norm_num_groups=4,
            **settings,
        )


@cache
def pipeline(name):
    if name in ("unconditional", "classes"):
        settings = {"num_class_embeds": 5} if name == "classes" else {}
        made = diffusers.DDPMPipeline(unet(**settings), diffusers.DDPMScheduler())
        made.set_progress_bar_config(disable=True)
        return made
    return build(name)


def with_scheduler(name, scheduler):
    made = pipeline(name)
    made.scheduler = scheduler
    return made


def timesteps_of_the_call(pipe, name, steps):
    """Timesteps that the pipeline's own call passes to its denoiser."""
    loaded, seen = open_pipeline(pipe), []

    def spy(_, arguments, options):
        timestep = options["timestep"] if "timestep" in options else arguments[1]
        seen.append(float(torch.as_tensor(timestep).flatten()[0]))

    handle = loaded.model.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        with torch.no_grad():
            loaded.pipeline(**CALLS[name], num_inference_steps=steps)
    finally:
        handle.remove()
    return seen


def check_timesteps(name, scheduler, steps=4):
    """Assert that the calibrated timesteps are those of the pipeline's call, without duplicates."""
    pipe = with_scheduler(name, scheduler)
    loaded = open_pipeline(pipe)
    if name == "flux":
        loaded = loaded.sized("16x16")
    ours = loaded.timesteps(steps)
    assert ours == sorted(set(timesteps_of_the_call(pipe, name, steps)), reverse=True)
    return ours


def make(name, **settings):
    return getattr(diffusers, name)(**settings)


@pytest.mark.parametrize("name", [n for n in KNOWN_SCHEDULERS if n != WITHOUT])
def test_the_timesteps_equal_those_that_the_pipeline_passes(name):
    """Test each known scheduler in the pipelines that support it."""
    flow = name.startswith("FlowMatch")
    for pipe in ("sd_3",) if flow else ("sd_1", "classes"):
        check_timesteps(pipe, make(name))


def test_all_interchangeable_schedulers_of_diffusers_but_one_are_known():
    assert set(KARRAS) - set(KNOWN_SCHEDULERS) == {"EDMEulerScheduler"}


@pytest.mark.parametrize("pipe", ["ldm_vq", "dit", "pixart", "sd_3", "unconditional"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_the_timesteps_equal_those_of_each_pipeline(pipe, name):
    if (pipe, name) == ("unconditional", "DPMSolverMultistepScheduler"):
        name = "DDPMScheduler"
    check_timesteps(pipe, make(name))


@pytest.mark.parametrize("pipe", ["sd_3", "flux"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "max_shift": 2.0, "base_shift": 0.1},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True, "shift": 3.0},
        {"stochastic_sampling": True},
    ],
    ids=str,
)
def test_flow_matching_steps_equal_those_of_the_pipeline(pipe, settings):
    check_timesteps(pipe, make("FlowMatchEulerDiscreteScheduler", **settings), 4)


@pytest.mark.parametrize("pipe", ["sd_1", "sd_3", "flux"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_solvers_with_flow_sigmas_are_supported(pipe, dynamic):
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
    scheduler = make("UniPCMultistepScheduler", **settings, use_dynamic_shifting=dynamic)
    if (pipe, dynamic) == ("sd_1", True):
        with pytest.raises(
            UsageError, match=r"UniPCMultistepScheduler .*mu.*pipe\.scheduler = DDIM"
        ):
            open_pipeline(with_scheduler(pipe, scheduler)).timesteps(4)
        return
    check_timesteps(pipe, scheduler, 4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDIMScheduler", {"timestep_spacing": "trailing"}),
        ("DDIMScheduler", {"timestep_spacing": "linspace", "steps_offset": 1}),
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3, "lower_order_final": True}),
        ("UniPCMultistepScheduler", {"use_exponential_sigmas": True}),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
        ("DEISMultistepScheduler", {"prediction_type": "v_prediction"}),
        ("DDPMScheduler", {"trained_betas": [0.0001 + 0.00002 * i for i in range(1000)]}),
    ],
    ids=str,
)
def test_settings_of_a_scheduler_are_used(name, settings):
    check_timesteps("sd_1", make(name, **settings), 4)


def test_noise_levels_of_a_scheduler_that_rounds_its_timesteps():
    scheduler = make("DPMSolverMultistepScheduler", use_karras_sigmas=True)
    schedule = NoiseSchedule.of(scheduler, 6)
    scheduler.set_timesteps(6)
    level = schedule.sigma[:-1] / schedule.signal[:-1]
    torch.testing.assert_close(level, scheduler.sigmas[:-1].float(), rtol=1e-4, atol=0)


def test_steps_that_share_a_timestep_are_calibrated_once():
    """Karras' noise levels on a cosine schedule are close together at the noisy end."""
    scheduler = make(
        "DPMSolverMultistepScheduler", use_karras_sigmas=True, beta_schedule="squaredcos_cap_v2"
    )
    loaded = open_pipeline(with_scheduler("sd_1", scheduler))
    steps = next(n for n in range(2, 12) if _doubled(scheduler, n))
    with pytest.raises(
        UsageError, match=r"diffusers raises an error .*use another scheduler"
    ) as raised:
        draw(loaded, conditioning_for(loaded, 1), steps=20, seed=0, guidance=1.0)
    assert "\n" not in str(raised.value)
    try:
        ours = loaded.timesteps(steps)
    except UsageError:
        return
    assert len(set(ours)) == len(ours) < steps


def _doubled(scheduler, steps):
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(steps)
    return len(set(fresh.timesteps.tolist())) < steps


@pytest.mark.parametrize(
    "name",
    [
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
        "CMStochasticIterativeScheduler",
        "IPNDMScheduler",
        "SASolverScheduler",
        "DDIMInverseScheduler",
        "DPMSolverMultistepInverseScheduler",
        "UnCLIPScheduler",
        "DDPMWuerstchenScheduler",
    ],
)
def test_an_unsupported_scheduler_has_no_schedule_and_is_recorded(name):
    pipe = with_scheduler("sd_1", make(name))
    with pytest.raises(
        UsageError, match=rf"scheduler {name} .*Euler.*pipe\.scheduler = DDIM"
    ) as err:
        open_pipeline(pipe).schedule(2)
    assert "\n" not in str(err.value)
    assert not knows_pipeline(pipe)


def test_a_model_with_an_unsupported_scheduler_is_recorded_for_its_export(tmp_path):
    pipe = build("sd_1")
    pipe.save_pretrained(tmp_path / "known")
    pipe.scheduler = make("EDMEulerScheduler")
    pipe.save_pretrained(tmp_path / "model")
    assert is_called(open_artefact(tmp_path / "model"))
    assert not is_called(open_artefact(tmp_path / "known"))


def test_a_subclass_of_a_scheduler_is_refused():
    class Mine(diffusers.EulerDiscreteScheduler):
        pass

    with pytest.raises(UsageError, match="'scheduler' of the pipeline is a Mine"):
        open_pipeline(with_scheduler("sd_1", Mine()))


@pytest.mark.parametrize(
    ("pipe", "name", "settings", "message"),
    [
        ("sd_1", "EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type"),
        ("sd_1", "DDIMScheduler", {"prediction_type": "v"}, "prediction_type='v'.* epsilon"),
        ("sd_1", "DDIMScheduler", {"prediction_type": "flow_prediction"}, "supported .* epsilon"),
        (
            "sd_1",
            "DDIMScheduler",
            {"timestep_spacing": "x"},
            "gives no timesteps .*trailing",
        ),
        (
            "sd_1",
            "DDIMScheduler",
            {"trained_betas": [1.5] * 1000},
            "negative, not finite or not decreasing",
        ),
        (
            "sd_1",
            "DDIMScheduler",
            {"trained_betas": [0.0] * 1000},
            "negative, not finite or not decreasing",
        ),
        ("sd_1", "DDIMScheduler", {"rescale_betas_zero_snr": True}, "pure noise"),
        ("sd_1", "FlowMatchEulerDiscreteScheduler", {}, "init_noise_sigma"),
        ("sd_3", "FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas"),
        ("sd_3", "EulerDiscreteScheduler", {}, "scaled initial noise"),
        ("flux", "EulerDiscreteScheduler", {}, "gives no timesteps .*FlowMatchEuler"),
        ("flux", "FlowMatchHeunDiscreteScheduler", {}, "gives no timesteps"),
        ("dit", "EulerDiscreteScheduler", {}, "scaled initial noise"),
        ("unconditional", "EulerDiscreteScheduler", {}, "scaled initial noise"),
        ("unconditional", "PNDMScheduler", {}, "generator"),
        ("sd_1", "LCMScheduler", {"original_inference_steps": 2}, "gives no timesteps"),
    ],
    ids=str,
)
def test_invalid_combinations_are_refused_in_one_line(pipe, name, settings, message):
    if settings.get("rescale_betas_zero_snr"):
        settings = settings | {"timestep_spacing": "trailing"}
    loaded = open_pipeline(with_scheduler(pipe, make(name, **settings)))
    with pytest.raises(UsageError, match=f"{name} .*{message}") as raised:
        loaded.schedule(4)
    assert "\n" not in str(raised.value)


def test_settings_inherited_from_another_scheduler_are_ignored():
    """DDIM clips; Euler does not, even with DDIM's configuration."""
    ddim = make("DDIMScheduler", clip_sample=True)
    euler = diffusers.EulerDiscreteScheduler.from_config(ddim.config)
    assert euler.config.get("clip_sample")
    assert NoiseSchedule.of(euler, 4).clip is None
    assert NoiseSchedule.of(ddim, 4).clip == 1


def test_a_velocity_prediction_starts_from_pure_noise():
    scheduler = make(
        "DDIMScheduler",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    schedule = NoiseSchedule.of(scheduler, 4)
    assert float(schedule.signal[0]) == 0
    moved = schedule.step(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.tensor([0]))
    assert bool(torch.isfinite(moved).all())


def test_dynamic_thresholding_equals_that_of_diffusers():
    scheduler = make("DDIMScheduler", thresholding=True, sample_max_value=1.5)
    scheduler.set_timesteps(5)
    schedule = NoiseSchedule.of(scheduler, 5)
    x, predicted = torch.randn(2, 5, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for position, t in enumerate(scheduler.timesteps):
        ours = schedule.step(x[position], predicted[position], torch.tensor([position]))
        theirs = scheduler.step(predicted[position], t, x[position]).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_class_conditional_run_draws_with_the_checkpoints_scheduler(name, tmp_path):
    diffusers.DDPMPipeline(unet(num_class_embeds=5), make(name)).save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", RECIPE, tmp_path / "run")
    before, after = open_any(tmp_path / "model"), open_any(tmp_path / "run")
    assert type(after.pipeline.scheduler).__name__ == name
    float_image, image = (draw(s, conditioning_for(s, 2), steps=4, seed=0) for s in (before, after))
    noise = (float_image - image).square().mean()
    assert 10 * (float_image.square().mean() / noise).log10() > 12
    # diffusers loads the same scheduler.
    assert '"DDPMPipeline"' in (tmp_path / "run" / "model_index.json").read_text()


def test_a_run_of_an_earlier_version_keeps_its_scheduler(tmp_path):
    """Its index names DDIMPipeline, which converts any scheduler to DDIM."""
    model = diffusers.DDPMPipeline(unet(num_class_embeds=5), make("EulerDiscreteScheduler"))
    quantize(model, RECIPE, tmp_path / "run")
    index = tmp_path / "run" / "model_index.json"
    index.write_text(index.read_text().replace("DDPMPipeline", "DDIMPipeline"))
    from trtq.checkpoint.layout import read_null_class
    from trtq.diffusion.folder import load_pipeline_parts

    assert read_null_class(tmp_path / "run") is None
    loaded = load_pipeline_parts(tmp_path / "run", {"unet": unet(num_class_embeds=5)})
    assert type(loaded.scheduler).__name__ == "EulerDiscreteScheduler"


def test_a_pipeline_with_its_own_sampler_is_not_wrapped():
    scheduler = diffusers.CMStochasticIterativeScheduler()
    pipe = diffusers.ConsistencyModelPipeline(unet(num_class_embeds=5), scheduler)
    loaded = open_pipeline(pipe)
    assert type(loaded.pipeline) is type(pipe)
    assert type(loaded.pipeline.scheduler) is type(scheduler)
    assert not knows_pipeline(pipe)
    with pytest.raises(
        UsageError, match=r"scheduler CMStochasticIterativeScheduler is not supported"
    ):
        loaded.schedule(4)


def test_a_unet_with_classes_is_refused_in_a_pipeline_that_passes_none():
    pipe = build("ldm_vq")
    pipe.unet = unet(num_class_embeds=5)
    with pytest.raises(UsageError, match="num_class_embeds=5, but LDMPipeline passes no class"):
        open_pipeline(pipe).draw_conditions(1, torch.Generator())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time_cond_proj_dim": 16}, "time_cond_proj_dim=16.*timestep_cond.*LCM LoRA"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "IP-Adapter.*unload_ip_adapter"),
    ],
)
def test_inputs_that_only_the_pipeline_makes_are_recorded(settings, message):
    built = {k: v for k, v in settings.items() if k != "encoder_hid_dim_type"}
    pipe = stable_diffusion(conditional_unet(64, **built), diffusers.LCMScheduler())
    # load_ip_adapter() changes these settings after the UNet is built.
    pipe.unet.register_to_config(**settings)
    with pytest.raises(UsageError, match=message):
        open_pipeline(pipe)
    assert not knows_pipeline(pipe)


def test_a_scheduler_that_fails_at_one_step_works_with_two(tmp_path):
    """The exponential grid is undefined for a single point."""
    scheduler = make(
        "FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, shift_terminal=0.1
    )
    pipe = with_scheduler("flux", scheduler)
    recipe = RECIPE | {"calibration": {"images": 1, "samples_per_step": 16}, "steps": 2}
    assert quantize(pipe, recipe, tmp_path / "run")["layers_quantized"] > 0


def test_the_pipeline_is_rehearsed_once_per_settings_and_its_prompt_encoded_once(monkeypatch):
    from trtq.diffusion import own_call

    pipe, rehearsed, encoded = build("sd_1"), [], []
    rehearse, encode = own_call.rehearse, pipe.text_encoder.forward
    monkeypatch.setattr(
        own_call, "rehearse", lambda *a, **kw: rehearsed.append(kw) or rehearse(*a, **kw)
    )
    monkeypatch.setattr(
        pipe.text_encoder, "forward", lambda *a, **kw: encoded.append(1) or encode(*a, **kw)
    )
    loaded = LoadedPipeline("sd", None, pipe, "unet")
    for settings in ({}, {}, {"beta_end": 0.03}):
        pipe.scheduler = make("DDIMScheduler", **settings)
        loaded.check_steps(5)
        loaded.schedule(5)
    assert [call["steps"] for call in rehearsed if "steps" in call] == [5, 5]
    assert len(encoded) == 2  # The empty prompt as prompt and as negative prompt.


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_pixart_supports_one_step_only_with_schedulers_that_predict_the_image(name):
    pipeline = build("pixart")
    pipeline.scheduler = getattr(diffusers, name)()
    loaded = open_pipeline(pipeline)
    loaded.check_steps(2)
    with pytest.raises(UsageError, match=r"fails at steps=1 .*tuple index out of range"):
        loaded.check_steps(1)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler()
    open_pipeline(pipeline).check_steps(1)
