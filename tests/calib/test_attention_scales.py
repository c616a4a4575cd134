"""Outlier channels in front of attention's low-bit products, from the recording to LoRAs and reports."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import trtq
from tests.calib.test_transforms import pipeline, rows_of, transformer
from tests.families import pipelines
from trtq.calib.attention_rows import AttentionRecorder
from trtq.calib.attention_scales import scale_attention
from trtq.calib.policy import Policy, plan_layers
from trtq.calib.transform_error import TransformChoice
from trtq.cli import app
from trtq.diffusion.loading import open_pipeline
from trtq.evaluation.metrics import layer_snr, noise_prediction_snr
from trtq.lora import LoraRequest
from trtq.quant import LayerPlan, Structure, apply_structure, attention_modules
from trtq.runs import exchange_loras
from trtq.runs.exchange_loras import requantize
from trtq.runs.folder import open_run
from trtq.runs.quantize import quantize

MIX = "transformer_blocks.0.attn1.processor.mix"
SCORES = "transformer_blocks.0.attn1.processor.scores"
RECIPE = {
    "method": "minmax",
    "bits": "w4a4",
    "steps": 3,
    "attention": {"quantize": True},
    "calibration": {"images": 8, "samples_per_step": 512},
}


def with_large_values():
    """The DiT of one block with 2 of 32 channels of the values x 50; the function is the same."""
    model = transformer(planted=False)
    attention, channels = model.transformer_blocks[0].attn1, torch.tensor([3, 20])
    with torch.no_grad():
        attention.to_v.weight[channels] *= 50
        attention.to_v.bias[channels] *= 50
        attention.to_out[0].weight[:, channels] /= 50
    return model


def made(model, folder, **changes):
    quantize(pipeline(model), RECIPE | changes, folder)
    return folder


def snr(folder, model):
    """Mean SNR in dB of the run's predictions against a float model."""
    low_bit = open_pipeline(pipeline(trtq.load(folder, provider="torch").transformer))
    rows = noise_prediction_snr(low_bit, open_pipeline(pipeline(model)), steps=3, seed=3, images=8)
    return sum(rows) / len(rows)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large_values") / "model"
    pipeline(with_large_values()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(checkpoint):
    folder = checkpoint.parent / "run"
    quantize(checkpoint, RECIPE, folder)
    return folder


def test_scaled_channels_undo_outliers_of_the_values(run, tmp_path):
    """The model without outliers is the bound; unscaled, the outliers cost 6 dB and more."""
    clean = transformer(planted=False)
    plain = snr(made(clean, tmp_path / "plain"), clean)
    off = snr(made(with_large_values(), tmp_path / "off", smooth=False), clean)
    assert off < plain - 6
    assert snr(run, clean) > plain - 1


def test_the_manifest_and_the_file_hold_the_factors(run):
    row = rows_of(run)[MIX]
    assert row.smooth
    assert row.outlier_ratio > 20
    inverse = load_file(run / "quantized.safetensors")[f"layer:{MIX}:transform.inv_channels"]
    assert set(inverse.argsort()[:2].tolist()) == {3, 20}
    assert open_run(run).stored.layers[MIX].transform is not None


def test_a_file_without_its_factors_is_refused(run, tmp_path):
    import shutil

    from safetensors import safe_open

    from trtq.artefact.manifest_file import write_manifest
    from trtq.artefact.opened import open_folder
    from trtq.errors import ArtefactError

    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path, manifest = folder / "quantized.safetensors", open_folder(folder).manifest
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors, name = load_file(path), f"layer:{MIX}:transform.inv_channels"
    save_file({key: value for key, value in tensors.items() if key != name}, path, metadata)
    write_manifest(folder, manifest)
    with pytest.raises(ArtefactError, match="the manifest says smooth=True and rotate=0, the file"):
        trtq.load(folder, provider="torch")


def test_inspect_names_the_values(run):
    result = CliRunner().invoke(app, ["inspect", str(run), "--json"])
    rows = {row["name"]: row for row in json.loads(result.stdout)["layers"]}
    assert rows[MIX]["smooth"] is True
    assert rows[MIX]["outlier_ratio"] > 20


def test_a_warning_names_values_that_stay_as_they_are(tmp_path, caplog):
    folder = made(with_large_values(), tmp_path / "run", smooth=False, rotate=16)
    assert f"{MIX} (" in caplog.text
    assert "x, unchanged: smoothing is off)" in caplog.text
    row = rows_of(folder)[MIX]
    assert row.reason.endswith("; channels not scaled: smoothing is off")
    assert not row.smooth
    output = CliRunner().invoke(app, ["inspect", str(folder)]).output
    assert "(unchanged: smoothing is off)" in " ".join(output.split())


def test_the_exported_graph_equals_torch(run, tmp_path):
    assert trtq.export(run, tmp_path / "onnx").parity_db_min >= 40


@pytest.mark.parametrize("method", ["efficientdm", "quest"])
def test_fine_tuning_keeps_the_factors(method, tmp_path):
    training = {"iterations": 2, "batch": 2} | ({"rank": 2} if method == "efficientdm" else {})
    changes = {"method": method, "training": training}
    if method == "quest":
        # Two iterations; with the recipe's rates they would move weights by several levels.
        changes["quest"] = {"adaround": 0, "weight_travel": 1e-3}
        training["activation_lr"] = 1e-6
    folder = made(with_large_values(), tmp_path / "run", **changes)
    assert rows_of(folder)[MIX].smooth
    assert snr(folder, with_large_values()) > 10


LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def styled(checkpoint):
    """A LoRA of all layers around the products, and the float model with it."""
    model, tensors = with_large_values(), {}
    generator = torch.Generator().manual_seed(1)
    for name in LAYERS:
        path = f"transformer_blocks.0.attn1.{name}"
        layer = model.get_submodule(path)
        # Relative to each row and column, as a LoRA that was trained on this model is.
        rows, columns = (layer.weight.detach().abs().mean(axis) for axis in (1, 0))
        up = torch.randn(len(rows), 4, generator=generator) * rows[:, None] / 4
        down = torch.randn(4, len(columns), generator=generator) * columns / columns.mean()
        tensors[f"transformer.{path}.lora_A.weight"] = down.contiguous()
        tensors[f"transformer.{path}.lora_B.weight"] = up.contiguous()
        with torch.no_grad():
            layer.weight += up @ down
    file = checkpoint.parent / "style.safetensors"
    save_file(tensors, file)
    return file, model


def test_an_exchanged_lora_gets_the_factors(run, styled, tmp_path):
    file, model = styled
    requantize(run, [LoraRequest(file)], tmp_path / "new")
    transforms = [
        open_run(folder).stored.layers[MIX].transform for folder in (run, tmp_path / "new")
    ]
    assert torch.equal(transforms[0].inv_channels, transforms[1].inv_channels)
    assert rows_of(tmp_path / "new")[MIX].smooth
    assert snr(tmp_path / "new", model) > snr(run, model) + 3


def test_an_exchange_for_a_lora_of_strength_0_gives_the_same_run(
    run, styled, tmp_path, monkeypatch
):
    """Bit for bit, as the weights are scaled in the same order; not without the factors."""

    def only_noted(denoiser, product, tensors):
        denoiser.get_submodule(product).transform = tensors

    requantize(run, [LoraRequest(styled[0], 0.0)], tmp_path / "same")
    monkeypatch.setattr(exchange_loras, "scale_channels", only_noted)
    requantize(run, [LoraRequest(styled[0], 0.0)], tmp_path / "other")
    before, same, other = (
        load_file(folder / "quantized.safetensors")
        for folder in (run, tmp_path / "same", tmp_path / "other")
    )
    assert all(torch.equal(before[key], same[key]) for key in before)
    changed = {key.split(":")[1] for key in before if not torch.equal(before[key], other[key])}
    assert {f"transformer_blocks.0.attn1.{name}" for name in ("to_v", "to_out.0")} <= changed


def test_layers_are_compared_with_the_float_model_without_the_factors(run, checkpoint):
    """Errors of single layers: `to_v` is no worse than the layers next to it."""
    rows = layer_snr(
        open_pipeline(trtq.load(run, provider="torch")), open_pipeline(checkpoint), steps=3, seed=0
    )
    place = "transformer_blocks.0.attn1."
    assert rows[f"{place}to_v"] > min(rows[f"{place}to_q"], rows[f"{place}to_k"]) - 6


def test_comparison_layer_by_layer_scales_the_float_model_too(run, checkpoint):
    pytest.importorskip("polygraphy")
    result = trtq.compare(run, checkpoint, layers=True)
    rows = {row.name: row.snr_db for row in result.layers}
    # About 15 dB at 4 bits; with the factors on one side only the difference is larger than the signal.
    assert min(rows[MIX], rows[MIX.replace("processor.mix", "to_v")]) > 10


def test_a_file_for_comfyui_holds_the_weights_without_the_factors(run, checkpoint, tmp_path):
    file = tmp_path / "x.safetensors"
    trtq.export(run, file, target="comfy")
    given = open_pipeline(file, checkpoint, recorded=True).denoiser.state_dict()
    expected = open_pipeline(checkpoint).denoiser.state_dict()
    for name in ("to_v.weight", "to_v.bias", "to_out.0.weight"):
        a, b = (state[f"transformer_blocks.0.attn1.{name}"] for state in (expected, given))
        assert float((a - b).norm() / a.norm()) < 0.2


def recorded(plans, sizes=(1.0,) * 6, migrated=1.0):
    """Recordings of a decomposed attention of 2 heads, with a large channel of the values.

    Args:
        plans: plans of both products.
        sizes: sizes of the tokens' queries.
        migrated: factor of a channel of the queries, and divisor of the same channel of the keys.
    """
    recorder = AttentionRecorder(plans, 2, 0)
    generator = torch.Generator().manual_seed(0)
    for step in range(2):
        query, key, value = torch.randn(3, 2, 2, 6, 8, generator=generator)
        value[:, 1, :, 5] *= 40
        query *= torch.tensor(sizes)[:, None]
        query[:, 0, :, 2] *= migrated
        key[:, 0, :, 2] /= migrated
        probabilities = (query @ key.mT).softmax(-1)
        recorder.observe(plans[0].name, (query, key.mT), step)
        recorder.observe(plans[1].name, (probabilities, value), step)
    return recorder.rows


def attention(**options):
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    made = Attention(**{"query_dim": 16, "heads": 2, "dim_head": 8} | options)
    model = torch.nn.ModuleDict({"attention": made})
    apply_structure(model, Structure(tuple(attention_modules(model))))
    plans = [
        LayerPlan("attention.processor.scores", "product", None, 4, "a", right_bits=4),
        LayerPlan("attention.processor.mix", "product", None, 8, "b", right_bits=4),
        LayerPlan("attention.to_out.0", "linear", 4, 4, "c"),
    ]
    return model, plans


def chosen(model, plans, options=None, **changes):
    options = options or TransformChoice()
    result, _ = scale_attention(model, plans, recorded(plans, **changes), {}, options)
    return {plan.name.rpartition(".")[2]: plan for plan in result}


def test_the_largest_channel_gets_the_smallest_factor():
    model, plans = attention()
    assert chosen(model, plans)["mix"].smooth
    inverse = model.get_submodule("attention.processor.mix").transform.inv_channels
    # Head 1, channel 5 of 8.
    assert int(inverse.argmin()) == 13


def test_queries_and_keys_share_the_range_of_a_channel():
    model, plans = attention()
    plan = chosen(model, plans, migrated=50.0)["scores"]
    assert plan.smooth
    assert plan.outlier_ratio > 20
    inverse = model.get_submodule("attention.processor.scores").transform.inv_channels
    # The channel was moved by 50 and is moved back.
    assert int(inverse.argmin()) == 2
    assert float(inverse.median() / inverse[2]) > 20


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({}, TransformChoice(smooth=False), "smoothing is off"),
        ({1: {"may_smooth": False}}, TransformChoice(), "allows no smoothing of processor.mix"),
        ({2: {"may_smooth": False}}, TransformChoice(), "allows no smoothing of to_out.0"),
    ],
)
def test_what_is_not_allowed_is_not_scaled(change, options, reason):
    model, plans = attention()
    plans = [replace(plan, **change.get(place, {})) for place, plan in enumerate(plans)]
    before = model["attention"].to_v.weight
    mix = chosen(model, plans, options)["mix"]
    assert not mix.smooth
    assert mix.outlier_ratio > 20
    assert reason in mix.reason
    assert model["attention"].to_v.weight is before


def test_normalised_queries_and_keys_stay_and_values_are_scaled():
    model, plans = attention(qk_norm="layer_norm")
    plans = chosen(model, plans)
    assert plans["mix"].smooth
    assert not plans["scores"].smooth
    assert "norm_q stands between" in plans["scores"].reason


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("sizes", [(1.0,) * 6, (0.02, 0.05, 0.1, 0.2, 0.5, 3.0)])
def test_auto_gives_scales_per_row_to_queries_that_differ_in_size(sizes, free):
    model, plans = attention()
    plans = [replace(plan, free_scales=free) for plan in plans]
    scales = chosen(model, plans, sizes=sizes)["scores"].scales
    assert scales == ("row" if free and len(set(sizes)) > 1 else "step")


def test_products_have_free_scales_with_auto():
    model, _ = attention()
    policy = Policy.model_validate(
        {"family": "Test", "rule": [{"layers": ["*"], "bits": "recipe", "reason": "a"}]}
    )
    for scales, free in (("auto", True), ("step", False)):
        plans = plan_layers(model, policy, "w4a4", scales=scales)
        assert {plan.free_scales for plan in plans if plan.kind == "product"} == {free}
        assert {plan.scales for plan in plans} == {"step"}


def test_attention_in_float_is_not_recorded():
    plans = [LayerPlan("attention.processor.scores", "product", None, None, "")]
    plans += [LayerPlan("attention.processor.mix", "product", None, None, "")]
    assert AttentionRecorder(plans, 2, 0).products == set()


@pytest.mark.parametrize("family", ["sd_3", "flux"])
def test_joint_attention_is_left_alone(family, tmp_path):
    folder = tmp_path / "run"
    size = {"size": "16x16"} if family == "flux" else {}
    quantize(pipelines.build(family), RECIPE | size | {"bits": "w8a8", "steps": 2}, folder)
    assert not [row for row in rows_of(folder).values() if row.kind == "product"]


def test_cross_attention_of_a_unet_is_scaled(tmp_path):
    """Inside the pipeline's own call, with several numbers of tokens."""
    folder = tmp_path / "run"
    calls = [{"prompt": "a red circle", "num_inference_steps": 2, "output_type": "latent"}]
    quantize(pipelines.build("sd_1"), RECIPE, folder, calls=calls)
    rows = rows_of(folder)
    mixes = [row for name, row in rows.items() if name.endswith(".mix")]
    assert len(mixes) > 2
    assert any(row.smooth for row in mixes)
    assert all(row.outlier_ratio is not None for row in mixes)
