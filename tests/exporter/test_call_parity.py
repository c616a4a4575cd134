"""Comparison of denoisers inside a pipeline's call."""

import torch
from torch import nn

from trtq.calls.user_call import UserCall
from trtq.exporter.call_parity import call_parities


class Emptying(nn.Module):
    """Takes features out of the list that it is called with, as diffusers' UNet does."""

    def forward(self, sample, timestep, features):
        while features:
            sample = sample + features.pop(0)
        return (sample,)


class Pipeline:
    def __init__(self):
        self.unet = Emptying()

    def __call__(self):
        for step in (2.0, 1.0):
            self.unet(torch.ones(1, 4), torch.tensor(step), features=[torch.ones(1, 4)] * 3)


def test_a_graph_gets_the_arguments_that_the_pipeline_passed_though_the_model_empties_them():
    rows = call_parities(Pipeline(), {"unet": Emptying()}, UserCall())
    assert [row.db for row in rows] == [200.0, 200.0]


def test_the_floor_is_measured_with_the_arguments_of_the_call():
    class Wrong(nn.Module):
        def forward(self, sample, timestep, features):
            return (1.5 * sample,)

    # Without low-bit layers nothing moves, so torch agrees with itself exactly.
    rows = call_parities(Pipeline(), {"unet": Wrong()}, UserCall())
    assert [row.floor_db for row in rows] == [200.0, 200.0]
    assert not any(row.holds(40.0) for row in rows)
