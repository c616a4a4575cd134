"""A prompt that a tokenizer cuts is said, with what is lost, wherever prompts come in."""

import json
import logging

import pytest

from tests.families.pipelines import build
from trtq.calib.recipe import load_recipe
from trtq.diffusion import cut
from trtq.diffusion.cut import find_cuts, warn_of_cuts
from trtq.diffusion.loading import open_pipeline
from trtq.pipelines.draw import conditioning_for, draw
from trtq.runs.plan import plan_quantize
from trtq.serve.models.base import GenerationRequest
from trtq.serve.models.pipeline import PipelineModel

LONG = "a red circle beside a blue square, " * 40


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(cut, "_said", set())


def test_it_tells_how_many_tokens_there_are_how_many_are_kept_and_what_is_lost():
    pipe = build("sd_1")
    (found,) = find_cuts(pipe, [LONG, "a red circle", LONG])
    ids = pipe.tokenizer(LONG).input_ids
    kept = pipe.tokenizer.model_max_length
    assert (found.encoder, found.tokens, found.kept) == ("text_encoder", len(ids), kept)
    assert found.lost == pipe.tokenizer.decode(ids[kept - 1 : -1])
    line = str(found)
    assert f"{len(ids)} tokens, {kept} are kept; cut off: " in line
    assert "\n" not in line
    assert len(line) < 300


@pytest.mark.parametrize("name", ["sd_1", "sd_xl", "ldm_kl"])
def test_a_prompt_that_fits_is_not_cut(name):
    pipe = build(name)
    limit = 77 if name == "ldm_kl" else pipe.tokenizer.model_max_length
    count = limit - len(pipe.tokenizer("").input_ids)
    assert find_cuts(pipe, ["a " * count]) == []
    (found,) = find_cuts(pipe, ["a " * (count + 1)])
    assert (found.tokens, found.kept) == (limit + 1, limit)


@pytest.mark.parametrize(
    ("name", "kept"), [("flux", 512), ("sd_3", 256), ("pixart", 120), ("ldm_kl", 77)]
)
def test_what_is_kept_is_what_the_pipelines_own_call_keeps(name, kept):
    (found,) = find_cuts(build(name), ["a " * 600])
    assert found.kept == kept


def test_an_encoder_that_reads_all_of_it_is_named():
    (found,) = find_cuts(build("flux"), ["a " * 100])
    assert found.encoder == "text_encoder"
    assert "text_encoder_2 reads all of it" in str(found)


def test_a_pipeline_without_text_has_nothing_to_cut(tiny):
    assert find_cuts(tiny.pipeline, [LONG]) == []


def test_drawing_says_it_once(caplog):
    source = open_pipeline(build("sd_1"))
    for _ in range(2):
        draw(source, conditioning_for(source, 2, prompt=LONG), steps=1, seed=0)
    said = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert "too long for text_encoder" in said[0].getMessage()


def test_a_negative_prompt_is_said_too(caplog):
    source = open_pipeline(build("sd_1"))
    conditioning = conditioning_for(source, 1, prompt="a red circle")
    draw(source, conditioning, steps=1, seed=0, guidance=3.0, negative_prompt=LONG)
    assert "1 of 2 prompts are cut" in caplog.text


def test_of_many_prompts_one_line_says_how_many_are_cut(caplog):
    warn_of_cuts(build("sd_1"), ["a", LONG, f"{LONG} again"], "calibration prompts")
    (record,) = caplog.records
    assert record.getMessage().startswith("2 of 3 calibration prompts are cut; of 'a red circle")


def test_prompts_to_calibrate_with_are_looked_at(tmp_path, caplog):
    lines = tmp_path / "prompts.txt"
    lines.write_text(f"a red circle\n{LONG}\n")
    recipe = load_recipe(overrides={"method": "minmax", "steps": 2, "prompts": str(lines)})
    plan_quantize(build("sd_1"), recipe)
    assert "1 of 2 calibration prompts are cut" in caplog.text


def test_the_server_logs_the_numbers_but_not_the_prompt(caplog):
    model = PipelineModel(open_pipeline(build("sd_1")), "sd", "torch")
    model.starts(GenerationRequest(LONG, count=1, seed=0, steps=1, guidance=1.0))
    (record,) = [one for one in caplog.records if one.getMessage() == "prompt cut off"]
    assert record.fields["field"] == "prompt"
    assert record.fields["tokens"] > record.fields["kept"]
    assert "circle" not in json.dumps(record.fields)
