"""A text-to-image pipeline: prompts, guidance, cross-attention, from quantising to images."""

import json

import pytest
import torch

import trtq
from trtq.demo.shapes_model import build_text_encoder, build_tokenizer
from trtq.diffusion.loading import open_pipeline
from trtq.errors import ArtefactError, UsageError
from trtq.evaluation.classifier import ImageClassifier, save_classifier
from trtq.evaluation.evaluate import evaluate
from trtq.evaluation.gates import parse_gate
from trtq.exporter.export import export
from trtq.pipelines.generate import generate
from trtq.runs.quantize import quantize

PROMPTS = {
    "guidance": 2.0,
    "calibration": ["a red circle", "a blue square"],
    "evaluation": [
        {"prompt": "a red circle", "labels": {"shape": 0}},
        {"prompt": "a blue square", "labels": {"shape": 1}},
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A real StableDiffusionPipeline, untrained and tiny."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    folder = tmp_path_factory.mktemp("text") / "model"
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=8
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    classifier = ImageClassifier(channels=3, size=8, heads={"shape": 2})
    statistics = {"mean": torch.zeros(48).double(), "covariance": torch.eye(48).double()}
    save_classifier(classifier, folder / "classifier", statistics)
    return folder


@pytest.fixture(scope="module")
def run(model):
    recipe = {
        "method": "search",
        "bits": "w4a8",
        "steps": 3,
        "split_skips": True,
        "attention": {"quantize": True},
        "calibration": {"images": 4, "samples_per_step": 128},
    }
    out = model.parent / "run"
    quantize(model, recipe, out)
    return out


@pytest.fixture(scope="module")
def onnx(run):
    out = run.parent / "onnx"
    result = export(run, out)
    assert result["parity_db_min"] >= 40
    return out


def test_self_and_cross_attention_are_quantised(run):
    from trtq.artefact.opened import open_folder

    manifest = open_folder(run, "run").manifest
    products = {row.name for row in manifest.layers if row.kind == "product"}
    for which in ("attn1", "attn2"):
        assert any(f"{which}.processor.scores" in name for name in products)
        assert any(f"{which}.processor.mix" in name for name in products)
    assert all(row.activation_bits for row in manifest.layers)
    assert manifest.structure.splits
    assert manifest.recipe.guidance == 2.0


def test_torch_and_onnxruntime_draw_the_same_from_a_prompt(run, onnx):
    images = []
    for path in (run, onnx):
        pipeline = trtq.load(path)
        generator = torch.Generator().manual_seed(0)
        drawn = pipeline(
            "a red circle", num_inference_steps=3, generator=generator, output_type="pt"
        )
        images.append(drawn.images)
    assert images[0].shape == (1, 3, 8, 8)
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=0.03)


def test_openvino_draws_the_same_as_onnxruntime(onnx):
    images = []
    for provider in ("cpu", "openvino"):
        pipeline = trtq.load(onnx, provider=provider)
        generator = torch.Generator().manual_seed(0)
        images.append(
            pipeline(
                "a red circle", num_inference_steps=3, generator=generator, output_type="pt"
            ).images
        )
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=0.03)


def test_generate_accepts_a_prompt_and_no_class(onnx, tmp_path):
    out = tmp_path / "x.png"
    result = generate(onnx, out, prompt="a red circle", images=2)
    assert result["prompts"] == ["a red circle"] * 2
    assert out.is_file()
    with pytest.raises(UsageError, match="use --prompt"):
        generate(onnx, tmp_path / "y.png", class_label=1)


def test_generate_accepts_a_negative_prompt_only_if_it_has_an_effect(model, tmp_path):
    out = tmp_path / "x.png"
    wish = {"prompt": "a red circle", "steps": 2, "guidance": 3.0}
    pictures = []
    for negative in (None, "", "a blue square"):
        generate(model, out, negative_prompt=negative, overwrite=True, **wish)
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    out.unlink()
    with pytest.raises(UsageError, match="changes nothing at guidance 1: choose a guidance above"):
        generate(model, out, negative_prompt="a blue square", **wish | {"guidance": 1.0})
    with pytest.raises(UsageError, match="digits accepts no negative prompt"):
        generate("digits", out, negative_prompt="a blue square", steps=2)
    assert not out.exists()


def test_eval_counts_the_objects_in_the_prompts(onnx, model):
    result = evaluate(onnx, model, images=6, gates=(parse_gate("faithfulness>=0"),)).result
    assert 0 <= result["faithfulness"] <= 1
    assert result["faithfulness_reference"] is not None
    assert result["guidance"] == 2.0
    assert result["passed"]
    with pytest.raises(
        UsageError, match=r"class_accuracy>0 cannot be checked: .* does not give it for this model"
    ):
        evaluate(onnx, model, images=4, gates=(parse_gate("class_accuracy>0"),))


def test_guidance_puts_the_unconditional_item_first(model):
    source = open_pipeline(model)
    conditions = source.draw_conditions(3, torch.Generator().manual_seed(0))
    empty = source.encode([""]).conditional["encoder_hidden_states"]
    unconditional = conditions.unconditional["encoder_hidden_states"]
    torch.testing.assert_close(unconditional, empty.expand_as(unconditional))
    assert not torch.equal(conditions.conditional["encoder_hidden_states"], unconditional)


def test_prompts_given_by_the_user_are_used(model, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("a black cross\n\n")
    recipe = {
        "method": "minmax",
        "steps": 2,
        "prompts": str(lines),
        "calibration": {"images": 2, "samples_per_step": 64},
    }
    quantize(model, recipe, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "prompts.json").read_text())
    assert kept["calibration"] == ["a black cross"]
    lines.write_text("\n")
    with pytest.raises(UsageError, match="holds no prompts"):
        quantize(model, recipe, tmp_path / "other")
    with pytest.raises(UsageError, match="accepts no prompts"):
        quantize("digits", recipe, tmp_path / "other")


def test_a_component_of_another_pipeline_is_refused(run, tmp_path):
    import shutil

    from trtq.artefact.manifest import Manifest
    from trtq.artefact.manifest_file import write_manifest

    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["os", "system"]
    (folder / "model_index.json").write_text(json.dumps(index))
    write_manifest(folder, Manifest.model_validate_json((folder / "manifest.json").read_text()))
    with pytest.raises(ArtefactError, match="only diffusers and transformers"):
        trtq.load(folder)
