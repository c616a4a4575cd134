"""The choice of tiles and splits: what the model orders, and that it agrees with the recorded SASS."""

import json

import pytest

from tests.vocabulary import ROOT
from trtq.plugins.spec import MAX_SPLIT_BYTES, Geometry, Problem
from trtq.plugins.tile_choice import choose_plan, loop_instructions, resident_blocks
from trtq.plugins.variants import ARCHITECTURES, TILES, all_variants

SAME = Geometry((3, 3), padding=(1, 1))
PROCESSORS = {"sm75": 40, "sm80": 108, "sm86": 82, "sm89": 128, "sm90": 132, "sm120": 170}
SMALL, LARGE = TILES


def tokens(rows, channels, out):
    return Problem(1, rows, 1, channels, out, 20, channels_last=True)


def image(side, channels, batch=2):
    return Problem(batch, side, side, channels, channels, 20, SAME)


def plan(problem, architecture, *, packed=True, scratch=MAX_SPLIT_BYTES):
    scratch = min(scratch, problem.split_bytes)
    return choose_plan(
        problem, PROCESSORS[architecture], architecture, packed=packed, scratch_bytes=scratch
    )


@pytest.mark.parametrize("architecture", ["sm80", "sm86", "sm89", "sm90", "sm120"])
def test_large_layers_get_large_tiles_and_no_splits(architecture):
    chosen = plan(tokens(8192, 1280, 5120), architecture)
    assert (chosen.tile, chosen.splits) == (LARGE, 1)


@pytest.mark.parametrize("architecture", ["sm80", "sm86", "sm89", "sm90", "sm120"])
def test_layers_of_few_blocks_are_divided(architecture):
    problem = image(8, 1280)
    chosen = plan(problem, architecture)
    assert chosen.splits >= 3
    assert problem.plan_bytes(chosen.tile, chosen.splits) <= problem.split_bytes <= MAX_SPLIT_BYTES
    assert problem.blocks(chosen.tile) * chosen.splits >= PROCESSORS[architecture] / 2
    assert plan(problem, architecture, scratch=0).splits == 1


def test_a_layer_of_few_channels_is_not_divided():
    assert plan(tokens(64, 64, 64), "sm89").splits == 1


def test_memory_for_sums_is_bounded():
    for problem in (image(8, 1280), tokens(77, 2048, 10240), tokens(1, 32, 10), image(16, 2560)):
        assert 0 < problem.split_bytes <= MAX_SPLIT_BYTES
    assert image(64, 640).split_bytes == 0


@pytest.fixture(scope="module")
def rows():
    record = json.loads((ROOT / "benchmarks/results/kernels_sass.json").read_text())
    return {(row["architecture"], row["variant"]): row for row in record["rows"]}


def products(architecture):
    """The variants of the product kernel of two launches."""
    return [v for v in all_variants(architecture) if v.tile is not None and not v.fused]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_knows_the_resident_blocks(architecture, rows):
    for variant in products(architecture):
        predicted = resident_blocks(variant.tile, architecture, packed=variant.packed)
        recorded = rows[architecture, str(variant)]["blocks"]
        assert predicted == recorded or (predicted < recorded and variant.tile == SMALL), variant


def test_the_model_knows_the_instructions_of_the_main_loop(rows):
    for variant in products("sm89"):
        recorded = rows["sm89", str(variant)]["loop"]
        predicted = loop_instructions(variant.tile, packed=variant.packed)
        assert abs(predicted / recorded - 1) < 0.3, (str(variant), predicted, recorded)
