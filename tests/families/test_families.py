"""Every kind of pipeline is quantised, exported, loaded and served, with equal results."""

import json

import pytest
import torch

import trtq
from tests.families.pipelines import PIPELINES, build
from tests.serve.models.test_pipeline import furthest, served, whole
from trtq.calib.policy import load_policy, plan_layers
from trtq.diffusion.families import FAMILIES
from trtq.diffusion.loading import open_pipeline
from trtq.errors import LegalityError, UsageError
from trtq.exporter.export import export
from trtq.pipelines.draw import conditioning_for, draw
from trtq.pipelines.open import open_any
from trtq.runs.quantize import quantize
from trtq.serve.models.base import Sizes
from trtq.serve.models.pipeline import PipelineModel

SIZES = {"flux": "16x32", "pixart": "16x32", "sd_xl": "8x24"}
CLOSE_TO_OTHERS = ("sd_2", "sd_xl", "ldm_kl", "ldm_vq", "pixart", "sd_3")
RECIPE = {
    "method": "search",
    "bits": "w4a8",
    "steps": 2,
    "attention": {"quantize": True},
    "calibration": {"images": 2, "samples_per_step": 64},
}


@pytest.mark.parametrize(
    "name",
    # The families closest to others are marked slow, to limit the time of nine exports.
    [pytest.param(n, marks=pytest.mark.slow) if n in CLOSE_TO_OTHERS else n for n in PIPELINES],
)
def test_a_pipeline_is_quantised_exported_and_served(name, tmp_path):
    """Use a folder, as users do, at the pipeline's default size or another size."""
    checkpoint, run, onnx = tmp_path / "model", tmp_path / "run", tmp_path / "onnx"
    build(name).save_pretrained(checkpoint)
    (checkpoint / "prompts.json").write_text(json.dumps({"calibration": ["a red circle", "a"]}))
    made = quantize(checkpoint, RECIPE | {"size": SIZES.get(name)}, run)
    assert made["layers_quantized"] >= 25
    exported = export(run, onnx)
    assert exported["parity_db_min"] >= 40
    assert all(db >= 60 for db in exported["parity_parts_db"].values())
    # Nothing needs torch any more, neither text encoders nor the autoencoder.
    assert not list(onnx.rglob("*.safetensors"))
    source = open_any(onnx)
    assert type(trtq.load(onnx)).__name__ == type(build(name)).__name__
    if name in SIZES:
        assert "{}x{}".format(*source.image_size) == SIZES[name]
    conditioning = conditioning_for(source, 2)
    images = draw(source, conditioning, steps=2, seed=0)
    assert images.shape == (2, 3, *source.image_size)
    expected = draw(open_any(run), conditioning, steps=2, seed=0)
    # The bound holds after two steps and a decoder; a wrong scale or step would destroy the image.
    assert float((images - expected).abs().mean()) < 0.02
    model = PipelineModel(source, name, "cpu")
    assert model.info.takes_guidance or model.info.guidance == 1.0
    assert furthest(served(model, 1), whole(source, model, 1)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_run_is_exported_at_another_size_than_it_was_calibrated_at(name, tmp_path):
    """Compare at every step and at mixed steps, with at least four items at two steps."""
    run = tmp_path / "run"
    side = 16 if name in SIZES else open_pipeline(build(name)).image_size[0]
    quantize(build(name), RECIPE | {"size": f"{side}x{side}"}, run)
    # DiT supports only square images.
    for size in (f"{2 * side}x{side if name != 'dit' else 2 * side}", f"{3 * side}x{3 * side}"):
        onnx = tmp_path / size
        exported = export(run, onnx, size=size)
        assert len(exported["parity_db"]) == RECIPE["steps"] + 1
        assert exported["parity_db_min"] >= 40


@pytest.mark.parametrize("name", ["sd_1", "dit", "pixart", "sd_3", "flux"])
def test_the_policy_of_a_family_names_every_layer(name, caplog):
    source = open_pipeline(build(name))
    assert source.model_class in FAMILIES
    plans = plan_layers(source.denoiser, load_policy(source.model_class), "w4a4")
    assert not caplog.records
    floats = {plan.name for plan in plans if not plan.quantized}
    assert all("embedder" in layer for layer in floats)
    assert sum(plan.weight_bits == 4 for plan in plans) >= 10
    policy = load_policy(source.model_class)
    for tuned in ("time_embedding", "attention"):
        assert policy.select(tuned, [plan.name for plan in plans])


@pytest.mark.parametrize(
    ("name", "predicts", "timesteps"),
    [
        ("sd_1", "epsilon", [501, 1]),
        ("sd_2", "v_prediction", [999, 0]),
        ("pixart", "epsilon", [999, 500]),
        ("sd_3", "flow_prediction", [1000, pytest.approx(8.93, abs=0.01)]),
        ("flux", "flow_prediction", [1, pytest.approx(0.7, abs=0.15)]),
    ],
)
def test_schedulers_of_all_kinds_have_noise_levels(name, predicts, timesteps):
    """Timesteps are the denoiser's inputs; Flux takes timesteps in 0 .. 1."""
    source = open_pipeline(build(name))
    schedule = source.schedule(2)
    assert schedule.prediction == predicts
    assert schedule.timesteps.tolist() == timesteps
    levels = schedule.sigma / schedule.signal.clamp_min(1e-6)
    assert bool((levels.diff() < 0).all())
    assert levels[-1] == 0


def test_a_flow_step_equals_that_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    source = open_pipeline(build("sd_3"))
    schedule = source.schedule(5)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(source.pipeline.scheduler.config)
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    x, predicted = torch.randn(2, 1, 4, 4, 4, generator=generator)
    for position, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(predicted, t, x).prev_sample
        ours = schedule.step(x, predicted, torch.tensor([position]))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="not defined for flow matching"):
        schedule.step(x, predicted, torch.tensor([0]), eta=1.0)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("17x16", "multiples of"),
        ("0x16", "write HEIGHTxWIDTH"),
        ("big", "write HEIGHTxWIDTH"),
        ("2x2", "multiples of"),
    ],
)
def test_invalid_sizes_are_refused(size, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        quantize(build("sd_1"), RECIPE | {"size": size}, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd_1", "sd_3"])
def test_one_graph_supports_a_range_of_sizes(name, tmp_path):
    checkpoint, run, onnx = tmp_path / "model", tmp_path / "run", tmp_path / "onnx"
    build(name).save_pretrained(checkpoint)
    (checkpoint / "prompts.json").write_text(json.dumps({"calibration": ["a red circle", "a"]}))
    quantize(checkpoint, RECIPE, run)
    exported = export(run, onnx, size="16x16:24x32")
    assert exported["parity_db_min"] >= 40
    assert exported["parity_largest_db"] >= 40
    source = open_any(onnx)
    assert source.image_size == (16, 16)
    model = PipelineModel(source, name, "cpu")
    assert model.info.sizes == Sizes((16, 16), (24, 32), 4)
    (image,) = served(model, 1, size=(24, 32))
    source = source.sized("24x32")
    assert furthest([image], whole(source, model, 1)) <= 1
    conditioning = conditioning_for(source, 1)
    assert draw(source, conditioning, steps=1, seed=0).shape == (1, 3, 24, 32)
    source = source.sized("24x40")
    supported = r"latents of 12x20 \(HEIGHTxWIDTH\); it supports 8x8 to 12x16, multiples of 2"
    with pytest.raises(UsageError, match=supported):
        draw(source, conditioning, steps=1, seed=0)


def test_a_pipeline_with_a_fixed_size_refuses_others():
    source = open_pipeline(build("dit"))
    source = source.sized("32x32")
    with pytest.raises(UsageError, match="DiTPipeline draws images of the model's own size only"):
        draw(source, conditioning_for(source, 1), steps=1, seed=0)


def test_a_size_that_cannot_be_traced_is_refused(tmp_path):
    build("dit").save_pretrained(tmp_path / "model")
    with pytest.raises(LegalityError, match="torch cannot trace DiTTransformer2DModel"):
        export(tmp_path / "model", tmp_path / "onnx", size="16x32")
    assert not (tmp_path / "onnx").exists()


def test_a_model_with_positional_embeddings_has_one_size(tmp_path):
    build("dit").save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="export once for each size"):
        export(tmp_path / "model", tmp_path / "onnx", size="16x16:32x32")
    assert not (tmp_path / "onnx").exists()
