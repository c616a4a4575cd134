"""A recorded call becomes a graph with the call's tensors as inputs, with the requested free axes."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.exporter.recorded import Form, in_onnxruntime, in_torch
from trtq.errors import LegalityError
from trtq.exporter.trace_call import trace_call
from trtq.graph.nodes import DOMAIN


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shapes(model):
    return {
        value.name: [size if isinstance(size, int) else size.value for size in value.shape]
        for value in model.graph.inputs
    }


class Joint(nn.Module):
    """Takes nested arguments and numbers, and returns two tensors in a structure."""

    def forward(self, hidden_states, t, added_cond_kwargs, scale=1.0, return_dict=True):
        assert not return_dict
        text = added_cond_kwargs["text_embeds"].mean(dim=1, keepdim=True)
        y = hidden_states * scale + text + t.reshape(-1, 1, 1)
        return [y[0], y.sum(dim=1)], added_cond_kwargs["ids"] + 1


def joint_form(batch=2, tokens=3, words=4):
    added = {"text_embeds": values(batch, words, 5, seed=1), "ids": torch.arange(batch)}
    return Form(
        hidden_states=values(batch, tokens, 5),
        t=torch.full((batch,), 7.0),
        added_cond_kwargs=added,
        scale=3.0,
    )


def test_inputs_have_the_paths_of_the_tensors_and_outputs_keep_their_structure():
    form = joint_form()
    traced = trace_call(Joint(), form, form.tensors, set())
    expected = ["hidden_states", "t", "added_cond_kwargs.text_embeds", "added_cond_kwargs.ids"]
    assert [value.name for value in traced.model.graph.inputs] == expected
    assert traced.outputs == (["output_0", "output_1"], "output_2")
    assert [value.name for value in traced.model.graph.outputs] == [
        "output_0",
        "output_1",
        "output_2",
    ]
    assert shapes(traced.model)["added_cond_kwargs.text_embeds"] == [2, 4, 5]
    results = in_onnxruntime(traced.model, form)
    for result, reference in zip(results, in_torch(Joint(), form), strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-6, atol=1e-6)


FREE = {
    "hidden_states": [0, 1],
    "t": [0],
    "added_cond_kwargs.text_embeds": [0, 1],
    "added_cond_kwargs.ids": [0],
}


def test_free_axes_take_other_sizes_and_equal_axes_share_a_symbol():
    form = joint_form()
    traced = trace_call(Joint(), form, form.tensors, set(), free=FREE)
    assert traced.free == {name: tuple(axes) for name, axes in FREE.items()}
    sizes = shapes(traced.model)
    assert sizes["hidden_states"] == ["hidden_states_0", "hidden_states_1", 5]
    assert sizes["t"] == ["hidden_states_0"]
    text = ["hidden_states_0", "added_cond_kwargs_text_embeds_1", 5]
    assert sizes["added_cond_kwargs.text_embeds"] == text
    other = joint_form(batch=3, tokens=6, words=2)
    results = in_onnxruntime(traced.model, other)
    for result, reference in zip(results, in_torch(Joint(), other), strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-6, atol=1e-6)


class Tokens(nn.Module):
    def forward(self, sample):
        # A number of Python fixes the size.
        return sample[:, : int(str(sample.shape[1]))] if sample.shape[1] == 4 else sample


def test_an_axis_that_the_model_fixes_is_reported_as_fixed():
    form = Form(sample=values(2, 4))
    traced = trace_call(Tokens(), form, form.tensors, set(), free={"sample": [0, 1]})
    assert traced.free == {"sample": (0,)}
    assert traced.outputs == "output_0"
    assert shapes(traced.model)["sample"] == ["sample_0", 4]


class Modulated(nn.Module):
    """Views the timesteps by the batch of the sample, as LTX does."""

    def forward(self, sample, t):
        shift = t.reshape(-1, 1).expand(-1, sample.shape[2])
        return sample + shift.view(sample.shape[0], -1, sample.shape[2])


def test_axes_whose_equality_torch_cannot_decide_take_it_from_the_example():
    form = Form(sample=values(2, 4, 5), t=values(2))
    traced = trace_call(Modulated(), form, form.tensors, set(), free={"sample": [0], "t": [0]})
    assert traced.free == {"sample": (0,), "t": (0,)}
    assert shapes(traced.model) == {"sample": ["sample_0", 4, 5], "t": ["sample_0"]}
    other = Form(sample=values(3, 4, 5), t=values(3))
    (result,) = in_onnxruntime(traced.model, other)
    assert torch.equal(result, *in_torch(Modulated(), other))


class Masked(nn.Module):
    def forward(self, sample, mask):
        length = max(mask.sum(dim=1).tolist())
        if length > 3:
            return sample[:, :length]
        return sample


class Chosen(nn.Module):
    def forward(self, sample, mask):
        rows = sample[mask.bool()]
        return rows + torch.ones(len(rows) // 2, 1).sum() if len(rows) > 2 else rows


@pytest.mark.parametrize("denoiser", [Masked(), Chosen()], ids=["length", "boolean indexing"])
def test_lengths_that_depend_on_values_are_refused_in_one_line(denoiser):
    form = Form(sample=values(2, 4, 3), mask=torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(LegalityError, match="depends on values") as caught:
        trace_call(denoiser, form, form.tensors, set())
    assert "\n" not in str(caught.value)
    assert "test_trace_call.py:" in str(caught.value)


class Layered(nn.Module):
    """Calls one layer twice, by name, and asks for the dtype of its weight as diffusers does."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(6, 5)
        self.patch = nn.Conv3d(2, 3, 2, stride=2)
        self.squeeze = nn.Conv1d(4, 2, 3, padding=1)

    def forward(self, x, video):
        dtype = next(self.project.parameters()).dtype
        x = x.to(self.project.weight.dtype).to(dtype)
        return self.project(input=x), self.project(x[:, 0]), self.patch(video), self.squeeze(x)


def test_low_bit_layers_of_all_kinds_are_single_nodes():
    form = Form(x=values(2, 4, 6), video=values(2, 2, 4, 4, 6))
    layers = {"project", "patch", "squeeze"}
    expected = [list(y.shape) for y in in_torch(Layered(), form)]
    traced = trace_call(Layered(), form, form.tensors, layers, half=True, full_precision=["video"])
    nodes = [node for node in traced.model.graph if node.domain == DOMAIN]
    kinds = sorted((node.attributes["name"].as_string(), node.op_type) for node in nodes)
    assert kinds == [
        ("patch", "LowBitConv"),
        ("project", "LowBitLinear"),
        ("project", "LowBitLinear"),
        ("squeeze", "LowBitConv"),
    ]
    assert [list(output.shape) for output in traced.model.graph.outputs] == expected
    types = {value.name: value.dtype.numpy() for value in traced.model.graph.inputs}
    assert types == {"x": np.float16, "video": np.float32}
