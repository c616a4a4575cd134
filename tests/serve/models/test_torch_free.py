"""Folders that are served without torch: a graph for several sizes."""

import numpy as np
import pytest

from tests.conftest import tiny_pipeline
from trtq.exporter.export import export_onnx
from trtq.pipelines.open import open_any
from trtq.runs.quantize import quantize
from trtq.serve.hosting import open_model
from trtq.serve.models.base import GenerationRequest, Sizes
from trtq.serve.models.pipeline import PipelineModel
from trtq.serve.models.torch_free import TorchFreeModel

RECIPE = {"method": "minmax", "bits": "w8a8", "steps": 2, "calibration": {"images": 4}}


@pytest.fixture(scope="module")
def range_onnx(tmp_path_factory):
    """An ONNX folder for images of 8x8 to 16x24."""
    folder = tmp_path_factory.mktemp("range")
    quantize(tiny_pipeline(), RECIPE, folder / "run")
    export_onnx(folder / "run", folder / "onnx", size="8x8:16x24")
    return folder / "onnx"


def test_a_graph_for_several_sizes_is_served_in_all_of_them(range_onnx):
    light = open_model(str(range_onnx), "tiny")
    assert isinstance(light, TorchFreeModel)
    assert light.info.image_size == (8, 8)
    assert light.info.sizes == Sizes((8, 8), (16, 24), 2)
    whole = PipelineModel(open_any(range_onnx), "tiny", "cpu")
    assert whole.info.sizes == light.info.sizes
    for size in (None, (8, 24), (16, 24)):
        drawing = GenerationRequest("1", 1, 7, 2, 1.0, size)
        ((one,), (other,)) = light.starts(drawing), whole.starts(drawing)
        np.testing.assert_allclose(one.x, other.x, atol=1e-5)
        timestep = np.array([one.solver.timesteps[0]], np.float32)
        found = light.denoise(one.x, timestep, one.inputs.conditional, {})
        assert found.shape == (1, 1, *(size or (8, 8)))
        assert light.decode(found).shape == (size or (8, 8))


def test_openvino_which_compiles_each_shape_serves_one_size(range_onnx):
    assert open_model(str(range_onnx), "tiny", provider="openvino").info.sizes is None
