"""Policies, recipes and recordings."""

import logging

import pytest
import torch
from torch import nn

from tests.conftest import tiny_pipeline
from trtq.bits import parse_bits
from trtq.calib.activation_tables import activation_tables
from trtq.calib.policy import load_policy, plan_layers
from trtq.calib.recipe import load_recipe
from trtq.calib.record import record
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.schedule import NoiseSchedule
from trtq.errors import NonFiniteError, RecipeError
from trtq.quant import TimestepTable
from trtq.runs.quantize import quantize


@pytest.mark.parametrize("text", ["4", "w4", "w4a", "a4w4", "w9a4", "w4a1", ""])
def test_invalid_bits_are_refused(text):
    with pytest.raises(RecipeError, match="bits="):
        parse_bits(text)


def test_the_policy_of_efficientdm_for_the_digits_model():
    unet = open_pipeline("digits").denoiser
    plans = {p.name: p for p in plan_layers(unet, load_policy("UNet2DModel"), "w4a4")}
    eight = {name for name, plan in plans.items() if plan.weight_bits == 8}
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"} <= eight
    assert not any(plans[name].adapters for name in eight)
    assert all(plan.quantized for plan in plans.values())
    assert sum(plan.weight_bits == 4 for plan in plans.values()) == 41


def test_an_unknown_family_gets_the_generic_policy_with_a_warning(caplog):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Conv2d(1, 1, 1))
    with caplog.at_level(logging.WARNING):
        policy = load_policy("NewFancyTransformer")
        plans = plan_layers(model, policy, "w4a4")
    assert [plan.weight_bits for plan in plans] == [8, 4, 8]
    assert "NewFancyTransformer" in caplog.text
    assert "2 layers w8a8" in caplog.text


def test_layers_without_a_rule_stay_float_with_a_warning(caplog, tmp_path):
    path = tmp_path / "p.toml"
    path.write_text('family="x"\n[[rule]]\nlayers=["0"]\nbits="recipe"\nreason="r"\n')
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with caplog.at_level(logging.WARNING):
        plans = plan_layers(model, load_policy("x", path), "w4a4")
    assert [plan.quantized for plan in plans] == [True, False]
    assert "left in float, since no rule names them: 1" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bitz = 'w4a4'", "bitz: unknown key"),
        ("[training]\nrnk = 3", "training.rnk: unknown key"),
        ("method = 'magic'", "unknown method 'magic'; choose one of best, combined, efficientdm"),
        ("bits = 'w4a99'", "bits=99"),
        ("steps = 0", "steps: .*greater than or equal to 1"),
        ("tables = 'per-layer'", "tables: .*'per-step' or 'static'"),
        ("this is no toml", "cannot read the recipe"),
        ("[training]\nsplit_step = true", "split_scale=true needs"),
        ("[training]\nrank = 0", "leaves nothing to train"),
        ("method = 'minmax'\n[quest]\nfirst_stage = 0.5", "needs a .training. section"),
        ("[attention]\nprobability_bits = 9", "attention.probability_bits"),
    ],
)
def test_invalid_recipes_are_refused(text, message, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_former_names_are_accepted_for_one_release(tmp_path):
    training = {"base": "int", "split_step": True}
    assert load_recipe(overrides={"training": training}).training.split_scale
    path = tmp_path / "p.toml"
    path.write_text('family="x"\n[[rule]]\nlayers=["*"]\nbits="target"\nreason="r"\n')
    (plan,) = plan_layers(nn.Sequential(nn.Linear(2, 2)), load_policy("x", path), "w4a8")
    assert (plan.weight_bits, plan.activation_bits) == (4, 8)


def test_overrides_take_precedence_over_the_file_and_the_file_over_the_method(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("bits = 'w4a8'\nsteps = 7\n[training]\nrank = 5\n")
    recipe = load_recipe(path, {"steps": 9})
    assert (recipe.bits, recipe.steps, recipe.training.rank) == ("w4a8", 9, 5)
    assert recipe.calibration.weights == "minmax"


def recordings(source, guidance=1.0, seed=0):
    schedule = NoiseSchedule.of(source.pipeline.scheduler, 4)
    table = TimestepTable(schedule.timesteps.tolist())
    plans = plan_layers(source.denoiser, load_policy("UNet2DModel"), "w4a4")
    conditions = source.draw_conditions(6, torch.Generator().manual_seed(0))
    recorded = record(
        source.denoiser,
        plans,
        schedule,
        table,
        conditions,
        source.sample_shape,
        images=6,
        batch=4,
        samples_per_step=64,
        seed=seed,
        guidance=guidance,
    )
    return recorded, plans, table


def test_each_input_is_recorded_under_its_timestep(tiny):
    recorded, _, table = recordings(tiny)
    expected = {}
    embed = tiny.denoiser.time_proj
    for index, t in enumerate(table.timesteps):
        expected[index] = embed(t[None])
    recording = recorded["time_embedding.linear_1.activation"]
    for index in range(4):
        torch.testing.assert_close(recording.low[index], expected[index].min())
        torch.testing.assert_close(recording.high[index], expected[index].max())
        assert set(recording.sample[index].tolist()) <= set(expected[index].flatten().tolist())


def test_tables_contain_zero_and_have_one_entry_per_step(tiny):
    recorded, plans, _ = recordings(tiny)
    for static, length in ((False, 4), (True, 1)):
        tables = activation_tables(recorded, plans, "search", static=static)
        for plan in plans:
            scale, zero = tables[f"{plan.name}.activation"]
            assert scale.shape == zero.shape == (length,)
            assert bool((scale > 0).all())
            assert bool(((zero >= 0) & (zero <= 2**plan.activation_bits - 1)).all())
            if plan.activation_bits == 8:
                assert zero.tolist() == [128] * length


def test_recording_is_deterministic_and_leaves_no_hooks(tiny):
    first, _, _ = recordings(tiny)
    second, _, _ = recordings(tiny)
    for name in first:
        assert torch.equal(first[name].sample, second[name].sample)
    assert not any(module._forward_pre_hooks for module in tiny.denoiser.modules())


def test_both_halves_of_a_guidance_pair_are_recorded(tiny):
    recorded, _, _ = recordings(tiny, guidance=2.0)
    # "No class" has a separate embedding, which only the unconditional half uses.
    name = "down_blocks.0.resnets.0.time_emb_proj.activation"
    alone, _, _ = recordings(tiny)
    assert not torch.equal(recorded[name].low, alone[name].low)


def test_an_error_about_nan_weights_names_the_layer(tmp_path):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = torch.nan
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=r"layer 'mid_block\.resnets\.0\.\w+'"):
        quantize(pipeline, {"method": "minmax", "steps": 2}, out)
    assert list(tmp_path.iterdir()) == []
