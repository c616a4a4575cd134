"""Calls are flattened to tensors and a template, and rebuilt exactly."""

import json

import pytest
import torch
from torch import nn

from trtq.calls.form import CallForm, flatten_call
from trtq.errors import ArtefactError, UsageError


class Denoiser(nn.Module):
    def forward(self, sample, timestep, states=None, extra=None, return_dict=True):
        return sample


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a is b
    if isinstance(a, list | tuple):
        return type(a) is type(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def test_a_call_is_rebuilt_with_its_own_tensors_and_constants():
    x, t, e = torch.zeros(2, 3), torch.tensor(7), torch.ones(2)
    extra = {"text": e, "sizes": [(1, 2), (3, 4)], "scale": 0.5, "mask": None}
    form, tensors = flatten_call(Denoiser(), (x, t), {"extra": extra, "return_dict": False})
    assert list(tensors) == form.names == ["sample", "timestep", "extra.text"]
    rebuilt = form.rebuild(tensors)
    assert same(rebuilt, {"sample": x, "timestep": t, "extra": extra})


def test_the_template_is_json_and_equal_after_reading():
    form, _ = flatten_call(Denoiser(), (torch.zeros(1), 3), {"extra": [torch.ones(1), "a"]})
    read = CallForm(json.loads(json.dumps(form.template)))
    assert read.key == form.key


def test_the_key_depends_on_structure_and_constants_but_not_on_values_and_sizes():
    def key(*args, **kwargs):
        return flatten_call(Denoiser(), args, kwargs)[0].key

    base = key(torch.zeros(1), torch.tensor(1))
    assert key(torch.ones(4, 2), torch.tensor(9)) == base
    assert key(torch.zeros(1), 1) != base
    assert key(torch.zeros(1), torch.tensor(1), states=None) != base
    assert key([torch.zeros(1)], torch.tensor(1)) != key((torch.zeros(1),), torch.tensor(1))


def test_a_number_becomes_a_tensor_only_where_it_is_asked_for():
    form, tensors = flatten_call(Denoiser(), (torch.zeros(1), 3), {}, frozenset({"timestep"}))
    assert float(tensors["timestep"]) == 3
    assert form.template["timestep"] == {"tensor": "timestep"}


def test_an_object_is_passed_within_the_process_and_refused_from_a_file():
    thing = object()
    form, tensors = flatten_call(Denoiser(), (torch.zeros(1), 1), {"extra": thing})
    assert form.rebuild(tensors)["extra"] is thing
    assert form.opaque == ["builtins.object extra"]
    with pytest.raises(ArtefactError, match=r"builtins\.object extra, which no file can hold"):
        CallForm(form.template).rebuild(tensors)


def test_an_argument_that_contains_itself_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(UsageError, match="'extra' is nested too deep"):
        flatten_call(Denoiser(), (torch.zeros(1), 1), {"extra": loop})
