"""The shipped transformer: what it is, its outlier channels, its training script."""

import hashlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from trtq.checkpoint.shipped import shipped_model
from trtq.cli import app
from trtq.demo import train_digits_dit as script
from trtq.demo.identity_vae import build_identity_vae
from trtq.demo.outliers import channel_ratios, plant_outliers
from trtq.diffusion.loading import open_pipeline
from trtq.errors import UsageError
from trtq.evaluation.evaluate import evaluate
from trtq.evaluation.reference import draw_reference
from trtq.exporter.export import export
from trtq.pipelines.draw import conditioning_for, draw
from trtq.runs.quantize import quantize

FOLDER = shipped_model("digits-dit")
assert FOLDER is not None
WEIGHTS = FOLDER / "transformer" / "diffusion_pytorch_model.safetensors"
SHA256 = "f68222e57d9cd5d401652ba0084837999e1bce36316618a34e8fa4160452bec5"
PLANTED = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj")
BLOCKS = 4


@pytest.fixture(scope="module")
def source():
    return open_pipeline("digits-dit")


@pytest.fixture(scope="module")
def ratios(source):
    """Largest over median channel of every linear layer's input while five digits are drawn."""
    return channel_ratios(
        source.denoiser, lambda: draw(source, conditioning_for(source, 5), steps=4, seed=0)
    )


@pytest.fixture
def small(monkeypatch):
    """The training script makes a transformer of one block with 16 channels."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    monkeypatch.setattr(script, "TRANSFORMER", script.TRANSFORMER | sizes)


def arguments(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    side = model.config.sample_size
    x = torch.randn((4, model.config.in_channels, side, side), generator=generator)
    return x, torch.tensor([1, 100, 500, 999]), torch.tensor([0, 3, 9, 10])


def test_diffusers_loads_the_model_as_a_dit():
    from diffusers import DiTPipeline

    pipeline = DiTPipeline.from_pretrained(FOLDER)
    assert type(pipeline.transformer).__name__ == "DiTTransformer2DModel"
    assert len(pipeline.transformer.transformer_blocks) == BLOCKS


def test_the_model_is_small():
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) <= 5e6


def test_the_weights_are_those_of_the_results():
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == SHA256


def test_the_classifier_is_that_of_the_digits_so_that_scores_are_comparable():
    name = "classifier/model.safetensors"
    assert (FOLDER / name).read_bytes() == (shipped_model("digits") / name).read_bytes()


def test_the_autoencoder_returns_its_input(source):
    x = torch.rand((3, 1, 8, 8), generator=torch.Generator().manual_seed(0)) * 2 - 1
    for vae in (source.pipeline.vae, build_identity_vae()):
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.sample()
            torch.testing.assert_close(latents, x, rtol=0, atol=1e-3)
            torch.testing.assert_close(vae.decode(x).sample, x, rtol=0, atol=1e-3)


def test_the_planted_inputs_have_outlier_channels(ratios):
    for block in range(BLOCKS):
        for name in PLANTED:
            assert ratios[f"transformer_blocks.{block}.{name}"] >= 20


def test_a_gated_feed_forward_brings_outlier_channels_by_training(ratios):
    trained = json.loads((FOLDER / "training.json").read_text())["outliers_trained"]
    gated = [f"transformer_blocks.{block}.ff.net.2" for block in range(BLOCKS)]
    assert max(ratios[name] for name in gated) >= 10
    assert max(trained[name] for name in gated) >= 10


def test_planted_outliers_leave_the_function_unchanged(small):
    model = script.build_transformer(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        given = arguments(model)
        before = model(*given).sample
        clean = channel_ratios(model, lambda: model(*given))
        plant_outliers(model, 2, 64.0, seed=3)
        torch.testing.assert_close(model(*given).sample, before, rtol=1e-4, atol=1e-5)
    planted = channel_ratios(model, lambda: model(*given))
    for name in PLANTED:
        name = f"transformer_blocks.0.{name}"
        assert clean[name] < 10 < planted[name]


def test_a_ratio_is_the_largest_over_the_median_channel_of_all_calls():
    layer = nn.Sequential(nn.Linear(3, 1))
    inputs = torch.tensor([[[1.0, -2.0, 0.5], [0.0, 1.0, -8.0]]]), torch.tensor([[[-4.0, 0, 0]]])
    assert channel_ratios(layer, lambda: [layer(x) for x in inputs]) == {"0": 2.0}


def test_an_interrupted_training_gives_the_same_model(small, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "TAUGHT_FROM", 2)
    images, labels = script.load_digits()
    fixed = {"batch": 2, "rate": script.learning_rate(1e-3, 5)}
    fixed["teacher"] = open_pipeline("digits").denoiser

    def trained(parts, checkpoint):
        for until in parts:
            training = script.Training(script.build_transformer(0), 0)
            if checkpoint.is_file():
                training.load(checkpoint)
            script.train(training, images, labels, until=until, **fixed)
            training.save(checkpoint)
        return training.average.state_dict()

    whole = trained([5], tmp_path / "whole.pt")
    resumed = trained([3, 5], tmp_path / "resumed.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_transformer_learns_noise_then_the_prediction_of_the_digits_model(small, monkeypatch):
    asked = []

    def teacher(x, timesteps, class_labels):
        asked.append(len(class_labels))
        return SimpleNamespace(sample=torch.zeros_like(x))

    monkeypatch.setattr(script, "TAUGHT_FROM", 3)
    training = script.Training(script.build_transformer(0), 0)
    images, labels = script.load_digits()
    settings = {"until": 5, "batch": 2, "rate": script.learning_rate(1e-3, 5), "teacher": teacher}
    script.train(training, images, labels, **settings)
    assert asked == [2, 2]


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rate = script.learning_rate(2.0, 1000)
    assert rate(0) == 2.0 / script.WARM_UP
    assert rate(script.WARM_UP) == rate(script.decay_start(1000)) == 2.0
    assert rate(900) == 1.0


def test_the_script_writes_a_model_that_opens(small, tmp_path, monkeypatch):
    words = ["train", "-o", str(tmp_path / "model"), "--iterations", "2", "--batch", "2"]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    source = open_pipeline(tmp_path / "model")
    assert draw(source, conditioning_for(source, 2), steps=2, seed=0).shape == (2, 1, 8, 8)
    assert (tmp_path / "model" / "classifier").is_dir()


def test_guidance_is_refused_because_the_pipeline_passes_a_label_of_another_model(source):
    message = r"labels 0 \.\. 10, but with guidance 2 its DiTPipeline passes label 1000"
    with pytest.raises(UsageError, match=message):
        draw(source, conditioning_for(source, 1), steps=1, seed=0, guidance=2.0)


def test_the_model_is_used_by_name(tmp_path):
    picture = tmp_path / "digits.png"
    command = ["generate", "digits-dit", "-o", str(picture), "--images", "2", "--steps", "2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert picture.is_file()


@pytest.mark.slow
def test_the_model_goes_the_whole_way(tmp_path):
    recipe = {"method": "minmax", "bits": "w8a8", "steps": 2, "calibration": {"images": 8}}
    quantize("digits-dit", recipe, tmp_path / "run")
    exported = export(tmp_path / "run", tmp_path / "onnx")
    assert exported.to_json()["parity_db_min"] >= 40
    result = evaluate(tmp_path / "onnx", "digits-dit", images=10)
    assert result.to_json()["class_accuracy"] is not None


@pytest.mark.slow
def test_outliers_ruin_4_bits_unless_the_input_is_smoothed_and_rotated(tmp_path):
    reference = draw_reference("digits-dit", images=200, steps=20, seed=1)
    assert reference.scores.fd <= 7
    assert reference.scores.accuracy >= 0.95
    recipe = {"method": "search", "bits": "w4a4"}
    quantize("digits-dit", recipe | {"smooth": False}, tmp_path / "plain")
    assert evaluate(tmp_path / "plain", reference).to_json()["fd_ratio"] >= 10
    quantize("digits-dit", recipe | {"rotate": 64, "scales": "row"}, tmp_path / "treated")
    assert evaluate(tmp_path / "treated", reference).to_json()["fd_ratio"] <= 1.3
