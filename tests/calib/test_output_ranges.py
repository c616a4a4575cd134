"""Ranges of activations by the error of the layer's output."""

import pytest
import torch
from torch import nn

import trtq
from trtq.calib.output_ranges import ranges_by_output
from trtq.calib.range_rows import RangeRows, input_rows
from trtq.quant.fake_quant import fake_quant
from trtq.quant.ranges import affine_from_range, row_qparams
from trtq.runs.folder import open_run

BITS = 8


def sampled(*steps):
    """The rows of each step, added in several calls."""
    rows = RangeRows(len(steps), 0)
    for step, x in enumerate(steps):
        for part in x.split(1000):
            rows.add(step, part)
    return rows


def rare_outliers(count=20_000, channels=8, rare=20):
    """Rows of which few have one large value."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, channels, generator=generator)
    x[torch.randperm(count, generator=generator)[:rare], 3] += 60
    return x


def clipping_error(x, weight, amax):
    return ((x.clamp(-amax, amax) - x) @ weight.T).square().mean(-1)


def test_the_sample_estimates_the_error_of_clipping_rare_values():
    x, weight = rare_outliers(), torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    rows, shares = sampled(x).parts()
    exact = float(clipping_error(x, weight, 10.0).mean())
    estimate = float((clipping_error(rows[0], weight, 10.0) * shares[0]).sum())
    # All rows that are clipped are in the sample, each with the weight of one row.
    assert estimate == pytest.approx(exact, rel=1e-4)
    # The power also has a random part of 512 rows, with a spread of about sqrt(2 / 512), or 6 %.
    power = float(((rows[0] @ weight.T).square().mean(-1) * shares[0]).sum())
    assert power == pytest.approx(float((x @ weight.T).square().mean()), rel=0.2)


def test_few_rows_are_all_kept_with_equal_weights():
    x = torch.arange(12.0).reshape(6, 2) - 5
    rows, shares = sampled(x, x[:3]).parts()
    for step, count in ((0, 6), (1, 3)):
        kept = shares[step] > 0
        assert shares[step][kept].tolist() == pytest.approx([1 / count] * count)
        assert sorted(rows[step][kept].tolist()) == x[:count].tolist()


def test_rows_of_a_convolution_are_its_pixels():
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert input_rows(x, linear=False)[0].tolist() == x[0, :, 0, 0].tolist()
    assert input_rows(x, linear=True).shape == (12, 2)


def tables_of(x, weights, *, linear, bits=BITS):
    """The table by output, the search's table, and the extremes."""
    low, high = x.min()[None], x.max()[None]
    drawn = x.flatten()[
        torch.randperm(x.numel(), generator=torch.Generator().manual_seed(2))[:2048]
    ]
    searched = row_qparams(
        drawn[None], low, high, bits, "search", symmetric=True, contain_zero=True
    )
    chosen = ranges_by_output(
        sampled(x), weights, (low, high), searched, bits, symmetric=True, linear=linear
    )
    return chosen, searched, (low, high)


def output_error(x, weight, table, bits=BITS):
    scale, zero_point = table
    coded = fake_quant(x, scale, zero_point, 0, 2**bits - 1)
    return float(((coded - x) @ weight.T).square().mean())


def test_a_rare_value_on_which_the_output_depends_is_not_clipped():
    x, weight = rare_outliers(), torch.full((5, 8), 0.1)
    weight[:, 3] = 2.0
    chosen, searched, (low, high) = tables_of(x, [weight], linear=True)
    whole = affine_from_range(low, high, BITS, symmetric=True)
    assert float(searched[0]) < 0.5 * float(whole[0])
    assert output_error(x, weight, chosen) < 0.2 * output_error(x, weight, searched)


def test_a_rare_value_that_the_output_ignores_is_clipped():
    x, weight = rare_outliers(), torch.ones(5, 8)
    weight[:, 3] = 0.0
    chosen, searched, _ = tables_of(x, [weight], linear=True)
    assert chosen[0].tolist() == searched[0].tolist()


def test_one_candidate_serves_all_layers_that_read_the_input():
    x = rare_outliers()
    ignores, reads = torch.ones(5, 8), torch.full((3, 8), 0.1)
    ignores[:, 3], reads[:, 3] = 0.0, 2.0
    alone, searched, _ = tables_of(x, [ignores], linear=True)
    both, _, _ = tables_of(x, [ignores, reads], linear=True)
    assert float(alone[0]) == float(searched[0]) < float(both[0])


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_is_judged_by_the_weights_of_its_inputs(groups):
    x = rare_outliers()
    convolution = nn.Conv2d(8, 8, 1, groups=groups, bias=False)
    with torch.no_grad():
        convolution.weight.fill_(0.1)
        # Input channel 3 is the last one of the first group, or the second one of the second group.
        for output in range(8):
            group = output * groups // 8
            place = 3 - group * (8 // groups)
            if 0 <= place < 8 // groups:
                convolution.weight[output, place] = 4.0
    chosen, searched, _ = tables_of(x, [convolution.weight], linear=False)
    assert float(chosen[0]) > float(searched[0])
    with torch.no_grad():
        convolution.weight[convolution.weight == 4.0] = 0.0
    ignored, _, _ = tables_of(x, [convolution.weight], linear=False)
    assert float(ignored[0]) == float(searched[0])


CALLS = [{"class_labels": [0], "num_inference_steps": 3}]


@pytest.mark.parametrize(
    ("tables", "calls"), [("per-step", None), ("static", None), ("per-step", CALLS)]
)
def test_a_run_has_ranges_by_output(tables, calls, tmp_path):
    def scales(activations):
        out = tmp_path / activations
        recipe = {
            "method": "search",
            "bits": "w8a8",
            "steps": 3,
            "tables": tables,
            "calibration": {"images": 2, "activations": activations},
        }
        trtq.quantize("digits", recipe, out, calls=calls)
        return {name: layer.activation.scale for name, layer in open_run(out).stored.layers.items()}

    searched, chosen = scales("search"), scales("output")
    assert searched.keys() == chosen.keys()
    wider = [name for name in chosen if bool((chosen[name] > searched[name]).any())]
    same = [name for name in chosen if bool((chosen[name] == searched[name]).all())]
    assert wider
    assert same
