"""A survey finds structures and shapes without computing the products of weights."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils import _pytree

from tests.calls.zoo import ZOO
from trtq.calls import survey as surveys
from trtq.calls.survey import survey
from trtq.calls.user_call import UserCall
from trtq.calls.without_products import noise_like, without_products
from trtq.checkpoint.components import denoisers_of

# diffusers warns about its own classes.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

FAST = ("aura_flow", "sana", "wan_21")


def described(pipeline, call):
    return {
        name: {
            key: [(variant.form, variant.shapes) for variant in variants]
            for key, variants in calls.variants.items()
        }
        for name, calls in survey(pipeline, denoisers_of(pipeline), call).items()
    }


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in ZOO if n not in FAST)]
)
def test_forms_and_shapes_are_those_of_computed_calls(name, monkeypatch):
    case = ZOO[name]
    pipeline, call = case.pipeline(), UserCall(case.call())
    fast = described(pipeline, call)
    monkeypatch.setattr(surveys, "without_products", pytest.fail)
    monkeypatch.setattr(
        surveys._Repeated, "_compute", lambda self, args, kwargs: self.forward(*args, **kwargs)
    )
    assert fast == described(pipeline, call)


def test_weights_are_not_read():
    case = ZOO["aura_flow"]
    pipeline = case.pipeline()
    model = pipeline.transformer
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.fill_(float("nan"))
    results = []
    handle = model.register_forward_hook(lambda _, __, result: results.append(result))
    survey(pipeline, denoisers_of(pipeline), UserCall(case.call()))
    handle.remove()
    leaves = _pytree.tree_leaves(results)
    assert leaves
    assert all(torch.isfinite(leaf).all() and leaf.std() > 0 for leaf in leaves)


def convolutions():
    for axes, kernel, stride, padding, dilation, groups in itertools.product(
        (1, 2, 3), (1, 3), (1, 2), (0, 1), (1, 2), (1, 2)
    ):
        yield (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](
            4, 6, kernel, stride, padding, dilation, groups
        )


def test_shapes_of_layers_are_those_of_torch():
    for layer in (nn.Linear(4, 6), *convolutions()):
        axes = len(getattr(layer, "kernel_size", ()))
        sizes = (7, 8, 9)[:axes]
        shapes = [(2, 4, *sizes), (4, *sizes)] if axes else [(4,), (5, 4), (2, 3, 4)]
        for shape in shapes:
            x = torch.randn(shape, dtype=torch.float64)
            expected = layer.double()(x)
            with without_products(layer):
                given = layer(x)
            assert given.shape == expected.shape, (layer, shape)
            assert given.dtype == expected.dtype
        assert torch.equal(layer(x), expected)


def test_layers_that_are_not_zero_padded_by_a_number_compute_as_usual():
    for layer in (nn.Conv2d(2, 2, 3, padding="same"), nn.ConvTranspose2d(2, 2, 3)):
        x = torch.randn(1, 2, 5, 5)
        with without_products(layer):
            assert torch.equal(layer(x), layer.forward(x))
            assert layer(x).std() > 0


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv2d(4, 6, 3)])
def test_an_input_that_does_not_fit_raises_the_error_of_torch(layer):
    x = torch.randn(1, 5, 2, 2)
    with pytest.raises(RuntimeError) as expected:
        layer(x)
    with without_products(layer), pytest.raises(RuntimeError) as given:
        layer(x)
    assert str(given.value) == str(expected.value)


def test_a_model_that_needs_values_computes_them():
    class Indexed(nn.Module):
        """Selects rows by the values of a layer; ones are no index."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1, bias=False)
            self.layer.weight.data.zero_()

        def forward(self, x):
            row = int(self.layer(x)[0, 0])
            return x[row : row + 1].reshape(1, 1)

    model = Indexed()
    with surveys.repeating({"model": model}, products=False):
        assert torch.equal(model(torch.full((1, 1), 7.0)), torch.full((1, 1), 7.0))
    assert "forward" not in model.layer.__dict__


def test_noise_takes_the_place_of_float_results_only():
    count = torch.arange(3)
    assert noise_like(count, 0) is count
    half = torch.ones(2, 5, dtype=torch.float16)
    noise = noise_like(half, 0)
    assert (noise.shape, noise.dtype) == (half.shape, half.dtype)
    assert torch.equal(noise, noise_like(half, 0))
    assert not torch.equal(noise, noise_like(half, 1))
