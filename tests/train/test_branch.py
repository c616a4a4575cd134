"""The float branch next to a quantised weight that decays to nothing during fine-tuning."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.conftest import tiny_pipeline
from trtq.artefact.files import sha256
from trtq.calib.recipe import Training, load_recipe
from trtq.errors import RecipeError
from trtq.quant import QuantConv2d, QuantLinear, TimestepTable
from trtq.quant.branch import DecayingBranch, branch_weights, cycles_of, start_adapters
from trtq.runs import fine_tune
from trtq.runs.quantize import quantize
from trtq.runs.rates import branch_of

FILE = "quantized.safetensors"


def recipe(method="combined", **training):
    return {
        "method": method,
        "steps": 4,
        "calibration": {"images": 8, "samples_per_step": 256},
        "training": {"iterations": 8, "batch": 4, "rank": 4, "checkpoint_every": 2}
        | {"branch_rank": 4}
        | training,
    }


class Stop(Exception):
    pass


def test_the_branch_holds_what_the_codes_do_not():
    torch.manual_seed(0)
    error = torch.randn(12, 20)
    distances = [
        float((DecayingBranch(error, rank)() - error).norm().detach()) for rank in (1, 4, 12)
    ]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-4
    kernel = torch.randn(6, 3, 3, 3)
    torch.testing.assert_close(DecayingBranch(kernel, 32)().detach(), kernel)


@pytest.mark.parametrize("rank", [1, 2, 5, 32])
def test_the_weights_fall_to_zero_from_the_weakest_direction_on(rank):
    rows = torch.stack([branch_weights(rank, iteration, 60) for iteration in range(70)])
    assert bool((rows[0] == 1).all())
    assert bool((rows[60:] == 0).all())
    assert bool((rows.diff(dim=0) <= 1e-6).all())
    assert bool((rows.diff(dim=1) <= 1e-6).all())
    assert cycles_of(32) == 6


def test_sorting_at_the_start_of_a_cycle_keeps_the_stronger_half():
    torch.manual_seed(0)
    branch = DecayingBranch(torch.randn(8, 8), 4)
    with torch.no_grad():
        branch.left.mul_(torch.tensor([0.5, 1.0, 1.0, 1.0]))
    kept = (branch.left[:, :2] @ branch.right[:2]).detach()
    for iteration in range(5):
        # Three cycles of four updates each.
        branch.decay(iteration, 12)
    torch.testing.assert_close(branch().detach(), kept)
    norms = (branch.left.norm(dim=0) * branch.right.norm(dim=1)).detach()
    assert norms[0] > norms[1] > 1e-3 > norms[2]


@pytest.mark.parametrize("layer", [nn.Linear(12, 6), nn.Conv2d(4, 6, 3)], ids=["linear", "conv"])
def test_a_gone_branch_leaves_the_integers_and_keeps_its_place_in_the_graph(layer):
    torch.manual_seed(0)
    kind = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    quantized = kind(layer, TimestepTable([1]), rank=2)
    x = torch.randn(2, 12) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 5, 5)
    plain, codes = quantized(x, 0).detach(), quantized.merge().codes
    error = quantized.updated_weight() - quantized.quantized_weight()
    quantized.branch = DecayingBranch(error, 3)
    assert not torch.equal(quantized(x, 0), plain)
    assert torch.equal(quantized.merge().codes, codes)
    quantized.branch.decay(10, 10)
    out = quantized(x, 0)
    assert torch.equal(out, plain)
    # Several processes exchange the gradients of all parameters in every update.
    torch.autograd.backward(out.sum())
    for parameter in quantized.branch.parameters():
        assert bool((parameter.grad == 0).all())


def test_the_last_update_has_no_branch():
    training = Training(iterations=10, batch=1, branch_rank=4, branch_share=1.0)
    assert branch_of(training, 10).iterations == 9
    assert branch_of(training, 1) is None
    assert branch_of(training.model_copy(update={"branch_rank": 0}), 10) is None


@pytest.mark.parametrize(
    "method", ["combined", pytest.param("efficientdm", marks=pytest.mark.slow)]
)
def test_an_interrupted_run_with_branches_resumes_to_the_same_bits(method, tmp_path):
    def report(stage, done, total):
        if stage in ("attention", "fine-tune") and done == 5:
            raise Stop

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = recipe(method, branch_share=0.8)
    quantize(tiny_pipeline(), settings, whole)
    with pytest.raises(Stop):
        quantize(tiny_pipeline(), settings, cut, progress=report)
    quantize(tiny_pipeline(), settings, cut, resume=True)
    assert sha256(whole / FILE) == sha256(cut / FILE)


def test_a_run_trained_with_branches_holds_the_tensors_of_one_without(tmp_path):
    for name, rank in (("with", 4), ("without", 0)):
        quantize(tiny_pipeline(), recipe(branch_rank=rank), tmp_path / name)
    for file in (FILE, "trained.safetensors"):
        with_branch, without = (load_file(tmp_path / name / file) for name in ("with", "without"))
        assert {key: (t.shape, t.dtype) for key, t in with_branch.items()} == {
            key: (t.shape, t.dtype) for key, t in without.items()
        }


@pytest.mark.parametrize("layer", [nn.Linear(12, 6), nn.Conv2d(4, 6, 3)], ids=["linear", "conv"])
def test_adapters_start_at_what_the_codes_do_not_hold(layer):
    kind = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    quantized = kind(layer, TimestepTable([1]), rank=8)
    error = (quantized.weight - quantized.quantized_weight()).detach()
    size = float(quantized.lora_A.detach()[:6].norm())
    start_adapters(quantized)
    # The rank is larger than the number of output channels.
    torch.testing.assert_close(quantized.lora_delta().detach(), error)
    assert float(quantized.lora_A.detach()[:6].norm()) == pytest.approx(size, rel=1e-4)
    plain = kind(layer, TimestepTable([1]))
    start_adapters(plain)
    assert plain.lora_delta() is None


def test_a_run_starts_with_the_residual(tmp_path, monkeypatch):
    started = []
    start = fine_tune.start_adapters
    monkeypatch.setattr(fine_tune, "start_adapters", lambda x: started.append(x.rank) or start(x))
    quantize(tiny_pipeline(), recipe(adapter_start="residual", iterations=2), tmp_path / "run")
    assert 4 in started


def test_a_branch_needs_adapters():
    with pytest.raises(RecipeError, match=r"training.branch_rank=8 needs adapters"):
        load_recipe(
            overrides={"method": "quest", "training": {"branch_rank": 8}},
        )
