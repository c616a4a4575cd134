"""The timestep of a call, stand-ins of the model's class, and inputs by keyword."""

import copy
import pickle

import pytest
import torch
from torch import nn

from trtq.errors import QuantizationError, StepError, UsageError
from trtq.quant import (
    ActivationQuantizer,
    LayerPlan,
    QuantizedDenoiser,
    QuantLinear,
    TimestepTable,
    convert,
    deploy,
    merge,
)
from trtq.quant.activation import select_step
from trtq.quant.hooks import captured_outputs, input_hooks, output_hooks
from trtq.quant.stand_in import StandIn
from trtq.quant.timestep import current_step

TABLE = TimestepTable([10.0, 500.0, 900.0])


class Model(nn.Module):
    """A denoiser whose timestep is called `t`, with rows that are tokens."""

    marker = "model"

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.config = {"width": 4}
        self.contexts = []

    def forward(self, x, t, scale=1.0):
        self.step = current_step()
        return self.proj(x.flatten(0, 1)).reshape(x.shape) * scale

    def cache_context(self, name):
        self.contexts.append(name)
        return name

    def set_attn_processor(self, processor):
        raise AssertionError("a stand-in forwards no refused method")


def low_bit(**options):
    model = Model()
    plans = [LayerPlan("proj", "linear", 4, 8, "test")]
    quantized = convert(model, plans, TABLE, timestep="t", **options)
    quantized.denoiser.proj.activation.set_range(
        torch.tensor([0.01, 0.02, 0.04]), torch.full((3,), 128.0)
    )
    return quantized


class TestTimestepArgument:
    def test_the_timestep_may_have_any_name(self):
        quantized = low_bit(per_item=False)
        x = torch.randn(2, 3, 4)
        by_place, by_name = quantized(x, torch.tensor(500)), quantized(x, t=500)
        assert torch.equal(by_place, by_name)
        assert quantized.denoiser.step.tolist() == [1]
        deployed = deploy(Model(), merge(quantized), TABLE, timestep="t", per_item=False)
        torch.testing.assert_close(deployed(x, 500), by_name, rtol=1e-5, atol=1e-5)

    def test_a_name_that_forward_lacks_lists_the_arguments(self):
        with pytest.raises(QuantizationError, match=r"no argument 'timestep'.*x, t, scale"):
            QuantizedDenoiser(Model(), TABLE)

    def test_a_call_without_the_timestep_names_the_argument(self):
        with pytest.raises(StepError, match="the argument 't'"):
            low_bit()(torch.zeros(1, 1, 4))

    @pytest.mark.parametrize(
        "timestep",
        [
            900,
            torch.tensor(900),
            torch.tensor([900.0]),
            torch.tensor([900.0, 10.0]),
            torch.tensor([[0.0, 0.0, 880.0], [0.0, 900.0, 10.0]]),
        ],
        ids=["number", "scalar", "one", "items", "tokens"],
    )
    def test_a_call_has_one_index_of_its_noisiest_timestep(self, timestep):
        quantized = low_bit(per_item=False)
        x = torch.randn(2, 3, 4)
        assert torch.equal(quantized(x, timestep), quantized(x, 900))
        assert quantized.denoiser.step.tolist() == [2]

    def test_one_index_serves_rows_that_are_tokens_and_several_do_not(self):
        x, timesteps = torch.randn(2, 3, 4), torch.tensor([10.0, 900.0])
        assert low_bit(per_item=False)(x, timesteps).shape == x.shape
        with pytest.raises(StepError, match=r"shape \(2,\) for 6 rows.*per_item=False"):
            low_bit()(x, timesteps)

    def test_timesteps_per_token_are_an_error_per_item(self):
        with pytest.raises(StepError, match=r"shape \(2, 3\)"):
            low_bit()(torch.zeros(2, 3, 4), torch.zeros(2, 3))

    @pytest.mark.parametrize(
        ("timestep", "message"), [(torch.zeros(0), "no timestep"), (float("nan"), "NaN")]
    )
    def test_no_timestep_and_nan_are_refused(self, timestep, message):
        with pytest.raises(StepError, match=message):
            low_bit(per_item=False)(torch.zeros(1, 1, 4), timestep)

    @pytest.mark.parametrize("step", [torch.tensor(2), torch.tensor([2]), torch.tensor([[2]])])
    def test_a_single_index_selects_a_scalar_for_any_number_of_rows(self, step):
        assert select_step(torch.tensor([1.0, 2.0, 3.0]), step, 7).item() == 3.0
        with pytest.raises(StepError, match="leave the table"):
            select_step(torch.tensor([1.0, 2.0]), step, 7)

    def test_a_matrix_of_indices_is_refused(self):
        with pytest.raises(StepError, match=r"shape \(2, 3\)"):
            ActivationQuantizer(4, TABLE)(torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.long))


class Engine(StandIn):
    """A stand-in without a model in memory."""

    def __init__(self, model=None):
        super().__init__()
        self.config = type("Config", (), {"projection_class_embeddings_input_dim": 24})()
        if model is not None:
            self.model = model

    def forward(self, x):
        return x if self.model_inside() is None else self.model.proj(x)


class TestStandIn:
    def test_it_passes_isinstance_of_the_models_class(self):
        quantized = low_bit()
        assert isinstance(quantized, Model)
        assert isinstance(quantized, QuantizedDenoiser)
        assert quantized.__class__ is Model
        assert type(quantized) is QuantizedDenoiser
        assert repr(quantized).startswith("QuantizedDenoiser(")

    def test_attributes_that_it_does_not_define_are_the_models(self):
        quantized = low_bit()
        assert quantized.marker == "model"
        assert quantized.proj is quantized.denoiser.proj
        assert quantized.config == {"width": 4}
        assert quantized.cache_context("cond") == "cond"
        assert quantized.denoiser.contexts == ["cond"]
        with pytest.raises(AttributeError, match="'Model' object has no attribute 'nothing'"):
            _ = quantized.nothing

    def test_methods_that_change_weights_are_still_refused(self):
        quantized = low_bit()
        assert not hasattr(quantized, "fuse_qkv_projections")
        with pytest.raises(UsageError, match="change the float pipeline"):
            quantized.fuse_qkv_projections()

    def test_attention_processors_need_a_model_inside(self):
        engine = Engine()
        assert not hasattr(engine, "set_attn_processor")
        with pytest.raises(UsageError, match="change the float pipeline"):
            engine.set_attn_processor(None)
        model = Model()
        model.set_attn_processor = [].append
        assert Engine(model).set_attn_processor is model.set_attn_processor

    def test_without_a_model_it_is_of_its_own_class(self):
        engine = Engine()
        assert engine.__class__ is Engine
        assert not isinstance(engine, Model)
        assert engine.add_embedding.linear_1.in_features == 24
        with engine.cache_context("cond"):
            pass
        with pytest.raises(AttributeError, match="nothing"):
            _ = engine.nothing
        assert isinstance(Engine(Model()), Model)

    @pytest.mark.parametrize("make", [low_bit, lambda: Engine(Model())])
    def test_copies_and_pickles_keep_both_classes(self, make):
        module = make()
        copies = [copy.deepcopy(module), copy.copy(module)]
        if isinstance(module, QuantizedDenoiser):
            copies.append(pickle.loads(pickle.dumps(module)))
        for other in copies:
            assert type(other) is type(module)
            assert isinstance(other, Model)
            for key, value in module.state_dict().items():
                assert torch.equal(other.state_dict()[key], value)
        assert copies[0].proj is not module.proj

    def test_hooks_and_export_see_an_ordinary_module(self):
        engine, calls = Engine(Model()), []
        engine.register_forward_hook(lambda *_: calls.append(1))
        x = torch.randn(2, 4)
        expected = engine(x)
        assert calls == [1]
        program = torch.export.export(nn.Sequential(engine), (x,))
        torch.testing.assert_close(program.module()(x), expected)


class Named(nn.Module):
    def forward(self, a, b=None, *, c=None):
        return a + (0 if b is None else b) + (0 if c is None else c)


class TestKeywordInputs:
    @pytest.mark.parametrize("layer", [nn.Linear(4, 2), nn.Conv2d(4, 2, 1)])
    def test_hooks_see_an_input_given_by_name(self, layer):
        x = torch.randn(1, 4, 4, 4)
        seen = []
        with (
            input_hooks({"proj_in": layer}, lambda name, inputs: seen.append((name, inputs))),
            output_hooks({"proj_in": layer}, lambda *call: seen.append(call)),
        ):
            y = layer(input=x)
        assert seen[0][0] == "proj_in"
        assert len(seen[0][1]) == 1
        assert seen[0][1][0] is x
        assert seen[1][1][0] is x
        assert seen[1][2] is y

    def test_tensors_come_in_the_order_of_the_parameters(self):
        module, seen = Named(), []
        a, b, c = (torch.full((1,), value) for value in (1.0, 10.0, 100.0))
        with input_hooks({"m": module}, lambda _, inputs: seen.append([x.item() for x in inputs])):
            module(c=c, b=b, a=a)
            module(a, c=c)
            module(a, 2.0)
        assert seen == [[1, 10, 100], [1, 100], [1]]

    def test_a_hook_replaces_inputs_by_place_and_by_name(self):
        module = Named()
        a, b = torch.ones(1), torch.ones(1)
        with input_hooks({"m": module}, lambda _, inputs: tuple(10 * x for x in inputs)):
            assert [module(a, b), module(a, b=b), module(b=b, a=a)] == [20, 20, 20]
            assert module(a, c=b) == 20
        with input_hooks({"m": module}, lambda _, inputs: 3 * inputs[0]):
            assert module(a=a) == 3
        assert module(a, b) == 2

    def test_a_hook_that_drops_a_tensor_is_an_error(self):
        module = Named()
        with input_hooks({"m": module}, lambda *_: ()), pytest.raises(ValueError, match="shorter"):
            module(torch.ones(1))

    def test_low_bit_layers_take_their_input_by_name(self):
        layer = QuantLinear(nn.Linear(4, 2), TABLE)
        x = torch.randn(3, 4)
        assert torch.equal(layer(input=x, step=1), layer(x, 1))

    def test_outputs_of_calls_by_name_are_captured(self):
        model = nn.Sequential(nn.Linear(4, 2))
        x = torch.randn(1, 4)
        with captured_outputs(model, ["0"]) as outputs:
            model[0](input=x)
        assert torch.equal(outputs["0"], model[0](x))
