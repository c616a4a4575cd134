"""Folders that are served without torch: a graph for several sizes."""

import numpy as np
import pytest

from tests.conftest import tiny_pipeline
from trtq.exporter.export import export
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
    export(folder / "run", folder / "onnx", size="8x8:16x24")
    return folder / "onnx"


def test_a_graph_for_several_sizes_is_served_in_all_of_them(range_onnx):
    torch_free = open_model(str(range_onnx), "tiny")
    assert isinstance(torch_free, TorchFreeModel)
    assert torch_free.info.image_size == (8, 8)
    assert torch_free.info.sizes == Sizes((8, 8), (16, 24), 2)
    whole = PipelineModel(open_any(range_onnx), "tiny", "cpu")
    assert whole.info.sizes == torch_free.info.sizes
    for size in (None, (8, 24), (16, 24)):
        request = GenerationRequest("1", 1, 7, 2, 1.0, size)
        ((start,), (whole_start,)) = torch_free.starts(request), whole.starts(request)
        np.testing.assert_allclose(start.x, whole_start.x, atol=1e-5)
        timestep = np.array([start.solver.timesteps[0]], np.float32)
        predicted = torch_free.denoise(start.x, timestep, start.inputs.conditional, {})
        assert predicted.shape == (1, 1, *(size or (8, 8)))
        assert torch_free.decode(predicted).shape == (size or (8, 8))


def test_openvino_serves_one_size_because_it_compiles_each_shape(range_onnx):
    assert open_model(str(range_onnx), "tiny", provider="openvino").info.sizes is None
