"""Channels of attention are scaled by the weights around its products; the function stays the same."""

import pytest
import torch
from torch import nn

from tests.families import pipelines
from trtq.errors import QuantizationError
from trtq.quant import Structure, TransformTensors, apply_structure, attention_modules
from trtq.quant.attention_channels import (
    attention_products,
    scale_channels,
    scaled_weights,
    transforms_of,
    unscaled_outputs,
)
from trtq.quant.hooks import captured_outputs


def decomposed(model):
    apply_structure(model, Structure(tuple(attention_modules(model))))
    return model


def factors(count, seed=0):
    """Factors `c` from 1/50 to 50."""
    generator = torch.Generator().manual_seed(seed)
    return TransformTensors.of_channels(50 ** (2 * torch.rand(count, generator=generator) - 1))


def scale_all(model):
    """Scale the channels of every product, and return the products' names."""
    names = []
    for seed, product in enumerate(list(attention_products(model))):
        if product.obstacle(model) is None:
            channels = model.get_submodule(product.before[0]).out_features
            scale_channels(model, product.name, factors(channels, seed))
            names.append(product.name)
    return names


def dit():
    model = pipelines.build("dit").transformer
    return model, (torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 4]))


def unet():
    """Stable Diffusion's UNet: self-attention and cross-attention."""
    model = pipelines.build("sd_1").unet
    width = model.config.cross_attention_dim
    return model, (torch.randn(2, 4, 8, 8), torch.tensor(500.0), torch.randn(2, 7, width))


@pytest.mark.parametrize("make", [dit, unet])
def test_the_function_stays_the_same(make):
    torch.manual_seed(0)
    model, inputs = make()
    model = decomposed(model).eval().double()
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        before = model(*inputs).sample
        weights = {name: p.clone() for name, p in model.named_parameters()}
        names = scale_all(model)
        after = model(*inputs).sample
    assert len(names) == len(list(attention_products(model))) > 0
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    ends = ("to_q.", "to_k.", "to_v.", "to_out.0.")
    assert changed
    assert all(any(end in name for end in ends) for name in changed)
    # The factors' reciprocals are float32; nothing else is rounded.
    largest = float(before.abs().max())
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6 * largest)


def test_the_operands_of_the_products_are_divided_by_the_factors():
    model, inputs = dit()
    model = decomposed(model).eval()
    seen = []

    def keep(_, operands):
        seen.append(operands[1])

    (mix, *_) = [product for product in attention_products(model) if product.is_mix]
    model.get_submodule(mix.name).register_forward_pre_hook(keep)
    channels = model.get_submodule(mix.before[0]).out_features
    tensors = factors(channels)
    with torch.no_grad():
        model(*inputs)
        scale_channels(model, mix.name, tensors)
        model(*inputs)
    before, after = seen
    inverse = tensors.inv_channels.reshape(1, before.shape[1], 1, -1)
    torch.testing.assert_close(after, before * inverse, rtol=1e-5, atol=1e-6)
    assert transforms_of(model) == {mix.name: tensors}


def test_outputs_of_layers_are_compared_without_the_factors():
    model, inputs = dit()
    model = decomposed(model).eval()
    names = [product.before[0] for product in attention_products(model) if product.is_mix]
    with torch.no_grad():
        with captured_outputs(model, names) as expected:
            model(*inputs)
        scale_all(model)
        with captured_outputs(model, names) as seen:
            model(*inputs)
    assert not torch.allclose(seen[names[0]], expected[names[0]])
    for name, output in unscaled_outputs(model, seen).items():
        torch.testing.assert_close(output, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd_3", "flux"])
def test_joint_attention_has_no_product_of_its_own_and_stays_as_it_is(family):
    """Its values are those of two streams, which `to_out.0` and `to_add_out` read."""
    model = decomposed(pipelines.build(family).transformer)
    assert list(attention_products(model)) == []


def attention(**options):
    from diffusers.models.attention_processor import Attention

    made = Attention(**{"query_dim": 16, "heads": 2, "dim_head": 8} | options)
    return decomposed(nn.ModuleDict({"attention": made}))


def norms(model):
    return model


def tied(model):
    model["attention"].to_v.weight = model["attention"].to_k.weight
    return model


def hooked(model):
    model["attention"].to_v.register_forward_hook(lambda *_: None)
    return model


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def of_another_kind(model):
    model["attention"].to_v = Doubled(16, 16)
    return model


CASES = {
    "norm": ({"qk_norm": "layer_norm"}, norms, "scores", "norm_q stands between"),
    "tied": ({}, tied, "mix", "to_v shares its weight with another layer"),
    "tied_key": ({}, tied, "scores", "to_k shares its weight with another layer"),
    "hook": ({}, hooked, "mix", "to_v is no plain linear layer"),
    "class": ({}, of_another_kind, "mix", "to_v is no plain linear layer"),
    "groups": ({"kv_heads": 1}, norms, "mix", "8 and 16 channels do not correspond one to one"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_absorb_the_factors_stays_as_it_is(case):
    options, change, kind, reason = CASES[case]
    model = change(attention(**options))
    name = f"attention.processor.{kind}"
    (product,) = [each for each in attention_products(model) if each.name == name]
    assert reason in product.obstacle(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(QuantizationError, match="cannot be scaled: .*" + reason):
        scale_channels(model, name, factors(16))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_values_behind_normalised_queries_and_keys_are_scaled():
    torch.manual_seed(0)
    model, x = attention(qk_norm="layer_norm"), torch.randn(2, 5, 16)
    with torch.no_grad():
        before = model["attention"](x)
        assert scale_all(model) == ["attention.processor.mix"]
        torch.testing.assert_close(model["attention"](x), before, rtol=1e-5, atol=1e-6)


def test_weights_in_half_precision_keep_their_type():
    model = attention().half()
    scale_all(model)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("attention.processor.mix", factors(8), "8 factors for 16 channels"),
        ("attention.to_v", factors(16), "no such product"),
        ("attention.processor.mix", TransformTensors(None, 16), "no such product"),
    ],
)
def test_factors_that_do_not_fit_are_refused(name, tensors, message):
    with pytest.raises(QuantizationError, match=message):
        scale_channels(attention(), name, tensors)


def test_only_products_have_scaled_weights():
    with pytest.raises(QuantizationError, match="is no product of a decomposed attention"):
        scaled_weights("attention.to_v", torch.ones(4))
