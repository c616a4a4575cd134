"""Samples that stay in the memory where a graph computes, tried with onnxruntime's CPU provider."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.serve.test_batcher import Crowd
from trtq.engine import binding
from trtq.engine.ort import OrtSession
from trtq.pipelines.open import open_any
from trtq.serve.batcher import Batcher
from trtq.serve.models import pipeline as module
from trtq.serve.models.graph import GraphCall
from trtq.serve.models.pipeline import PipelineModel, device_of_samples
from trtq.serve.models.samples import beside, joined, repeated

STEPS = 4


def drawn(model, count, **wish):
    crowd, batcher = Crowd(model), Batcher(model, max_rows=4)
    items = crowd.items(7, STEPS, count=count, prompt="1", **wish)
    batcher.put(items)
    samples = crowd.wait(count, seconds=300)
    batcher.close(RuntimeError("closed"))
    return [samples[7, index] for index in range(count)]


@pytest.fixture
def on_device(digits_onnx, monkeypatch):
    """The model whose samples are tensors; the CPU's memory stands for the GPU's."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "device_of_samples", lambda _: torch.device("cpu"))
        return PipelineModel(open_any(digits_onnx), "digits", "cpu")


@pytest.fixture
def on_host(digits_onnx):
    return PipelineModel(open_any(digits_onnx), "digits", "cpu")


def test_the_graph_reads_the_latents_where_the_solver_wrote_them(on_device, monkeypatch):
    bound, written = [], []
    bind = binding._Slot.bind_inputs

    def bind_inputs(slot, sources, tensors, place):
        bound.append({name: tensors[name].data_ptr() for name in ("sample", "class_labels")})
        return bind(slot, sources, tensors, place)

    monkeypatch.setattr(binding._Slot, "bind_inputs", bind_inputs)
    (start,) = on_device.starts(
        SimpleNamespace(
            prompt="1", count=1, seed=7, steps=STEPS, guidance=1.0, size=None, negative_prompt=None
        )
    )
    solver = type(start.solver)
    step = solver.step

    def stepped(self, x, predicted, position):
        following, clean = step(self, x, predicted, position)
        written.append(following)
        return following, clean

    monkeypatch.setattr(solver, "step", stepped)
    session = on_device._graph.engine.session
    arrays = []
    monkeypatch.setattr(
        on_device._graph.engine,
        "_session",
        SimpleNamespace(
            run=lambda *_: arrays.append(1),
            io_binding=session.io_binding,
            run_with_iobinding=session.run_with_iobinding,
        ),
    )
    (image,) = drawn(on_device, 1, guidance=1.0)
    assert image is written[-1]
    assert len(bound) == STEPS
    # From the second call on, the address is that of the tensor that the solver returned.
    assert [call["sample"] for call in bound[1:]] == [x.data_ptr() for x in written[:-1]]
    assert len({call["class_labels"] for call in bound}) == 1
    assert arrays == []


@pytest.mark.parametrize(("count", "guidance"), [(1, 1.0), (2, 1.0), (2, 3.0)])
def test_the_images_are_those_of_arrays(on_device, on_host, count, guidance):
    if not on_host.info.takes_guidance:
        guidance = 1.0
    tensors = drawn(on_device, count, guidance=guidance)
    arrays = drawn(on_host, count, guidance=guidance)
    for tensor, array in zip(tensors, arrays, strict=True):
        assert isinstance(tensor, torch.Tensor)
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(tensor.numpy(), array)
        np.testing.assert_array_equal(on_device.decode(tensor), on_host.decode(array))


def test_warming_runs_the_graph_on_tensors(on_device):
    on_device.warm(3)


def test_only_graphs_on_a_gpu_provider_keep_samples_there():
    class Session(OrtSession):
        def __init__(self, provider):
            self.provider, self.inputs, self.outputs = provider, {}, {"y": None}

        device = "cuda:0"

    for provider in ("cuda", "tensorrt", "tensorrt-rtx"):
        assert device_of_samples(GraphCall(Session(provider))) == torch.device("cuda:0")
    assert device_of_samples(GraphCall(Session("cpu"))) is None
    # The engines that trtq opens by itself take arrays of the host.
    engine = SimpleNamespace(provider="tensorrt-rtx", inputs={}, outputs={"y": None}, device="cpu")
    assert device_of_samples(GraphCall(engine)) is None
    assert device_of_samples(None) is None


def test_rows_of_both_kinds_are_joined_and_repeated_alike():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = beside(array, torch.zeros(1))
    assert isinstance(tensor, torch.Tensor)
    assert beside(array, array) is array
    assert joined([tensor]) is tensor
    np.testing.assert_array_equal(joined([tensor, tensor]), joined([array, array]))
    np.testing.assert_array_equal(repeated(tensor[:1], 3), repeated(array[:1], 3))
