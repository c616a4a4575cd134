"""FP8, NVFP4 and weight-only layers with a transformed input equal torch, and keep it in a file."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.graph.test_fp8_nodes import fp8, session
from tests.graph.test_input_transforms import eighths
from tests.graph.test_low_bit_layers import PER_CALL, TABLE
from tests.graph.test_nvfp4_nodes import OUT, nvfp4
from tests.graph.test_weight_only_nodes import linear_graph, weight_only
from trtq.graph.passes import ExpandLowBitToQdq
from trtq.graph.runtimes.prepare import prepare
from trtq.quant.formats import deployed_form, stored_tensors
from trtq.quant.input_transform import TransformTensors

LAYERS = {
    "fp8": lambda: fp8(nn.Linear(64, OUT)),
    "nvfp4": nvfp4,
    "weight_only": lambda: weight_only((OUT, 64), 32),
}
FACTORS = torch.linspace(0.1, 20, 64)


def transformed(name, rotation):
    """The layer with a rotation of 16 channels, or else with smoothing."""
    transform = TransformTensors.of_channels(None if rotation else FACTORS, rotation)
    return replace(LAYERS[name](), transform=transform)


@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_the_graph_equals_torch(name, rotation):
    layer = transformed(name, rotation)
    model = linear_graph((2, 5, 64), OUT)
    ExpandLowBitToQdq({"a": layer}, TABLE, timestep=PER_CALL)(model)
    x = eighths(2, 5, 64)
    feeds = {"x": x.numpy(), "t": np.array([501], np.float32)}
    (result,) = session(prepare(model, "onnxruntime")).run(None, feeds)
    expected = deployed_form(layer, None)(x, TABLE.index(501.0))
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-5, atol=1e-4)
    plain = deployed_form(replace(layer, transform=None), None)(x, TABLE.index(501.0))
    assert not torch.allclose(plain, expected, rtol=1e-2)


@pytest.mark.parametrize("name", LAYERS)
def test_the_transform_survives_the_file(name):
    layer = replace(LAYERS[name](), transform=TransformTensors.of_channels(FACTORS, 16))
    source = nn.Linear(64, OUT)
    bits, group = (4, 32) if name == "weight_only" else (8, None)
    stored = stored_tensors(layer.tensors(), name, bits, group, source)
    assert stored.transform.key == layer.transform.key
