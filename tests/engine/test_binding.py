"""Torch tensors bound to onnxruntime's sessions: addresses, conversions, ownership, devices."""

import threading

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import trtq
from tests.engine.fake_session import SPECS, Session
from trtq.engine.arrays import run_on_arrays
from trtq.engine.base import TensorSpec
from trtq.engine.binding import TensorBinding
from trtq.engine.bound_graphs import CapturedShapes, cuda_graphs_wanted
from trtq.engine.openvino import OpenVinoEngine
from trtq.engine.ort import OrtEngine
from trtq.engine.ort_tensorrt import provider_settings
from trtq.engine.place import HOST, Place, place_of
from trtq.errors import ArtefactError, UsageError

GPU = Place(torch.device("cpu"), "cuda", 0)
"""The GPU's memory for onnxruntime; torch's tensors lie on the host."""


class Recorder:
    """Passes everything on to a session, and records the addresses of its inputs and outputs."""

    def __init__(self, session):
        self._session, self.runs = session, []

    def __getattr__(self, name):
        return getattr(self._session, name)

    def io_binding(self):
        io, self.now = self._session.io_binding(), {}
        plain = {"bind_input": io.bind_input, "bind_output": io.bind_output}

        def bind(kind):
            def call(name, *given):
                self.now[name] = given[-1] if len(given) == 5 else None
                plain[kind](name, *given)

            return call

        io.bind_input, io.bind_output = bind("bind_input"), bind("bind_output")
        return io

    def run_with_iobinding(self, io, *options):
        self._session.run_with_iobinding(io, *options)
        self.runs.append(dict(self.now))


def denoised(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        class_labels=[1, 2],
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        output_type="pt",
    ).images


def test_a_denoising_loop_copies_nothing_between_its_steps(digits_onnx, monkeypatch):
    pipeline = trtq.load(digits_onnx, provider="cpu")
    engine, denoiser = pipeline.unet.engine, pipeline.unet
    engine._session = recorder = Recorder(engine.session)
    passed, returned = [], []
    forward = denoiser.forward

    def watched(sample, *args, **kwargs):
        result = forward(sample, *args, **kwargs)
        prediction = getattr(result, "sample", None)
        prediction = result[0] if prediction is None else prediction
        passed.append(sample)  # Kept, so that no address comes twice.
        returned.append(prediction)
        return result

    denoiser.forward = watched
    images = denoised(pipeline)
    assert [run["sample"] for run in recorder.runs] == [x.data_ptr() for x in passed]
    assert [run["out_sample"] for run in recorder.runs] == [x.data_ptr() for x in returned]
    assert len({run["out_sample"] for run in recorder.runs}) == len(returned) >= 4
    monkeypatch.setattr(OrtEngine, "run_tensors", run_on_arrays)
    denoiser.forward = forward
    assert torch.equal(images, denoised(pipeline))


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_bound_tensors_and_arrays_give_the_same_bits(digits_onnx, provider):
    kind = OpenVinoEngine if provider == "openvino" else OrtEngine
    engine = kind(digits_onnx / "unet" / "model.onnx", threads=1)
    generator = torch.Generator().manual_seed(0)
    for batch in (2, 3, 2):
        feeds = {
            "sample": torch.randn(batch, 1, 8, 8, generator=generator),
            "timestep": torch.tensor([500.0] * batch),
            "class_labels": torch.arange(batch),
        }
        (bound,) = engine.run_tensors(feeds).values()
        (plain,) = run_on_arrays(engine, feeds).values()
        assert torch.equal(bound, plain)


def graph(path, kind=TensorProto.FLOAT, out=("n", 3)):
    """y = x * w + 1, computed in float32."""
    as_float = [helper.make_node("Cast", [name], [f"{name}f"], to=1) for name in ("x", "w")]
    nodes = [
        *as_float,
        helper.make_node("Mul", ["xf", "wf"], ["xw"]),
        helper.make_node("Add", ["xw", "one"], ["yf"]),
        helper.make_node("Cast", ["yf"], ["y"], to=kind),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [
                helper.make_tensor_value_info("x", kind, ["n", 3]),
                helper.make_tensor_value_info("w", kind, [3]),
            ],
            [helper.make_tensor_value_info("y", kind, list(out))],
            [helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    onnx.save(model, path)
    return OrtEngine(path, threads=1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return graph(tmp_path_factory.mktemp("graph") / "model.onnx")


W = torch.tensor([1.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (TensorProto.FLOAT, torch.float32),
        (TensorProto.FLOAT16, torch.float16),
        (TensorProto.BFLOAT16, torch.bfloat16),
        (TensorProto.INT64, torch.int64),
    ],
)
def test_every_type_of_a_graph_is_bound(kind, dtype, tmp_path):
    engine = graph(tmp_path / "model.onnx", kind)
    x = torch.arange(6).reshape(2, 3).to(dtype)
    y = engine.run_tensors({"x": x, "w": W.to(dtype)})["y"]
    assert y.dtype == dtype
    assert torch.equal(y, x * W.to(dtype) + 1)
    if dtype == torch.bfloat16:
        assert engine.inputs["x"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(6).reshape(2, 3),
        torch.arange(6.0).reshape(3, 2).T,
        torch.arange(12.0).reshape(2, 6)[:, ::2],
        torch.arange(3.0).expand(2, 3),
        torch.arange(6.0, dtype=torch.float64).reshape(2, 3),
        torch.arange(6.0).reshape(2, 3).bfloat16(),
        torch.tensor([[True, False, True]]),
        torch.arange(6.0).reshape(2, 3).requires_grad_(),
        torch.view_as_complex(torch.arange(12.0).reshape(2, 3, 2)).conj().imag,
    ],
    ids=[
        "int64",
        "columns",
        "strided",
        "expanded",
        "float64",
        "bfloat16",
        "bool",
        "grad",
        "negated",
    ],
)
def test_inputs_of_another_type_or_layout_are_converted(engine, x):
    y = engine.run_tensors({"x": x, "w": W})["y"]
    assert torch.equal(y, x.detach().float() * W + 1)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": torch.ones(2, 3)}, "needs the input 'w'; it takes x, w"),
        ({"x": torch.ones(2, 3), "w": W, "v": W}, "has no input 'v'"),
        ({"x": torch.ones(0, 3), "w": W}, r"'x' of shape \[0, 3\] is empty"),
        ({"x": torch.ones(2, 3, device="meta"), "w": W}, "no address: it is on the meta device"),
        ({"x": torch.ones(2, 3).to_sparse(), "w": W}, "no address: it is torch.sparse_coo"),
        ({"x": torch.ones(2, 3, dtype=torch.complex64), "w": W}, "is torch.complex64"),
        ({"x": np.ones((2, 3)), "w": W}, "must be a torch tensor, got ndarray"),
    ],
)
def test_inputs_that_cannot_be_bound_are_one_error(engine, feeds, message):
    with pytest.raises(UsageError, match=message) as caught:
        engine.run_tensors(feeds)
    assert "\n" not in str(caught.value)


def test_a_shape_that_the_graph_does_not_have_is_one_error_and_the_next_call_works(engine):
    with pytest.raises(ArtefactError, match="onnxruntime cannot run the graph on cpu"):
        engine.run_tensors({"x": torch.ones(2, 4), "w": W})
    y = engine.run_tensors({"x": torch.ones(2, 3), "w": W})["y"]
    assert torch.equal(y, W.expand(2, 3) + 1)


def test_outputs_belong_to_the_caller(engine):
    """Multistep schedulers keep the predictions of earlier steps."""
    kept = []
    for step in range(20):
        x = torch.full((2 + step % 3, 3), float(step))
        kept.append((x, engine.run_tensors({"x": x, "w": W})["y"]))
    for x, y in kept:
        assert torch.equal(y, x * W + 1)
    kept[0][1].zero_()
    assert torch.equal(kept[1][1], kept[1][0] * W + 1)


@pytest.mark.parametrize("out", [("m", 3), (None, None)])
def test_an_output_whose_shape_is_unknown_comes_without_a_copy(tmp_path, out):
    """onnxruntime allocates it; the tensor keeps that memory."""
    engine = graph(tmp_path / "model.onnx", out=out)
    kept = []
    for step in range(8):
        x = torch.full((1 + step % 3, 3), float(step))
        kept.append((x, engine.run_tensors({"x": x, "w": W})["y"]))
    del engine
    assert all(torch.equal(y, x * W + 1) for x, y in kept)


def test_threads_share_an_engine(engine):
    wrong = []

    def call(number):
        for step in range(50):
            x = torch.full((1 + number, 3), float(number * 100 + step))
            if not torch.equal(engine.run_tensors({"x": x, "w": W})["y"], x * W + 1):
                wrong.append((number, step))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def bound_to(session, place, graphs=None):
    def specs(shapes):
        return {name: TensorSpec(np.dtype(np.float32), shape) for name, shape in shapes.items()}

    return TensorBinding(session, "cuda", specs(SPECS.inputs), specs(SPECS.outputs), place, graphs)


def test_tensors_of_a_gpu_are_bound_there_and_constants_stay_bound():
    session = Session()
    binding = bound_to(session, GPU)
    w, kept = W.double(), []  # The constant needs a conversion.
    for step in range(4):
        x = torch.full((2, 3), float(step))
        kept.append((x, binding.run({"x": x, "w": w})["y"]))
    assert {(device, index) for _, device, index, _ in session.bound} == {("cuda", 0)}
    assert session.addresses("x") == [x.data_ptr() for x, _ in kept]
    assert session.addresses("y") == [y.data_ptr() for _, y in kept]
    assert len(session.addresses("w")) == 1
    assert all(torch.equal(y, x * W + 1) for x, y in kept)


@pytest.mark.parametrize("place", [GPU, Place(torch.device("cpu"), uploads=True)])
def test_a_constant_that_changes_is_uploaded_again(place):
    session = Session(uploads=place.uploads)
    binding = bound_to(session, place)
    x, w, array = torch.ones(1, 3), W.clone(), W.numpy().copy()

    def run(weight):
        return binding.run({"x": x, "w": weight})["y"][0].tolist()

    assert run(w) == run(w) == [2, 3, 5]
    assert len(session.addresses("w")) == 1
    w[0] = 7
    assert run(w) == [8, 3, 5]
    w[1:].zero_()  # A view's change is a change of the tensor.
    assert run(w) == [8, 1, 1]
    shared = torch.from_numpy(array)
    assert run(shared) == [2, 3, 5]
    array[0] = 9  # Torch does not see this change.
    assert run(shared) == [10, 3, 5]
    seen = W.clone()
    assert run(seen) == [2, 3, 5]
    seen.numpy()[0] = 9
    assert run(seen) == [10, 3, 5]
    with torch.inference_mode():
        untracked = W.clone()
        assert run(untracked) == [2, 3, 5]
        untracked[0] = 3
        assert run(untracked) == [4, 3, 5]


def test_a_constant_that_is_converted_follows_its_changes(engine):
    w = W.double()
    x = torch.ones(1, 3)
    assert engine.run_tensors({"x": x, "w": w})["y"].tolist() == [[2, 3, 5]]
    w.mul_(2)
    assert engine.run_tensors({"x": x, "w": w})["y"].tolist() == [[3, 5, 9]]


def test_a_captured_graph_reads_and_writes_fixed_addresses():
    """Without fixed addresses each call would return the first call's result."""
    session = Session(captures=True)
    binding = bound_to(session, GPU, CapturedShapes("cuda"))
    kept = []
    for step in range(8):
        x = torch.full((1 + step % 2, 3), float(step))
        kept.append((x, binding.run({"x": x, "w": W})["y"]))
    assert all(torch.equal(y, x * W + 1) for x, y in kept)
    assert len(set(session.addresses("x"))) == len(session.captured) == 2
    assert not {y.data_ptr() for _, y in kept} & set(session.addresses("y"))


def test_without_fixed_addresses_the_stand_in_repeats_the_first_result():
    session = Session(captures=True)
    binding = bound_to(session, GPU)
    session.run_with_iobinding, run = lambda io: run(io, _Options()), session.run_with_iobinding
    x = torch.ones(1, 3)
    first = binding.run({"x": x, "w": W})["y"]
    other = torch.full((1, 3), 5.0)
    assert not torch.equal(binding.run({"x": other, "w": W})["y"], other * W + 1)
    assert torch.equal(first, x * W + 1)


class _Options:
    def get_run_config_entry(self, name):
        raise RuntimeError(name)


def test_a_provider_without_numbered_graphs_captures_one_shape():
    session = Session(captures=True)
    binding = bound_to(session, GPU, CapturedShapes("tensorrt"))
    for value in (1.0, 2.0):
        x = torch.full((2, 3), value)
        assert torch.equal(binding.run({"x": x, "w": W})["y"], x * W + 1)
    with pytest.raises(
        UsageError, match="a session of tensorrt runs 1 input shape; unset TRTQ_CUDA"
    ):
        binding.run({"x": torch.ones(1, 3), "w": W})


def test_cuda_graphs_are_asked_for_by_a_variable(monkeypatch):
    monkeypatch.delenv("TRTQ_CUDA_GRAPHS", raising=False)
    assert not cuda_graphs_wanted()
    monkeypatch.setenv("TRTQ_CUDA_GRAPHS", "yes")
    with pytest.raises(UsageError, match="must be 0 or 1, got 'yes'"):
        cuda_graphs_wanted()
    monkeypatch.setenv("TRTQ_CUDA_GRAPHS", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="sees no GPU; install torch for CUDA, or unset"):
        cuda_graphs_wanted()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda_graphs_wanted()


@pytest.mark.parametrize(
    ("provider", "option"),
    [("tensorrt", "trt_cuda_graph_enable"), ("tensorrt-rtx", "enable_cuda_graph")],
)
def test_the_options_name_cuda_graphs_on_request_only(provider, option, tmp_path, monkeypatch):
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path))
    assert option not in provider_settings(provider, {}, "key")
    assert provider_settings(provider, {}, "key", graphs=True)[option] == "1"


def test_a_gpu_that_torch_does_not_see_gets_copies_of_the_host(monkeypatch):
    assert place_of(on_gpu=False) == HOST
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place_of(on_gpu=True) == Place(torch.device("cpu"), uploads=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert place_of(on_gpu=True) == Place(torch.device("cuda", 0), "cuda", 0)


def test_the_pipeline_moves_to_the_device_of_its_graphs(digits_onnx, monkeypatch):
    """The pipeline's own device is then the GPU, where it keeps its latents."""
    moved = []
    from diffusers import DiffusionPipeline

    monkeypatch.setattr(DiffusionPipeline, "to", lambda self, device: moved.append(device))
    assert trtq.load(digits_onnx, provider="cpu").unet.device == torch.device("cpu")
    assert moved == []
    monkeypatch.setattr(OrtEngine, "device", "meta")  # The only other device of this torch.
    loaded = trtq.load(digits_onnx, provider="cpu")
    assert moved == [torch.device("meta")]
    assert loaded.unet.device == loaded._execution_device == torch.device("meta")
