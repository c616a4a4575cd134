"""Mixed precision: measurements, restored weights and budgets."""

import pytest
import torch

from tests.conftest import tiny_pipeline
from trtq.calib.budget import parse_budget
from trtq.calib.sensitivity import spend, weight_sensitivity
from trtq.calls.user_call import UserCall
from trtq.diffusion.sampling import Conditions, predict
from trtq.errors import NonFiniteError, RecipeError
from trtq.runs.budget import predictions_in_call
from trtq.runs.quantize import quantize
from trtq.runs.weights import FILE_NAME


@pytest.mark.parametrize(
    "text", ["size", "size=2x", "size=0.3", "speed=0.3x", "size=0x", "size=..x"]
)
def test_invalid_budgets_are_refused(text):
    with pytest.raises(RecipeError, match="is not understood"):
        parse_budget(text)


def measured(unet, names):
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([1.0, 300.0, 600.0, 900.0])
    conditions = Conditions({"class_labels": torch.arange(4) % 3})
    return weight_sensitivity(unet, names, lambda: predict(unet, x, t, conditions), "minmax")


def test_fewer_bits_have_larger_errors_and_weights_are_restored():
    unet = tiny_pipeline().unet
    before = {name: p.clone() for name, p in unet.named_parameters()}
    names = ["mid_block.resnets.0.conv1", "mid_block.attentions.0.to_q"]
    sensitivity = measured(unet, names)
    for errors in sensitivity.values():
        assert errors[2] > errors[4] > errors[8] > 0
    assert all(torch.equal(before[name], p) for name, p in unet.named_parameters())


def test_an_error_about_nan_names_the_layer():
    unet = tiny_pipeline().unet
    with torch.no_grad():
        unet.conv_out.bias.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="to_q"):
        measured(unet, ["mid_block.attentions.0.to_q"])


def test_the_bits_go_to_the_sensitive_layer():
    sensitivity = {"fragile": {2: 9.0, 4: 3.0, 8: 0.0}, "tough": {2: 0.2, 4: 0.1, 8: 0.0}}

    def cost(name, bits):
        return bits

    assert spend(sensitivity, cost, 16) == {"fragile": 8, "tough": 8}
    assert spend(sensitivity, cost, 10) == {"fragile": 8, "tough": 2}
    assert spend(sensitivity, cost, 6) == {"fragile": 4, "tough": 2}
    with pytest.raises(RecipeError, match="cannot be met"):
        spend(sensitivity, cost, 3)


def test_the_choice_is_close_to_the_optimum_of_an_exhaustive_search():
    generator = torch.Generator().manual_seed(0)
    sensitivity = {}
    for name in "abcd":
        drops = torch.rand(2, generator=generator).sort(descending=True).values.tolist()
        sensitivity[name] = {2: drops[0] + drops[1], 4: drops[1] * 0.5, 8: 0.0}
    for available in (12, 16, 20, 24):
        chosen = spend(sensitivity, lambda _, bits: bits, available)
        assert sum(chosen.values()) <= available
        error = sum(sensitivity[name][bits] for name, bits in chosen.items())
        best = min(
            sum(sensitivity[n][b] for n, b in zip("abcd", each, strict=True))
            for each in torch.cartesian_prod(*[torch.tensor([2, 4, 8])] * 4).tolist()
            if sum(each) <= available
        )
        # Greedy choice on the convex hull: at most one layer differs from the optimum.
        assert error <= best + max(max(errors.values()) for errors in sensitivity.values())


@pytest.mark.parametrize("calls", [None, [{"class_labels": [0], "num_inference_steps": 2}]])
@pytest.mark.parametrize("share", [0.86, 0.95])
def test_the_file_fits_the_size_budget(share, calls, tmp_path):
    recipe = {
        "method": "minmax",
        "steps": 2,
        "budget": f"size={share}x",
        "calibration": {"images": 4, "samples_per_step": 64},
    }
    result = quantize(tiny_pipeline(), recipe, tmp_path / "run", calls=calls)
    assert (tmp_path / "run" / FILE_NAME).stat().st_size == result["bytes_after"]
    assert result["bytes_after"] <= share * result["bytes_before"]


def test_sensitivity_in_the_call_is_measured_at_steps_of_the_whole_call():
    pipeline = tiny_pipeline()
    call = UserCall({"class_labels": [0], "num_inference_steps": 20})
    seen = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[1:2] or [kwargs["timestep"]])[0]),
        with_kwargs=True,
    )
    predictions = predictions_in_call(pipeline, "unet", call, 20, seed=0)
    passed = [float(torch.as_tensor(timestep).max()) for timestep in seen]
    seen.clear()
    first = predictions()
    measured_at = [float(torch.as_tensor(timestep).max()) for timestep in seen]
    assert len(passed) == 20
    assert measured_at == [passed[index] for index in (0, 3, 5, 8, 11, 14, 16, 19)]
    assert torch.equal(first, predictions())


def test_a_budget_that_cannot_be_met_in_the_call_is_refused(tmp_path):
    recipe = {"method": "minmax", "budget": "size=0.01x", "calibration": {"images": 1}}
    calls = [{"class_labels": [0], "num_inference_steps": 2}]
    with pytest.raises(RecipeError, match="budget cannot be met"):
        quantize(tiny_pipeline(), recipe, tmp_path / "run", calls=calls)
    assert not list(tmp_path.iterdir())
