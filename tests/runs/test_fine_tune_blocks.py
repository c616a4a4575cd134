"""Block-wise fine-tuning of recorded pipelines, and of weights that stay in their files."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.families.pipelines import build
from tests.runs.test_fine_tune_calls import FILE, Stop, recipe
from tests.train.called import FLUX, WAN, wan
from trtq.artefact.files import sha256
from trtq.artefact.opened import open_folder
from trtq.checkpoint import stored_models
from trtq.errors import UsageError
from trtq.runs.memory import stores_weights
from trtq.runs.quantize import quantize

BLOCKS = {"blockwise": {"points": 2}}


def interrupt_at(stage, iteration):
    def report(name, done, total):
        if name.startswith(stage) and done == iteration:
            raise Stop

    return report


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = recipe() | BLOCKS
    result = quantize(build("flux"), settings, whole, calls=[FLUX])
    places = [stage.name.rpartition(", ")[2] for stage in result.stages]
    assert places == ["transformer_blocks.0", "single_transformer_blocks.0", "norm_out"]
    assert open_folder(whole).manifest.recipe.blockwise["points"] == 2
    with pytest.raises(Stop):
        quantize(
            build("flux"), settings, cut, calls=[FLUX], progress=interrupt_at("block 2 of 3", 3)
        )
    result = quantize(build("flux"), settings, cut, calls=[FLUX], resume=True)
    assert [stage.iterations for stage in result.stages] == [0, 2, 4]
    assert sha256(cut / FILE) == sha256(whole / FILE)


@pytest.mark.slow
def test_the_blocks_of_two_denoisers_are_tuned_one_after_the_other(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = recipe("combined", {"first_stage": 0.5}, iterations=6, batch=1) | BLOCKS
    result = quantize(wan(), settings, whole, calls=[WAN])
    names = [stage.name for stage in result.stages]
    assert names[0].startswith("transformer block 1 of")
    assert names[-1].startswith("transformer_2 block")
    report = interrupt_at("transformer_2 block 2 of", 1)
    with pytest.raises(Stop):
        quantize(wan(), settings, cut, calls=[WAN], progress=report)
    quantize(wan(), settings, cut, calls=[WAN], resume=True)
    for name in (FILE, f"transformer_2/{FILE}"):
        assert sha256(cut / name) == sha256(whole / name)


@pytest.fixture
def half(tmp_path, monkeypatch):
    """The folder of a Flux pipeline in bfloat16, whose small weights count as large."""
    monkeypatch.setattr(stored_models, "_LARGE", 64)
    pipeline = build("flux")
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path / "flux")
    return tmp_path / "flux"


@pytest.mark.parametrize("method", ["efficientdm", pytest.param("best", marks=pytest.mark.slow)])
def test_blocks_with_weights_in_their_files_give_the_run_of_weights_in_memory(
    method, half, tmp_path
):
    settings = recipe(method) | BLOCKS
    for name, limit in (("whole", "100GB"), ("stored", "1MB")):
        quantize(half, settings, tmp_path / name, calls=[FLUX], memory=limit)
    for file in (FILE, "trained.safetensors"):
        whole, stored = (load_file(tmp_path / name / file) for name in ("whole", "stored"))
        assert whole.keys() == stored.keys()
        assert all(torch.equal(whole[name], stored[name]) for name in whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (recipe(), "choose --method search, add --blockwise, or allow more memory"),
        (
            recipe() | {"blockwise": {"whole_iterations": 2}},
            "blockwise.whole_iterations trains all of them in memory; leave it out",
        ),
        (
            recipe("quest") | BLOCKS,
            "the method 'quest' without adapters on float weights keeps copies",
        ),
    ],
)
def test_what_needs_all_weights_in_memory_is_refused(settings, message, half):
    from trtq.calib.recipe import load_recipe

    with pytest.raises(UsageError, match=message):
        stores_weights(half, load_recipe(overrides=settings), 1_000_000)
