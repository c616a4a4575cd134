"""Timesteps and noise levels are those of the pipeline's own call, or they are refused in one line."""

from functools import cache

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from tests.families.pipelines import build, conditional_unet, stable_diffusion
from trtq.diffusion.pipeline import load_source
from trtq.diffusion.schedule import KNOWN_SCHEDULERS, NoiseSchedule, check_steps, stepping_of
from trtq.errors import UsageError
from trtq.exporter.export import export
from trtq.pipelines.draw import conditioning_for, draw
from trtq.pipelines.open import open_any
from trtq.runs.quantize import quantize

# Of diffusers' own code.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
KARRAS = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
# torchsde, which it needs, is not among the project's packages.
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


def told(pipe, name, steps):
    """What the pipeline's own call tells its denoiser."""
    source, seen = load_source(pipe), []

    def spy(_, arguments, options):
        timestep = options["timestep"] if "timestep" in options else arguments[1]
        seen.append(float(torch.as_tensor(timestep).flatten()[0]))

    handle = source.model.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        with torch.no_grad():
            source.pipeline(**CALLS[name], num_inference_steps=steps)
    finally:
        handle.remove()
    return seen


def held(name, scheduler, steps=4):
    """The calibrated timesteps, which are those of the call, each once."""
    pipe = with_scheduler(name, scheduler)
    source = load_source(pipe)
    if name == "flux":
        source.resize("16x16")
    ours = source.timesteps(steps)
    assert ours == sorted(set(told(pipe, name, steps)), reverse=True)
    return ours


def make(name, **settings):
    return getattr(diffusers, name)(**settings)


@pytest.mark.parametrize("name", [n for n in KNOWN_SCHEDULERS if n != WITHOUT])
def test_the_timesteps_are_those_that_the_pipeline_passes(name):
    """Of every known scheduler, in the pipelines that can use it."""
    flow = name.startswith("FlowMatch")
    for pipe in ("sd_3",) if flow else ("sd_1", "classes"):
        held(pipe, make(name))


def test_every_scheduler_that_diffusers_takes_for_its_pipelines_is_known_or_refused():
    assert set(KARRAS) - set(KNOWN_SCHEDULERS) == {"EDMEulerScheduler"}


@pytest.mark.parametrize("pipe", ["ldm_vq", "dit", "pixart", "sd_3", "unconditional"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_the_timesteps_are_those_of_every_pipeline(pipe, name):
    if (pipe, name) == ("unconditional", "DPMSolverMultistepScheduler"):
        name = "DDPMScheduler"
    held(pipe, make(name))


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
def test_flow_matching_is_stepped_as_the_pipeline_steps_it(pipe, settings):
    held(pipe, make("FlowMatchEulerDiscreteScheduler", **settings), 4)


@pytest.mark.parametrize("pipe", ["sd_1", "sd_3", "flux"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_solvers_with_flow_sigmas(pipe, dynamic):
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
    scheduler = make("UniPCMultistepScheduler", **settings, use_dynamic_shifting=dynamic)
    if (pipe, dynamic) == ("sd_1", True):
        with pytest.raises(
            UsageError, match=r"UniPCMultistepScheduler .*mu.*pipe\.scheduler = DDIM"
        ):
            load_source(with_scheduler(pipe, scheduler)).timesteps(4)
        return
    held(pipe, scheduler, 4)


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
def test_settings_of_a_scheduler_count(name, settings):
    held("sd_1", make(name, **settings), 4)


def test_levels_are_the_schedulers_own_where_it_rounds_its_timesteps():
    scheduler = make("DPMSolverMultistepScheduler", use_karras_sigmas=True)
    schedule = NoiseSchedule.of(scheduler, 6)
    scheduler.set_timesteps(6)
    level = schedule.sigma[:-1] / schedule.signal[:-1]
    torch.testing.assert_close(level, scheduler.sigmas[:-1].float(), rtol=1e-4, atol=0)


def test_steps_that_share_a_timestep_are_calibrated_once():
    """Karras' levels on a cosine schedule lie close together at the noisy end."""
    scheduler = make(
        "DPMSolverMultistepScheduler", use_karras_sigmas=True, beta_schedule="squaredcos_cap_v2"
    )
    source = load_source(with_scheduler("sd_1", scheduler))
    steps = next(n for n in range(2, 12) if _doubled(scheduler, n))
    with pytest.raises(UsageError, match=r"diffusers itself breaks .*use another one") as raised:
        draw(source, conditioning_for(source, 1), steps=20, seed=0, guidance=1.0)
    assert "\n" not in str(raised.value)
    try:
        ours = source.timesteps(steps)
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
def test_a_scheduler_that_is_not_understood_is_refused_before_any_work(name, tmp_path, monkeypatch):
    pipe = with_scheduler("sd_1", make(name))
    monkeypatch.setattr("trtq.runs.plan.merge_loras", None)
    with pytest.raises(
        UsageError, match=rf"scheduler {name} .*Euler.*pipe\.scheduler = DDIM"
    ) as err:
        quantize(pipe, RECIPE, tmp_path / "run")
    assert "\n" not in str(err.value)
    assert not (tmp_path / "run").exists()


def test_nor_is_it_exported(tmp_path, monkeypatch):
    pipe = build("sd_1")
    pipe.scheduler = make("EDMEulerScheduler")
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("trtq.exporter.export.write_graph", None)
    with pytest.raises(UsageError, match="the scheduler EDMEulerScheduler is not one"):
        export(tmp_path / "model", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_users_own_subclass_is_not_understood():
    class Mine(diffusers.EulerDiscreteScheduler):
        pass

    with pytest.raises(UsageError, match="'scheduler' of the pipeline is a Mine"):
        load_source(with_scheduler("sd_1", Mine()))


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
        ("sd_1", "DDIMScheduler", {"trained_betas": [1.5] * 1000}, "negative, not finite or not"),
        ("sd_1", "DDIMScheduler", {"trained_betas": [0.0] * 1000}, "negative, not finite or not"),
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
def test_what_cannot_be_right_is_refused_in_one_line(pipe, name, settings, message):
    if settings.get("rescale_betas_zero_snr"):
        settings = settings | {"timestep_spacing": "trailing"}
    source = load_source(with_scheduler(pipe, make(name, **settings)))
    with pytest.raises(UsageError, match=f"{name} .*{message}") as raised:
        source.schedule(4)
    assert "\n" not in str(raised.value)


def test_settings_that_a_scheduler_took_over_from_another_one_do_not_count():
    """DDIM clips, Euler does not, also if it was made of DDIM's configuration."""
    ddim = make("DDIMScheduler", clip_sample=True)
    euler = diffusers.EulerDiscreteScheduler.from_config(ddim.config)
    assert euler.config.get("clip_sample")
    assert NoiseSchedule.of(euler, 4).clip is None
    assert NoiseSchedule.of(ddim, 4).clip == 1


def test_a_velocity_is_followed_from_pure_noise():
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


def test_dynamic_thresholding_is_diffusers_own():
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
    # Also where diffusers itself loads it.
    assert '"DDPMPipeline"' in (tmp_path / "run" / "model_index.json").read_text()


def test_a_run_of_an_earlier_version_draws_with_its_scheduler_too(tmp_path):
    """It says DDIMPipeline, which turns every scheduler into DDIM."""
    model = diffusers.DDPMPipeline(unet(num_class_embeds=5), make("EulerDiscreteScheduler"))
    quantize(model, RECIPE, tmp_path / "run")
    index = tmp_path / "run" / "model_index.json"
    index.write_text(index.read_text().replace("DDPMPipeline", "DDIMPipeline"))
    from trtq.diffusion.folder import load_pipeline_parts
    from trtq.diffusion.layout import read_null_class

    assert read_null_class(tmp_path / "run") is None
    loaded = load_pipeline_parts(tmp_path / "run", "unet", unet(num_class_embeds=5))
    assert type(loaded.scheduler).__name__ == "EulerDiscreteScheduler"


def test_a_pipeline_with_a_sampler_of_its_own_stays_what_it_is():
    scheduler = diffusers.CMStochasticIterativeScheduler()
    pipe = diffusers.ConsistencyModelPipeline(unet(num_class_embeds=5), scheduler)
    source = load_source(pipe)
    assert type(source.pipeline) is type(pipe)
    assert type(source.pipeline.scheduler) is type(scheduler)
    assert stepping_of(pipe) is None
    with pytest.raises(
        UsageError, match=r"ConsistencyModelPipeline is not supported.* DDPMPipeline"
    ):
        source.schedule(4)


def test_a_pipeline_that_passes_no_class_is_refused_a_unet_with_classes():
    pipe = build("ldm_vq")
    pipe.unet = unet(num_class_embeds=5)
    with pytest.raises(UsageError, match="num_class_embeds=5, and LDMPipeline passes no class"):
        load_source(pipe).draw_conditions(1, torch.Generator())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time_cond_proj_dim": 16}, "time_cond_proj_dim=16.*timestep_cond.*LCM LoRA"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "IP-Adapter.*unload_ip_adapter"),
    ],
)
def test_inputs_that_trtq_does_not_pass_are_refused(settings, message, tmp_path):
    built = {k: v for k, v in settings.items() if k != "encoder_hid_dim_type"}
    pipe = stable_diffusion(conditional_unet(64, **built), diffusers.LCMScheduler())
    # As load_ip_adapter() does; no UNet is built so.
    pipe.unet.register_to_config(**settings)
    with pytest.raises(UsageError, match=message):
        quantize(pipe, RECIPE, tmp_path / "run")
    with pytest.raises(UsageError, match=message):
        load_source(pipe).encode(["a"])


def test_one_step_is_not_needed_to_plan_more(tmp_path):
    """Two-point grids have ends; of one point the exponential one is no number."""
    scheduler = make(
        "FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, shift_terminal=0.1
    )
    pipe = with_scheduler("flux", scheduler)
    recipe = RECIPE | {"calibration": {"images": 1, "samples_per_step": 16}, "steps": 2}
    assert quantize(pipe, recipe, tmp_path / "run")["layers_quantized"] > 0


def test_a_walk_is_tried_once_per_settings(monkeypatch):
    from trtq.diffusion import schedule

    walks = []
    monkeypatch.setattr(schedule, "_REHEARSED", {})
    monkeypatch.setattr(schedule, "_rehearse", lambda *given: walks.append(given) or None)
    for scheduler in (
        make("DDIMScheduler"),
        make("DDIMScheduler"),
        make("DDIMScheduler", beta_end=0.03),
    ):
        check_steps(scheduler, 5)
    assert len(walks) == 2


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_pixart_goes_one_step_only_with_schedulers_that_predict_the_image(name):
    pipeline = build("pixart")
    pipeline.scheduler = getattr(diffusers, name)()
    source = load_source(pipeline)
    source.check_steps(2)
    with pytest.raises(UsageError, match="second result, which it does not give"):
        source.check_steps(1)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler()
    load_source(pipeline).check_steps(1)
