"""One call, with values or without, records the inputs of each layer, and shared inputs."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import tiny_pipeline
from trtq.calib.policy import load_policy, plan_layers
from trtq.calib.probe import probe, with_shared_inputs
from trtq.diffusion.sampling import Conditions
from trtq.quant import convert, merge, quantizable_layers
from trtq.quant.timestep import TimestepTable


@pytest.fixture(params=[True, False], ids=["with values", "without values"])
def unet(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr("trtq.calib.probe._SMALL", 0)
    return tiny_pipeline().unet


def calls_of(unet):
    names = list(quantizable_layers(unet))
    conditions = Conditions({"class_labels": torch.tensor([1])})
    return probe(unet, names, (1, 8, 8), 500.0, conditions)


def test_counts_equal_those_of_a_real_call(unet):
    calls = calls_of(unet)
    seen = {}

    def count(name):
        return lambda module, inputs, output: seen.update(
            {name: (output.numel() * module.weight[0].numel(), inputs[0].numel(), output.numel())}
        )

    for name, module in quantizable_layers(unet).items():
        module.register_forward_hook(count(name))
    with torch.no_grad():
        unet(torch.randn(1, 1, 8, 8), 500, torch.tensor([1]))
    assert {
        name: (call.multiplications, call.input_values, call.output_values)
        for name, call in calls.items()
    } == seen


def test_only_queries_keys_and_values_share_their_input(unet):
    shared = {n: call.input_of for n, call in calls_of(unet).items() if call.input_of != n}
    attentions = [n.removesuffix(".to_q") for n in quantizable_layers(unet) if n.endswith(".to_q")]
    assert len(attentions) == 4
    assert shared == {f"{a}.{leaf}": f"{a}.to_q" for a in attentions for leaf in ("to_k", "to_v")}


def test_layers_with_different_bits_keep_separate_quantisers(unet):
    plans = plan_layers(unet, load_policy("UNet2DModel"), "w4a4")
    place = next(i for i, plan in enumerate(plans) if plan.name.endswith(".to_k"))
    plans[place] = replace(plans[place], activation_bits=8)
    after = with_shared_inputs(plans, calls_of(unet))
    assert after[place].input_of is None
    assert after[place + 1].input_of == plans[place].name.replace("to_k", "to_q")
    plans[place] = replace(plans[place], activation_bits=None)
    assert with_shared_inputs(plans, calls_of(unet))[place].input_of is None


def test_a_shared_quantiser_is_a_single_module_and_merges_into_each_layer(unet):
    plans = with_shared_inputs(
        plan_layers(unet, load_policy("UNet2DModel"), "w4a4"), calls_of(unet)
    )
    quantized = convert(unet, plans, TimestepTable([10.0, 500.0]))
    paths = [path for path, _ in quantized.activations()]
    assert len(paths) == len(plans) - 8
    for index, (_, quantizer) in enumerate(quantized.activations()):
        zero_point = torch.full((2,), 2.0 ** (quantizer.bits - 1))
        quantizer.set_range(torch.tensor([0.5, 2.0 + index]), zero_point)
    attention = next(p.input_of for p in plans if p.input_of is not None).removesuffix("to_q")
    layers = dict(quantized.layers())
    assert layers[f"{attention}to_k"].activation is layers[f"{attention}to_q"].activation
    tables = merge(quantized)
    assert torch.equal(
        tables[f"{attention}to_v"].activation.scale, tables[f"{attention}to_q"].activation.scale
    )
