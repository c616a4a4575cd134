"""The Triton repository: its files, Triton's schema, and images equal to `trtq generate`."""

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_file import made_from, write_manifest
from trtq.artefact.opened import open_folder
from trtq.cli import app
from trtq.engine.ort import OrtEngine
from trtq.errors import ArtefactError, ServerError, UsageError
from trtq.exporter.export import export
from trtq.pipelines.draw import conditioning_for, draw
from trtq.pipelines.open import open_any
from trtq.serve.triton import model as triton_model
from trtq.serve.triton.package import CHECKSUMS_NAME, package_triton

PARTS = "pipeline/1/parts"


def schema():
    """Triton's schema, from Triton's client package; the rest of the package needs grpc."""
    distribution = importlib.metadata.distribution("tritonclient")
    path = distribution.locate_file("tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config(folder):
    from google.protobuf import text_format

    text = (folder / "config.pbtxt").read_text()
    return text_format.Parse(text, schema().ModelConfig())


class FakeTensor:
    def __init__(self, name, array):
        self.name, self.array = name, array

    @classmethod
    def from_dlpack(cls, name, given):
        return cls(name, torch.from_dlpack(given).numpy())

    def to_dlpack(self):
        return torch.from_numpy(self.array).__dlpack__()

    def as_numpy(self):
        return self.array


class FakeResponse:
    def __init__(self, tensors=(), error=None):
        self.tensors, self.failure = {tensor.name: tensor for tensor in tensors}, error

    def has_error(self):
        return self.failure is not None

    def error(self):
        return self.failure


class FakeError:
    INTERNAL, INVALID_ARG, CANCELLED = range(3)

    def __init__(self, text, code=INTERNAL):
        self.text, self.code = text, code

    def message(self):
        return self.text


NUMPY = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}


def fake_backend(repository):
    """A fake `triton_python_backend_utils` that runs the other models with onnxruntime."""
    engines, calls = {}, []

    class Request:
        def __init__(self, model_name, requested_output_names, inputs):
            self.model, self.wanted, self.inputs = model_name, requested_output_names, inputs

        def exec(self):
            settings = config(repository / self.model)
            kind = schema().DataType
            feeds = {}
            for given, known in zip(self.inputs, settings.input, strict=True):
                assert given.name == known.name
                assert given.array.dtype == NUMPY[kind.Name(known.data_type)]
                shape = given.array.shape[1:] if settings.max_batch_size else given.array.shape
                assert len(shape) == len(known.dims)
                fits = zip(shape, known.dims, strict=True)
                assert all(wanted in (-1, size) for size, wanted in fits)
                if settings.max_batch_size and len(given.array) > settings.max_batch_size:
                    return FakeResponse(error=FakeError("batch too large"))
                squeezed = known.HasField("reshape")
                feeds[given.name] = given.array[:, 0] if squeezed else given.array
            calls.append((self.model, len(self.inputs[0].array)))
            if self.model not in engines:
                engines[self.model] = OrtEngine(repository / self.model / "1" / "model.onnx")
            outputs = engines[self.model].run(feeds)
            return FakeResponse(FakeTensor(name, outputs[name]) for name in self.wanted)

    module = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceRequest = FakeTensor, Request
    module.InferenceResponse = lambda tensors=(), error=None: FakeResponse(tensors, error)
    module.TritonError = FakeError
    module.get_output_tensor_by_name = lambda response, name: response.tensors[name]
    module.get_input_tensor_by_name = lambda request, name: request.get(name)
    module.calls = calls
    return module


def served(repository, monkeypatch):
    """The pipeline's model, loaded from the repository like in the server."""
    utils = fake_backend(repository)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    spec = importlib.util.spec_from_file_location("model", repository / "pipeline/1/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({"model_repository": str(repository / "pipeline"), "model_version": "1"})
    return model, utils


class FakeRequest(dict):
    """Inputs by name; cancelled after `patience` calls of `is_cancelled`."""

    patience = 10**9

    def is_cancelled(self):
        self.patience -= 1
        return self.patience < 0


def request(**values):
    return FakeRequest({name: FakeTensor(name, np.array(value)) for name, value in values.items()})


def expected(path, count, *, steps, seed):
    """The images of `trtq generate`, uint8[B,H,W,C]."""
    source = open_any(path)
    images = draw(source, conditioning_for(source, count), steps=steps, seed=seed, batch=count)
    return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def repository(digits_onnx, tmp_path_factory):
    out = tmp_path_factory.mktemp("triton") / "repository"
    result = package_triton(digits_onnx, out)
    assert set(result["models"]) == {"denoiser", "pipeline"}
    assert result["notes"] == []
    return out


def test_configurations_follow_tritons_schema(repository):
    denoiser = config(repository / "denoiser")
    assert (denoiser.backend, denoiser.max_batch_size) == ("onnxruntime", 16)
    assert [(tensor.name, list(tensor.dims)) for tensor in denoiser.input] == [
        ("sample", [1, 8, 8]),
        ("timestep", [1]),
        ("class_labels", [1]),
    ]
    assert [tensor.HasField("reshape") for tensor in denoiser.input] == [False, True, True]
    assert denoiser.HasField("dynamic_batching")
    pipeline = config(repository / "pipeline")
    assert (pipeline.backend, pipeline.max_batch_size) == ("python", 0)
    assert [tensor.name for tensor in pipeline.input] == [
        "class_label",
        "seed",
        "steps",
        "guidance",
    ]
    assert [tensor.optional for tensor in pipeline.input] == [False, True, True, True]


def test_the_pipelines_model_imports_a_versioned_name(repository):
    lines = (repository / "pipeline/1/model.py").read_text().splitlines()
    assert lines[1:] == ["", "from trtq.serve.triton.v1 import TritonPythonModel"]


def test_every_file_has_its_checksum(repository):
    lines = (repository / CHECKSUMS_NAME).read_text().splitlines()
    listed = dict(reversed(line.split("  ")) for line in lines)
    files = {
        path.relative_to(repository).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in repository.rglob("*")
        if path.is_file() and path.name != CHECKSUMS_NAME
    }
    assert listed == files


def test_the_manifest_of_the_artefact_is_packaged(repository, digits_onnx):
    record = json.loads((repository / PARTS / "artefact.json").read_text())
    manifest = open_folder(digits_onnx).manifest
    assert record["files"] == manifest.files
    assert record["timesteps"] == manifest.timesteps


def test_the_packaged_pipeline_draws_the_images_of_generate(repository, digits_onnx, monkeypatch):
    model, utils = served(repository, monkeypatch)
    (response,) = model.execute([request(class_label=[0, 1, 2, 3], seed=[5])])
    assert not response.has_error()
    images = response.tensors["images"].array
    assert (images.shape, images.dtype) == ((4, 8, 8, 1), np.uint8)
    np.testing.assert_array_equal(images, expected(digits_onnx, 4, steps=4, seed=5))
    assert utils.calls == [("denoiser", 4)] * 4


def test_more_images_than_a_batch_are_drawn_in_several_batches(repository, monkeypatch):
    model, utils = served(repository, monkeypatch)
    (response,) = model.execute([request(class_label=list(range(10)), steps=[2])])
    assert response.tensors["images"].array.shape == (10, 8, 8, 1)
    assert utils.calls == [("denoiser", 8)] * 2 + [("denoiser", 2)] * 2


def test_an_invalid_request_gets_its_own_error(repository, monkeypatch):
    model, _ = served(repository, monkeypatch)
    good = request(class_label=[1])
    bad = {
        "class labels must lie in 0 .. 9": request(class_label=[11]),
        "steps=0 is out of range": request(class_label=[1], steps=[0]),
        "the seed must be 0 or more": request(class_label=[1], seed=[-1]),
        "guidance must be a number of 0 or more": request(class_label=[1], guidance=[np.nan]),
        "guidance must be a number of 0 or more, got -1": request(class_label=[1], guidance=[-1.0]),
        "1 .. 100 images; 'class_label' has 0": request(class_label=np.zeros(0, np.int64)),
        "1 .. 100 images; 'class_label' has 101": request(class_label=np.ones(101, np.int64)),
        "the request has no input 'class_label'": request(seed=[1]),
    }
    first, *others = model.execute([good, *bad.values()])
    assert not first.has_error()
    for message, response in zip(bad, others, strict=True):
        assert message in response.error().message()
        assert response.error().code == FakeError.INVALID_ARG


def test_a_cancelled_request_stops_between_two_steps(repository, monkeypatch):
    model, utils = served(repository, monkeypatch)
    gone = request(class_label=[1], steps=[9])
    gone.patience = 3
    (response,) = model.execute([gone])
    assert response.error().code == FakeError.CANCELLED
    assert utils.calls == [("denoiser", 1)] * 3
    (response,) = model.execute([request(class_label=[1], steps=[2])])
    assert not response.has_error()


def test_an_error_of_the_denoiser_reaches_the_client(repository, monkeypatch):
    model, utils = served(repository, monkeypatch)
    broken = FakeResponse(error=FakeError("out of memory"))
    monkeypatch.setattr(utils.InferenceRequest, "exec", lambda self: broken)
    (response,) = model.execute([request(class_label=[1])])
    assert response.error().message() == "denoiser: out of memory"
    assert response.error().code == FakeError.INTERNAL


def test_a_server_whose_arrays_have_wrong_strides_is_refused(monkeypatch):
    utils = types.SimpleNamespace(Tensor=FakeTensor)
    triton_model._check_strings(utils)
    monkeypatch.setattr(FakeTensor, "as_numpy", lambda self: self.array[[0, 0]])
    with pytest.raises(ServerError, match=r"cannot read prompts with NumPy .* 'numpy<2'"):
        triton_model._check_strings(utils)


@pytest.mark.slow
def test_a_text_pipeline_is_served_whole(tmp_path, monkeypatch):
    onnx, out = tmp_path / "onnx", tmp_path / "repository"
    export("shapes", onnx)
    models = package_triton(onnx, out)["models"]
    assert set(models) == {"denoiser", "text_encoder", "vae_decoder", "vae_encoder", "pipeline"}
    for name in models:
        assert config(out / name).name == name
    model, utils = served(out, monkeypatch)
    prompts = open_any(onnx).prompts.calibration[:2]
    wanted = {"prompt": [text.encode() for text in prompts], "steps": [2], "seed": [3]}
    (response,) = model.execute([request(**wanted)])
    assert not response.has_error(), response.error().message()
    images = response.tensors["images"].array
    np.testing.assert_array_equal(images, expected(onnx, 2, steps=2, seed=3))
    assert ("denoiser", 4) in utils.calls  # Both halves of the guidance.
    (response,) = model.execute([request(prompt=[b"\xff"])])
    assert "a prompt is not UTF-8" in response.error().message()
    assert {"text_encoder", "vae_decoder"} <= {name for name, _ in utils.calls}


def engine_folder(digits_onnx, out, backend="tensorrt-rtx", architectures=("sm86", "sm120")):
    """Create a folder like that of `trtq build`, with a plan that cannot run."""
    manifest = open_folder(digits_onnx).manifest
    (out / "unet").mkdir(parents=True)
    (out / "unet" / "model.engine").write_bytes(b"plan")
    profile = {"sample": [[1, 1, 8, 8], [1, 1, 8, 8], [6, 1, 8, 8]]}
    profile |= {"timestep": [[1], [1], [6]], "class_labels": [[1], [1], [6]]}
    options = manifest.options.to_json() | {
        "backend": backend,
        "architectures": list(architectures),
    }
    options["profiles"] = {"unet": profile}
    update = {"kind": "engine", "options": options, "source": made_from(digits_onnx, manifest)}
    write_manifest(out, Manifest(**(manifest.model_dump() | {"files": {}}) | update))
    return out


def test_engines_are_named_by_compute_capability(digits_onnx, tmp_path):
    engine = engine_folder(digits_onnx, tmp_path / "engine")
    with pytest.raises(ArtefactError, match="give its path with --onnx"):
        package_triton(engine, tmp_path / "repository")
    result = package_triton(engine, tmp_path / "repository", onnx=digits_onnx)
    settings = config(tmp_path / "repository" / "denoiser")
    assert (settings.platform, settings.max_batch_size) == ("tensorrt_plan", 6)
    assert dict(settings.cc_model_filenames) == {"8.6": "model.plan", "12.0": "model.plan"}
    assert (tmp_path / "repository/denoiser/1/model.plan").read_bytes() == b"plan"
    assert not list((tmp_path / "repository").rglob("*.onnx*"))
    assert "TensorRT-RTX" in result["notes"][0]


def test_an_engine_for_the_current_gpu_is_the_default(digits_onnx, tmp_path):
    engine = engine_folder(digits_onnx, tmp_path / "engine", "tensorrt", ("current",))
    result = package_triton(engine, tmp_path / "repository", onnx=digits_onnx)
    settings = config(tmp_path / "repository" / "denoiser")
    assert settings.default_model_filename == "model.plan"
    assert not settings.cc_model_filenames
    assert result["notes"] == []


def test_an_onnx_folder_of_other_engines_is_refused(digits_onnx, tmp_path):
    engine = engine_folder(digits_onnx, tmp_path / "engine")
    other = tmp_path / "onnx"
    shutil.copytree(digits_onnx, other)
    text = (other / "manifest.json").read_text().replace('"seed": 0', '"seed": 1')
    (other / "manifest.json").write_text(text)
    with pytest.raises(ArtefactError, match="is missing or has changed"):
        package_triton(engine, tmp_path / "repository", onnx=other)


def test_errors_of_packaging_name_a_remedy(digits_run, digits_onnx, tmp_path):
    out = tmp_path / "repository"
    with pytest.raises(UsageError, match="is a run, which no server loads; export it first"):
        package_triton(digits_run, out)
    with pytest.raises(UsageError, match="is no artefact of trtq"):
        package_triton(tmp_path / "nothing", out)
    with pytest.raises(UsageError, match="inside each other"):
        package_triton(digits_onnx, Path(digits_onnx) / "repository")
    assert not out.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="not a repository that trtq made"):
        package_triton(digits_onnx, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_the_command_writes_and_overwrites_only_with_its_option(digits_onnx, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["package", "triton", *map(str, arguments)])

    out = tmp_path / "repository"
    done = run(digits_onnx, "-o", out, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["models"]["denoiser"]["backend"] == "onnxruntime"
    again = run(digits_onnx, "-o", out)
    assert again.exit_code == 2
    assert "pass --overwrite" in again.stderr
    assert run(digits_onnx, "-o", out, "--overwrite").exit_code == 0
    assert run(tmp_path / "none", "-o", tmp_path / "x").exit_code == 2
    assert "Example: trtq package triton" in run("--help").stdout
