"""The choice of input transforms, and a run with them from its recipe to its graph."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import trtq
from tests.families.pipelines import diffusion, vae
from trtq.artefact.manifest_file import write_manifest
from trtq.artefact.opened import open_folder
from trtq.calib.input_rows import RowRecorder
from trtq.calib.policy import Policy, plan_layers
from trtq.calib.recipe import load_recipe
from trtq.calib.transform_error import TransformChoice
from trtq.calib.transforms import smoothing_factors, transform_layers
from trtq.cli import app
from trtq.diffusion.loading import open_pipeline
from trtq.errors import ArtefactError, RecipeError
from trtq.evaluation.metrics import noise_prediction_snr
from trtq.quant import LayerPlan, TimestepTable
from trtq.runs.quantize import quantize

WIDTH = 32


def transformer(planted):
    """A DiT of one block; `planted`: 2 of 32 channels x 50 in front of q, k, v and the feed-forward
    part, and the inverse in their weights, which leaves the function unchanged."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        num_embeds_ada_norm=10,
    ).eval()
    block = model.transformer_blocks[0]
    attention, modulation = block.attn1, block.norm1.linear
    readers = ((0, (attention.to_q, attention.to_k, attention.to_v)), (3, (block.ff.net[0].proj,)))
    with torch.no_grad():
        for gate in (2, 5):
            modulation.bias[gate * WIDTH : (gate + 1) * WIDTH] += 1
        for place, layers in readers if planted else ():
            channels = torch.tensor([3, 20])
            shift, scale = place * WIDTH + channels, (place + 1) * WIDTH + channels
            modulation.weight[torch.cat([shift, scale])] *= 50
            modulation.bias[shift] *= 50
            modulation.bias[scale] = 50 * (1 + modulation.bias[scale]) - 1
            for layer in layers:
                layer.weight[:, channels] /= 50
    return model


def pipeline(model):
    from diffusers import DiTPipeline

    return DiTPipeline(transformer=model, vae=vae(), scheduler=diffusion())


RECIPE = {
    "method": "minmax",
    "bits": "w4a4",
    "steps": 3,
    "calibration": {"images": 8, "samples_per_step": 512},
}


def made(folder, planted, **changes):
    quantize(pipeline(transformer(planted)), RECIPE | changes, folder)
    return folder


def snr(folder, planted):
    """Mean SNR in dB of the run's predictions."""
    reference = open_pipeline(pipeline(transformer(planted)))
    low_bit = open_pipeline(pipeline(trtq.load(folder, provider="torch").transformer))
    rows = noise_prediction_snr(low_bit, reference, steps=3, seed=3, images=8)
    return sum(rows) / len(rows)


@pytest.fixture(scope="module")
def smoothed(tmp_path_factory):
    return made(tmp_path_factory.mktemp("smoothed") / "run", planted=True)


def rows_of(folder):
    return {row.name: row for row in open_folder(folder).manifest.layers}


def test_smoothing_undoes_planted_outliers(smoothed, tmp_path):
    """The model without outliers is the bound; without smoothing the outliers cost 6 dB and more."""
    plain = snr(made(tmp_path / "plain", planted=False), planted=False)
    off = snr(made(tmp_path / "off", planted=True, smooth=False), planted=True)
    assert off < plain - 6
    assert snr(smoothed, planted=True) > plain - 1


def test_the_manifest_says_what_was_done(smoothed):
    rows = rows_of(smoothed)
    attention = [rows[f"transformer_blocks.0.attn1.to_{name}"] for name in "qkv"]
    assert all(row.smooth and row.outlier_ratio > 20 for row in attention)
    assert attention[1].input_of == attention[2].input_of == attention[0].name
    tensors = load_file(smoothed / "quantized.safetensors")
    factors = [tensors[f"layer:{row.name}:transform.inv_channels"] for row in attention]
    assert torch.equal(factors[0], factors[1])
    assert factors[0].argmin() in (3, 20)


def test_inspect_names_inputs_with_outliers(smoothed):
    result = CliRunner().invoke(app, ["inspect", str(smoothed)])
    assert "largest channel over 20 x the median" in result.output
    assert "smoothed" in result.output
    result = CliRunner().invoke(app, ["inspect", str(smoothed), "--json"])
    rows = {row["name"]: row for row in json.loads(result.stdout)["layers"]}
    assert rows["transformer_blocks.0.attn1.to_q"]["smooth"] is True


def test_a_warning_names_inputs_with_outliers(tmp_path, caplog):
    made(tmp_path / "run", planted=True, smooth=False, rotate=16)
    assert "is over 20 x the median channel in" in caplog.text
    assert "transformer_blocks.0.attn1.to_q (" in caplog.text


def test_the_exported_graph_of_rotated_layers_with_row_scales_equals_torch(tmp_path):
    changes = {"rotate": 16, "smooth": False, "scales": "row", "attention": {"quantize": True}}
    run = made(tmp_path / "run", planted=True, **changes)
    low_bit = [row for row in rows_of(run).values() if row.activation_bits is not None]
    assert any(row.rotate for row in low_bit)
    assert {row.scales for row in low_bit} == {"row"}
    assert trtq.export(run, tmp_path / "onnx").parity_db_min >= 40


def test_fine_tuning_keeps_the_transforms(tmp_path):
    training = {"iterations": 2, "batch": 2, "rank": 2}
    run = made(tmp_path / "run", planted=True, method="efficientdm", training=training)
    assert rows_of(run)["transformer_blocks.0.attn1.to_q"].smooth
    assert snr(run, planted=True) > 10


FORMATS = {
    "fp8": {"bits": "w8a8", "format": "fp8"},
    "nvfp4": {"format": "nvfp4"},
    "weight_only": {"bits": "w4a16", "group": 32},
}


@pytest.mark.parametrize("format", FORMATS)
def test_layers_in_other_formats_are_smoothed(format, tmp_path):
    run = made(tmp_path / "run", planted=True, **FORMATS[format])
    row = rows_of(run)["transformer_blocks.0.attn1.to_q"]
    assert (row.format, row.smooth) == (format, True)
    off = made(tmp_path / "off", planted=True, smooth=False, **FORMATS[format])
    # FP8 has a mantissa of 3 bits at every magnitude, so outliers cost it nothing.
    margin = 1 if format == "fp8" else -1
    assert snr(run, planted=True) > snr(off, planted=True) - margin


def test_a_transform_that_the_manifest_does_not_know_is_refused(smoothed, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(smoothed, folder)
    manifest = open_folder(folder).manifest
    path = folder / "quantized.safetensors"
    tensors, name = load_file(path), "layer:transformer_blocks.0.attn1.to_q:transform.inv_channels"
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({key: value for key, value in tensors.items() if key != name}, path, metadata)
    write_manifest(folder, manifest)
    with pytest.raises(ArtefactError, match="the manifest says smooth=True and rotate=0, the file"):
        trtq.load(folder, provider="torch")


def test_a_rotation_of_another_order_is_refused():
    with pytest.raises(RecipeError, match="rotate: Input should be 0, 16, 64 or 256"):
        load_recipe(None, {"rotate": 32})


def test_smoothing_factors_have_geometric_mean_1_and_follow_the_formula():
    weights = [torch.tensor([[1.0, 2, 4], [2.0, 1, 1]]), torch.tensor([[4.0, 1, 1]])]
    a, w = torch.tensor([16.0, 1, 4]), torch.tensor([4.0, 2, 4])
    factors = smoothing_factors(a, weights, 0.75)
    expected = a**0.75 / w**0.25
    torch.testing.assert_close(factors, expected / expected.log().mean().exp())


def test_channels_that_are_zero_get_finite_factors():
    factors = smoothing_factors(torch.zeros(4), [torch.zeros(2, 4)], 0.5)
    assert torch.equal(factors, torch.ones(4))
    mixed = smoothing_factors(torch.tensor([0.0, 1]), [torch.tensor([[1.0, 0]])], 0.5)
    assert bool(torch.isfinite(mixed).all())


def recorded(model, plans, x):
    recorder = RowRecorder(plans, TimestepTable([1, 501]), 0)
    for recorder.step in range(2):
        for plan in plans:
            if plan.name in recorder.layers:
                recorder.observe(plan.name, (x,))
    return recorder.inputs


def chain(groups=1):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(32, 8, 3, groups=groups), torch.nn.Conv2d(32, 4, 1))


def outliers():
    x = torch.randn(4, 32, 6, 6, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 60
    return x


def test_layers_that_share_an_input_share_its_transform():
    model, x = chain(), outliers()
    with torch.no_grad():
        for layer in model:
            layer.weight[:, 5] /= 60
    plans = [
        LayerPlan("0", "conv2d", 4, 4, ""),
        LayerPlan("1", "conv2d", 4, 4, "", input_of="0"),
    ]
    result = transform_layers(model, plans, recorded(model, plans, x), TransformChoice())
    assert [plan.smooth for plan in result] == [True, True]
    assert torch.equal(model[0].input_transform.inv_channels, model[1].input_transform.inv_channels)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({}, TransformChoice(smooth=False)),
        ({"may_smooth": False}, TransformChoice()),
        ({"activation_bits": None, "weight_bits": None}, TransformChoice()),
    ],
)
def test_what_is_not_allowed_is_not_chosen(change, options):
    model, x = chain(), outliers()
    plans = [
        LayerPlan(
            **{"name": "0", "kind": "conv2d", "weight_bits": 4}
            | {"activation_bits": 4, "reason": ""}
            | change
        )
    ]
    before = model[0].weight
    result = transform_layers(model, plans, recorded(model, plans, x), options)
    assert not result[0].smooth
    assert model[0].weight is before


def test_a_convolution_in_groups_stays_as_it_is():
    model, x = chain(groups=2), outliers()
    plans = [LayerPlan("0", "conv2d", 4, 4, "")]
    (plan,) = transform_layers(model, plans, recorded(model, plans, x), TransformChoice())
    assert not plan.smooth
    assert plan.outlier_ratio is None


def test_a_rotation_that_does_not_divide_the_channels_falls_back_to_a_smaller_one():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 8))
    # One large value per row, in any channel: nothing for smoothing, everything for a rotation.
    x = torch.randn(64, 48) / 10
    x.scatter_(1, torch.randint(0, 48, (64, 1)), torch.randn(64, 1) * 5)
    plans = [LayerPlan("0", "linear", 8, 4, "")]
    options = TransformChoice(smooth=False, rotate=64)
    (plan,) = transform_layers(model, plans, recorded(model, plans, x), options)
    assert plan.rotate == 16


def test_rules_of_a_policy_limit_the_choice_and_set_the_scales():
    policy = Policy.model_validate(
        {
            "family": "Test",
            "rule": [
                {"layers": ["0"], "bits": "recipe", "reason": "a", "smooth": False, "rotate": 16},
                {"layers": ["1"], "bits": "w8a8", "reason": "b", "scales": "row"},
            ],
        }
    )
    first, second = plan_layers(chain(), policy, "w4a4", scales="hybrid")
    assert (first.may_smooth, first.may_rotate, first.scales) == (False, 16, "hybrid")
    assert (second.may_smooth, second.may_rotate, second.scales) == (True, None, "row")


def tokens(*, one_sided):
    """Inputs whose rows differ in size by a factor of up to 100, or have equal size and one sign."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=generator)
    return x.abs() if one_sided else x * torch.logspace(0, 2, 256)[:, None]


@pytest.mark.parametrize(("one_sided", "expected"), [(False, "row"), (True, "step")])
def test_auto_chooses_scales_per_row_where_rows_differ_in_size(one_sided, expected):
    """Codes with a scale per row are symmetric, so inputs of one sign would use half of them."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(32, 8)), tokens(one_sided=one_sided)
    for free in (True, False):
        plans = [LayerPlan("0", "linear", 8, 4, "", free_scales=free)]
        options = TransformChoice(smooth=False)
        (plan,) = transform_layers(model, plans, recorded(model, plans, x), options)
        assert plan.scales == (expected if free else "step")


def test_auto_leaves_scales_to_a_rule_and_steps_to_everything_but_linear_layers():
    policy = Policy.model_validate(
        {
            "family": "Test",
            "rule": [
                {"layers": ["1"], "bits": "recipe", "reason": "a", "scales": "hybrid"},
                {"layers": ["3"], "bits": "float", "reason": "b"},
                {"layers": ["*"], "bits": "recipe", "reason": "c"},
            ],
        }
    )
    model = torch.nn.Sequential(
        torch.nn.Conv2d(32, 32, 3), *(torch.nn.Linear(32, 32) for _ in range(3))
    )
    plans = plan_layers(model, policy, "w4a4", scales="auto")
    assert [plan.scales for plan in plans] == ["step", "hybrid", "step", "step"]
    assert [plan.free_scales for plan in plans] == [False, False, True, False]
    assert not any(plan.free_scales for plan in plan_layers(model, policy, "fp8", scales="auto"))


@pytest.mark.slow
def test_the_best_recipe_from_training_to_the_graph(tmp_path):
    changes = {"method": "best", "training": {"iterations": 4, "batch": 4, "rank": 4}}
    run = made(tmp_path / "run", planted=True, **changes)
    manifest = open_folder(run).manifest
    assert manifest.recipe.scales == "auto"
    assert {row.scales for row in manifest.layers if row.activation_bits} <= {"step", "row"}
    assert trtq.export(run, tmp_path / "onnx").parity_db_min >= 40
