"""Truncated prompts are reported with the lost text, wherever prompts are given."""

import json
import logging

import pytest

from tests.families.pipelines import build
from trtq.calib.recipe import load_recipe
from trtq.diffusion import truncation
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.truncation import find_truncations, warn_of_truncation
from trtq.pipelines.draw import conditioning_for, draw
from trtq.runs.plan import plan_quantize
from trtq.serve.models.base import GenerationRequest
from trtq.serve.models.pipeline import PipelineModel

LONG = "a red circle next to a blue square, " * 40


@pytest.fixture(autouse=True)
def no_earlier_warnings(monkeypatch):
    monkeypatch.setattr(truncation, "_warned", set())


def test_the_message_names_the_tokens_the_kept_tokens_and_the_lost_text():
    pipe = build("sd_1")
    (row,) = find_truncations(pipe, [LONG, "a red circle", LONG])
    ids = pipe.tokenizer(LONG).input_ids
    kept = pipe.tokenizer.model_max_length
    assert (row.encoder, row.tokens, row.kept) == ("text_encoder", len(ids), kept)
    assert row.lost == pipe.tokenizer.decode(ids[kept - 1 : -1])
    line = str(row)
    assert f"{len(ids)} tokens, {kept} are kept; cut off: " in line
    assert "\n" not in line
    assert len(line) < 300


@pytest.mark.parametrize("name", ["sd_1", "sd_xl", "ldm_kl"])
def test_a_prompt_that_fits_is_not_truncated(name):
    pipe = build(name)
    limit = 77 if name == "ldm_kl" else pipe.tokenizer.model_max_length
    count = limit - len(pipe.tokenizer("").input_ids)
    assert find_truncations(pipe, ["a " * count]) == []
    (row,) = find_truncations(pipe, ["a " * (count + 1)])
    assert (row.tokens, row.kept) == (limit + 1, limit)


@pytest.mark.parametrize(
    ("name", "kept"), [("flux", 512), ("sd_3", 256), ("pixart", 120), ("ldm_kl", 77)]
)
def test_the_limit_equals_that_of_the_pipelines_call(name, kept):
    (row,) = find_truncations(build(name), ["a " * 600])
    assert row.kept == kept


def test_an_encoder_that_reads_the_whole_prompt_is_named():
    (row,) = find_truncations(build("flux"), ["a " * 100])
    assert row.encoder == "text_encoder"
    assert "text_encoder_2 reads all of it" in str(row)


def test_a_pipeline_without_text_truncates_nothing(tiny):
    assert find_truncations(tiny.pipeline, [LONG]) == []


def test_drawing_warns_once(caplog):
    loaded = open_pipeline(build("sd_1"))
    for _ in range(2):
        draw(loaded, conditioning_for(loaded, 2, prompt=LONG), steps=1, seed=0)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "too long for text_encoder" in warnings[0].getMessage()


def test_a_truncated_negative_prompt_is_also_reported(caplog):
    loaded = open_pipeline(build("sd_1"))
    conditioning = conditioning_for(loaded, 1, prompt="a red circle")
    draw(loaded, conditioning, steps=1, seed=0, guidance=3.0, negative_prompt=LONG)
    assert "1 of 2 prompts are truncated" in caplog.text


def test_truncated_prompts_are_counted_in_one_line(caplog):
    warn_of_truncation(build("sd_1"), ["a", LONG, f"{LONG} again"], "calibration prompts")
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "2 of 3 calibration prompts are truncated, e.g. 'a red circle"
    )


def test_calibration_prompts_are_checked(tmp_path, caplog):
    lines = tmp_path / "prompts.txt"
    lines.write_text(f"a red circle\n{LONG}\n")
    recipe = load_recipe(overrides={"method": "minmax", "steps": 2, "prompts": str(lines)})
    plan_quantize(build("sd_1"), recipe)
    assert "1 of 2 calibration prompts are truncated" in caplog.text


def test_the_server_logs_the_numbers_but_not_the_prompt(caplog):
    model = PipelineModel(open_pipeline(build("sd_1")), "sd", "torch")
    model.starts(GenerationRequest(LONG, count=1, seed=0, steps=1, guidance=1.0))
    (record,) = [record for record in caplog.records if record.getMessage() == "prompt cut off"]
    assert record.fields["field"] == "prompt"
    assert record.fields["tokens"] > record.fields["kept"]
    assert "circle" not in json.dumps(record.fields)
