"""Fine-tuning of recorded pipelines from the checkpoint to the run, interrupted and resumed."""

import threading

import pytest
import torch

from tests.families.pipelines import build
from tests.train.called import FLUX, WAN, wan
from trtq.artefact.files import sha256
from trtq.artefact.opened import open_folder
from trtq.calls.user_call import UserCall
from trtq.errors import ArtefactError
from trtq.pipelines.open import load
from trtq.runs.fine_tune_calls import _shares
from trtq.runs.quantize import quantize

FILE = "quantized.safetensors"


def recipe(method="efficientdm", quest=None, **training):
    settings = {"iterations": 4, "batch": 2, "checkpoint_every": 2}
    if method != "quest":
        settings["rank"] = 2
    made = {
        "method": method,
        "steps": 3,
        "calibration": {"images": 2, "samples_per_step": 64},
        "training": settings | training,
    }
    return made | ({} if quest is None else {"quest": quest})


class Stop(Exception):
    pass


def interrupt_at(stage, iteration):
    def report(name, done, total):
        if (name, done) == (stage, iteration):
            raise Stop

    return report


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = quantize(build("flux"), recipe(), whole, calls=[FLUX])
    assert result.fine_tune_iterations == 4
    assert [stage.name for stage in result.stages] == ["fine-tune"]
    assert open_folder(whole).manifest.metrics.fine_tune_iterations == 4
    with pytest.raises(Stop):
        quantize(build("flux"), recipe(), cut, calls=[FLUX], progress=interrupt_at("fine-tune", 3))
    assert not cut.exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("trtq")]
    with pytest.raises(ArtefactError, match="another model or recipe"):
        quantize(build("flux"), recipe(), cut, calls=[FLUX | {"prompt": "a"}], resume=True)
    result = quantize(build("flux"), recipe(), cut, calls=[FLUX], resume=True)
    assert result.fine_tune_iterations == 2
    assert sha256(cut / FILE) == sha256(whole / FILE)
    assert not (tmp_path / ".cut.trtq-partial").exists()


def test_two_denoisers_are_tuned_one_after_the_other_and_resumed(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = recipe("combined", {"first_stage": 0.5}, iterations=6, batch=1)
    result = quantize(wan(), settings, whole, calls=[WAN])
    assert [(stage.name, stage.iterations) for stage in result.stages] == [
        ("transformer time embedding", 1),
        ("transformer attention", 1),
        ("transformer_2 time embedding", 2),
        ("transformer_2 attention", 2),
    ]
    assert 0 < result.tuned_share < 1
    report = interrupt_at("transformer_2 attention", 1)
    with pytest.raises(Stop):
        quantize(wan(), settings, cut, calls=[WAN], progress=report)
    result = quantize(wan(), settings, cut, calls=[WAN], resume=True)
    assert result.fine_tune_iterations == 2
    for name in (FILE, f"transformer_2/{FILE}"):
        assert sha256(cut / name) == sha256(whole / name)
    frames = load(cut)(**WAN, num_inference_steps=2, output_type="pt").frames
    assert bool(torch.isfinite(frames).all())


def test_quest_learns_rounding_and_tunes_sets_of_layers(tmp_path):
    settings = recipe("quest", {"adaround": 2}, batch=1)
    result = quantize(build("flux"), settings, tmp_path / "run", calls=[FLUX])
    names = [stage.name for stage in result.stages]
    assert names == ["learn rounding", "time embedding", "attention"]
    assert 0 < result.tuned_share < 1


def test_the_iterations_are_divided_by_the_number_of_calls():
    assert _shares(700, [20], 1) == [700]
    assert _shares(700, [2, 5], 1) == [200, 500]
    assert sum(_shares(100, [1, 1, 1], 1)) == 100
    assert _shares(10, [1, 99], 2) == [2, 10]


@pytest.mark.parametrize(
    ("arguments", "images"),
    [
        ({}, 1),
        ({"prompt": "a"}, 1),
        ({"prompt": ["a", "b"], "num_images_per_prompt": 3}, 6),
        ({"class_labels": [1, 2]}, 2),
        ({"class_labels": 1}, 1),
        ({"batch_size": 4, "num_images_per_prompt": None}, 4),
    ],
)
def test_the_number_of_images_of_a_call(arguments, images):
    assert UserCall(arguments).images == images
