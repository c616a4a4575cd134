"""QuEST: stages, learned rounding, and table entries as separate parameters."""

import pytest
import torch
from torch import nn

from tests.conftest import tiny_pipeline
from trtq.artefact.files import sha256
from trtq.artefact.opened import open_folder
from trtq.calib.recipe import load_recipe
from trtq.errors import RecipeError
from trtq.pipelines.open import load
from trtq.runs.quantize import quantize
from trtq.train import quest, rounding
from trtq.train.table_adam import TableAdamW


def recipe(method="quest", **quest):
    return {
        "method": method,
        "steps": 4,
        "calibration": {"images": 8, "samples_per_step": 256},
        "training": {"iterations": 6, "batch": 4, "checkpoint_every": 2},
        "quest": {"adaround": 0} | quest,
    }


class Stop(Exception):
    pass


@pytest.mark.parametrize("method", ["quest", "combined"])
def test_the_run_can_be_loaded(method, tmp_path):
    result = quantize(tiny_pipeline(), recipe(method, first_stage=0.5), tmp_path / "run")
    assert [(row["name"], row["iterations"]) for row in result["stages"]] == [
        ("time embedding", 3),
        ("attention", 3),
    ]
    assert 0 < result["tuned_share"] < 0.35
    manifest = open_folder(tmp_path / "run").manifest
    products = [row for row in manifest.layers if row.kind == "product"]
    assert bool(products) == (method == "quest")
    assert {(row.activation_bits, row.right_bits) for row in products} <= {(4, 4), (8, 4)}
    images = load(tmp_path / "run")([1, 2], num_inference_steps=2, output_type="pt").images
    assert bool(torch.isfinite(images).all())


def test_quest_starts_with_learned_rounding_as_in_the_paper():
    assert load_recipe(overrides={"method": "quest"}).quest.adaround == 200
    assert load_recipe(overrides={"method": "combined"}).quest.adaround == 0


def test_best_compares_the_outputs_of_all_layers_with_adapters(tmp_path, monkeypatch):
    compared = []
    loss = quest.alignment_loss
    monkeypatch.setattr(
        quest, "alignment_loss", lambda *given: compared.append(set(given[1])) or loss(*given)
    )
    settings = recipe("best") | {"steps": 4}
    quantize(tiny_pipeline(), settings, tmp_path / "run")
    rows = open_folder(tmp_path / "run").manifest.layers
    assert compared[-1] == {row.name for row in rows if row.weight_bits and row.adapters}
    assert compared[0] < compared[-1]


def test_the_comparison_of_all_layers_needs_adapters():
    with pytest.raises(RecipeError, match=r"quest.aligned='adapters' needs adapters"):
        load_recipe(overrides={"method": "best", "training": {"rank": 0}})


@pytest.mark.parametrize("weighting", ["released", "global"])
def test_variants_of_the_weighting(weighting, tmp_path):
    result = quantize(tiny_pipeline(), recipe(weighting=weighting), tmp_path / "run")
    assert result["fine_tune_iterations"] == 6


def test_learned_rounding_comes_first(tmp_path):
    result = quantize(tiny_pipeline(), recipe(adaround=20), tmp_path / "run")
    assert result["stages"][0]["name"] == "learn rounding"
    assert 0 < result["stages"][0]["rounded_up_share_changed"] < 0.5


def test_learned_rounding_uses_every_micro_batch(tmp_path, monkeypatch):
    def report(stage, done, total):
        if (stage, done) == ("learn rounding", 2):
            raise Stop

    seen = []
    rows = rounding._rows
    monkeypatch.setattr(rounding, "_rows", lambda *given: seen.append(given[3]) or rows(*given))
    settings = recipe(adaround=2)
    settings["training"] = settings["training"] | {"batch": 4, "at_once": 1}
    # All layers are treated alike; the points of two layers are enough.
    with pytest.raises(Stop):
        quantize(tiny_pipeline(), settings, tmp_path / "run", progress=report)
    assert len(seen) == 2 * 4
    assert {len(batch.x) for batch in seen} == {1}
    assert len({float(batch.timestep) for batch in seen[:4]}) == 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    quantize(tiny_pipeline(), recipe(first_stage=0.5), out)
    return out


@pytest.mark.parametrize("where", [("time embedding", 2), ("attention", 1), ("attention", 3)])
def test_an_interrupted_run_resumes_to_the_same_bits(where, whole, tmp_path):
    def report(stage, done, total):
        if (stage, done) == where:
            raise Stop

    cut, settings = tmp_path / "cut", recipe(first_stage=0.5)
    with pytest.raises(Stop):
        quantize(tiny_pipeline(), settings, cut, progress=report)
    quantize(tiny_pipeline(), settings, cut, resume=where != ("time embedding", 2), overwrite=True)
    file = "quantized.safetensors"
    assert sha256(whole / file) == sha256(cut / file)


def test_with_dense_gradients_table_adam_equals_adamw():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizers = [
        TableAdamW([{"params": [ours], "lr": 0.1, "table": True}], weight_decay=0.01),
        torch.optim.AdamW([{"params": [theirs], "lr": 0.1}], weight_decay=0.01),
    ]
    for _ in range(7):
        gradient = torch.randn(5)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_unvisited_entries_do_not_change_and_reset_forgets_moments():
    moved = {}
    for state in ("persistent", "reset"):
        table = nn.Parameter(torch.ones(2))
        optimizer = TableAdamW([{"params": [table], "lr": 0.1, "table": True}], 0.0, state)
        for gradient in ([3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]):
            before = table.detach().clone()
            table.grad = torch.tensor(gradient)
            optimizer.step()
            still = [index for index, g in enumerate(gradient) if g == 0]
            assert torch.equal(table.detach()[still], before[still])
        moved[state] = float((table - before)[0].detach())
    # After a reset the direction depends only on the last gradient.
    assert moved["reset"] == pytest.approx(0.1, rel=1e-4)
    assert moved["persistent"] < 0
