"""Roles of layers from one call, and the generic policy by role."""

import pytest
import torch
from torch import nn

from tests.quant.test_layer_forms import tiny_wan
from trtq.calib.policy import load_policy, plan_layers
from trtq.calib.probe import observe_calls, with_shared_inputs
from trtq.calib.roles import observe_roles
from trtq.errors import RecipeError
from trtq.quant.structure import Product


class Denoiser(nn.Module):
    """Module order is not the order of the calls, as in many transformers of diffusers."""

    def __init__(self):
        super().__init__()
        self.proj_out = nn.Linear(8, 4)
        self.mod = nn.Linear(8, 8)
        self.text_in = nn.Linear(6, 8)
        self.t_in = nn.Linear(1, 8)
        self.unused = nn.Linear(8, 8)
        self.feed = nn.Linear(8, 8)
        self.scores = Product()
        self.x_in = nn.Conv2d(4, 8, 1)

    def forward(self, sample, timestep, text):
        shift = self.mod(self.t_in(timestep[..., None]))
        shift = shift if shift.ndim == 3 else shift[:, None]
        text = self.feed(self.text_in(text))
        x = self.x_in(sample).flatten(2).transpose(1, 2) + shift.mean(1, keepdim=True)
        x = x + self.scores(self.scores(x, text.transpose(1, 2)), text)
        return self.proj_out(self.feed(input=x))


SAMPLE, TEXT = torch.randn(2, 4, 3, 3), torch.randn(2, 5, 6)


def roles_of(model, timestep, text=TEXT):
    return observe_roles(model, lambda: model(SAMPLE, timestep, text=text), 2)


@pytest.mark.parametrize(
    "timestep", [torch.zeros(2), torch.zeros(2, 9)], ids=["per image", "per token"]
)
def test_roles_follow_the_order_of_the_calls_and_the_sample(timestep):
    roles = roles_of(Denoiser(), timestep)
    # `text_in` is called before `x_in`, but it is not on the sample's path.
    assert (roles.first, roles.last) == ("x_in", "proj_out")
    assert roles.embeddings == {"t_in", "mod"}
    assert roles.not_called == {"unused"}
    assert roles.calls["feed"] == roles.calls["scores"] == 2
    assert roles.calls["mod"] == 1
    assert set(roles.rows.values()) == {(2,)}
    assert roles.rows_are_images(list(roles.rows))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_roles_need_no_gradients_of_the_caller(mode):
    model = Denoiser()
    with mode():
        roles = roles_of(model, torch.zeros(2))
        assert torch.is_grad_enabled() is False
    # In inference mode autograd follows nothing: the numbers of rows decide.
    assert roles.first == ("x_in" if mode is torch.no_grad else "text_in")
    assert roles.last == "proj_out"
    assert roles.embeddings == {"t_in", "mod"}
    assert torch.is_grad_enabled()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_a_denoiser_that_leaves_torch_is_observed_by_rows():
    class Leaves(Denoiser):
        def forward(self, sample, timestep, text):
            return super().forward(torch.from_numpy(sample.numpy()), timestep, text)

    assert roles_of(Leaves(), torch.zeros(2)).first == "text_in"


def test_an_error_of_the_denoiser_is_passed_on():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        roles_of(Denoiser(), torch.zeros(2), torch.zeros(2, 5, 7))


def test_rows_that_are_tokens_are_distinguished_from_images():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.images, self.tokens = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.tokens(self.images(x).flatten(0, 1))

    model = Tokens()
    roles = observe_roles(model, lambda: model(torch.randn(2, 3, 4)), 2)
    assert roles.rows == {"images": (2,), "tokens": (6,)}
    assert roles.rows_are_images(["images"])
    assert not roles.rows_are_images(["images", "tokens"])


def test_the_generic_policy_keeps_roles_at_eight_bits():
    model = Denoiser()
    roles = roles_of(model, torch.zeros(2))
    plans = {p.name: p for p in plan_layers(model, load_policy("generic"), "w4a4", roles=roles)}
    assert {name: plan.weight_bits for name, plan in plans.items()} == {
        "proj_out": 8,
        "mod": 8,
        "text_in": 4,
        "t_in": 8,
        "unused": None,
        "feed": 4,
        "scores": None,
        "x_in": 8,
    }
    assert plans["unused"].reason == "never called"
    assert not plans["mod"].adapters
    assert plans["scores"].precision == "a4a4"


def test_without_roles_first_and_last_are_those_in_module_order():
    plans = plan_layers(Denoiser(), load_policy("generic"), "w4a4")
    eight = {plan.name for plan in plans if plan.weight_bits == 8}
    assert eight == {"proj_out", "x_in"}


def test_fine_tuning_sets_name_embeddings_by_role():
    policy, model = load_policy("generic"), Denoiser()
    roles = roles_of(model, torch.zeros(2))
    assert policy.select("time_embedding", roles.calls, roles) == ["t_in", "mod"]
    assert policy.select("time_embedding", roles.calls) == []
    names = [
        "a.attn.to_q",
        "a.attn.add_k_proj",
        "a.ff.net.2",
        "a.ff_context.net.0.proj",
        "proj_out",
    ]
    assert policy.select("attention", names) == names[:-1]
    with pytest.raises(RecipeError, match="no set 'x'"):
        policy.select("x", names)


def test_a_wan_transformer_has_its_roles_with_a_timestep_per_token():
    model = tiny_wan()
    x, text = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 5, 16)
    for timestep in (torch.tensor([900.0]), torch.tensor([[900.0] * 4 + [0.0] * 4])):
        roles = observe_roles(model, lambda t=timestep: model(x, t, text), 1)
        assert (roles.first, roles.last) == ("patch_embedding", "proj_out")
        embedder = "condition_embedder.time_embedder"
        assert roles.embeddings == {
            f"{embedder}.linear_1",
            f"{embedder}.linear_2",
            "condition_embedder.time_proj",
        }


def test_calls_of_a_layer_are_summed_and_it_shares_no_input():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.shared = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 8)

        def forward(self, x, y):
            return self.q(input=x), self.k(x), self.shared(x), self.shared(input=y)

    model = Twice()
    x, y = torch.randn(1, 3, 4), torch.randn(1, 5, 4)
    calls = observe_calls(model, ["q", "k", "shared"], lambda: model(x, y))
    assert {name: call.input_of for name, call in calls.items()} == {
        "q": "q",
        "k": "q",
        "shared": "shared",
    }
    assert calls["shared"].multiplications == (3 + 5) * 8 * 4
    assert calls["shared"].input_values == (3 + 5) * 4
    assert calls["shared"].output_values == (3 + 5) * 8
    plans = plan_layers(model, load_policy("generic"), "w8a8")
    assert [plan.input_of for plan in with_shared_inputs(plans, calls)] == [None, "q", None]
