"""One graph computes other batches, prompts and image sizes, and refuses what is out of its range."""

import pytest

import trtq
from tests.calls.whole_way import MAX_DIFFERENCE, MIN_PARITY_DB, RECIPE, called
from tests.calls.zoo import ZOO
from trtq.calls.user_call import UserCall
from trtq.checkpoint.components import denoisers_of
from trtq.errors import UsageError
from trtq.exporter.call_parity import call_parities

FAST = ("aura_flow",)
SLOW = ("flux2_klein", "sd_inpainting", "playground", "sana", "cogview4", "krea_2", "wan_21")
SIDES = {"sana": (32, 64, 96)}
"""Smallest, middle and largest side in pixels; Sana needs multiples of 32."""
OTHER_PROMPT = "a cat in a red boat"

# diffusers warns about its own classes.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def parameters():
    return [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def counts(name):
    """The argument for the number of images or videos."""
    return "num_videos_per_prompt" if name.startswith("wan") else "num_images_per_prompt"


@pytest.mark.parametrize("name", parameters())
def test_a_second_batch_prompt_and_size_work_in_one_graph(name, tmp_path):
    case = ZOO[name]
    case.pipeline().save_pretrained(tmp_path / "model")
    trtq.quantize(tmp_path / "model", RECIPE, tmp_path / "run", calls=[case.call()])
    smallest, middle, largest = SIDES.get(name, (32, 48, 64))
    sizes = f"{smallest}x{smallest}:{largest}x{largest}"
    trtq.export(tmp_path / "run", tmp_path / "onnx", size=sizes)
    run, loaded = trtq.load(tmp_path / "run"), trtq.load(tmp_path / "onnx")
    graphs = {part: getattr(loaded, part) for part in denoisers_of(run)}
    small = {"height": smallest, "width": smallest}
    for changes in (
        small,
        small | {counts(name): 2},
        small | {"prompt": OTHER_PROMPT},
        {"height": middle, "width": largest},
        {"height": largest, "width": largest, "prompt": OTHER_PROMPT, counts(name): 2},
    ):
        rows = call_parities(run, graphs, UserCall(case.call() | changes))
        assert all(row.holds(MIN_PARITY_DB) for row in rows), (changes, rows)
        difference = called(loaded, case, **changes) - called(run, case, **changes)
        assert float(difference.abs().mean()) < MAX_DIFFERENCE, changes
    message = r"axis \d of '.*' of \w+ has size \d+; .*--size SMALLEST:LARGEST"
    outside = [largest + smallest, *([] if name == "sana" else [smallest // 2])]
    for side in outside:
        with pytest.raises(UsageError, match=message) as caught:
            called(loaded, case, height=side, width=side)
        assert "\n" not in str(caught.value)
        assert " .. " in str(caught.value)


@pytest.mark.slow
def test_a_pipeline_that_chooses_its_size_by_other_arguments_has_no_range_of_sizes(tmp_path):
    case = ZOO["flux_kontext"]
    case.pipeline().save_pretrained(tmp_path / "model")
    trtq.quantize(tmp_path / "model", RECIPE, tmp_path / "run", calls=[case.call()])
    with pytest.raises(
        UsageError, match="the same shapes at both sizes; other arguments"
    ) as caught:
        trtq.export(tmp_path / "run", tmp_path / "onnx", size="32x32:64x64")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "onnx").exists()
