"""Test a packaged repository in a real Triton server.

The server comes from NVIDIA's `nvidia-pytriton`, unpacked into a separate folder (its NumPy is older
than ours): `pip install --no-deps --target DIR nvidia-pytriton==0.7.0 "numpy<2"`, then
`TRTQ_PYTRITON=DIR`; `pip install geventhttpclient grpcio` installs the clients' dependencies. The
server has only the Python backend, so `GRAPH` below serves the graphs' models, with the packaged names,
inputs, outputs and batching; the pipeline's model is served as packaged.
"""

import contextlib
import http.client
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from trtq.exporter.export import export
from trtq.pipelines.draw import Conditioning, draw
from trtq.pipelines.open import open_any
from trtq.serve.triton.package import package_triton


def installed():
    """The folder that holds `pytriton/` with its server, or None."""
    spec = importlib.util.find_spec("pytriton")
    given = os.environ.get("TRTQ_PYTRITON") or (spec and Path(spec.origin).parents[1])
    return given and Path(given)


def lacking():
    """The reason why these tests cannot run here; empty if they can."""
    if FOLDER is None:
        return "no Triton server: set TRTQ_PYTRITON (see the head of this file)"
    if not STUB.is_dir():
        return f"{FOLDER} holds no Triton server for this Python"
    try:
        importlib.import_module("tritonclient.grpc")
        importlib.import_module("tritonclient.http")
    except (ImportError, RuntimeError) as err:
        return f"tritonclient cannot talk: {err}"
    return ""


FOLDER = installed()
SERVER = (FOLDER or Path()) / "pytriton" / "tritonserver"
STUB = SERVER / "python_backend_stubs" / "{}.{}".format(*sys.version_info)
LACKING = lacking()
CLIENTS = (
    {}
    if LACKING
    else {kind: importlib.import_module(f"tritonclient.{kind}") for kind in ("http", "grpc")}
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(LACKING), reason=LACKING)]
ROOT = Path(__file__).parents[3]
START_S = 300
GRAPH = """
import pathlib
import onnxruntime
import torch
import triton_python_backend_utils as utils

class TritonPythonModel:
    def initialize(self, args):
        file = pathlib.Path(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        inputs = {
            tensor.name(): torch.from_dlpack(tensor.to_dlpack()).numpy() for tensor in request.inputs()
        }
        names = sorted(request.requested_output_names())
        outputs = zip(names, self.session.run(names, inputs))
        tensors = [utils.Tensor.from_dlpack(name, torch.from_numpy(array)) for name, array in outputs]
        return utils.InferenceResponse(tensors)
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def runnable(repository, out):
    """Create a copy of a repository whose graphs run on the Python backend."""
    shutil.copytree(repository, out)
    for config in out.glob("*/config.pbtxt"):
        text = config.read_text()
        if 'backend: "onnxruntime"\n' in text:
            text = text.replace('"onnxruntime"', '"python"')
            config.write_text(re.sub("default_model_filename.*\n", "", text))
            (config.parent / "1" / "model.py").write_text(GRAPH)
    return out


class Server:
    """A running server.

    Args:
        repository: model repository to serve.
        place: folder for the server's files.
        old_numpy: whether the server's Python imports NumPy from `FOLDER`.
        more: further arguments of the server.
    """

    def __init__(self, repository, place, *more, old_numpy=False):
        backend = place / "backends" / "python"
        shutil.copytree(SERVER / "backends" / "python", backend)
        shutil.copytree(STUB, backend, dirs_exist_ok=True)
        (backend / "triton_python_backend_stub").chmod(0o755)
        binary = SERVER / "bin" / "tritonserver"
        binary.chmod(0o755)
        # The backend's stub ignores PYTHONPATH; it uses the packages of the first `python3` in PATH.
        venv.create(place / "venv")
        (packages,) = (place / "venv").glob("lib/*/site-packages")
        seen = [FOLDER] * old_numpy + [ROOT, sysconfig.get_path("purelib")]
        (packages / "seen.pth").write_text("".join(f"{path}\n" for path in seen))
        libraries = (FOLDER / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR"))
        environment = os.environ | {
            "PATH": f"{place / 'venv' / 'bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "OMP_NUM_THREADS": "1",
        }
        self.ports = {"http": free_port(), "grpc": free_port()}
        command = [binary, f"--model-repository={repository}", "--allow-metrics=false", *more]
        command += [f"--backend-directory={backend.parent}"]
        for kind, port in self.ports.items():
            command += [f"--{kind}-address=127.0.0.1", f"--{kind}-port={port}"]
        self.log_file = place / "log"
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def log(self):
        return self.log_file.read_text(errors="replace")

    def wait(self):
        """Wait until all models are ready."""
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError), self.connection() as connection:
                connection.request("GET", "/v2/health/ready")
                if connection.getresponse().status == 200:
                    return self
            time.sleep(0.5)
        self.stop()
        raise AssertionError(f"the server is not ready:\n{self.log[-3000:]}")

    def connection(self):
        return contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.ports["http"]))

    def client(self, kind):
        more = {"network_timeout": START_S} if kind == "http" else {}
        return CLIENTS[kind].InferenceServerClient(f"127.0.0.1:{self.ports[kind]}", **more)

    def statistics(self, model):
        with self.client("http") as client:
            return client.get_inference_statistics(model)["model_stats"][0]

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def inputs(kind, wanted):
    types = {"class_label": "INT64", "seed": "INT64", "steps": "INT32", "guidance": "FP32"}
    tensors = []
    for name, value in wanted.items():
        array = np.array(
            value,
            {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32}.get(types.get(name), object),
        )
        tensor = CLIENTS[kind].InferInput(name, list(array.shape), types.get(name, "BYTES"))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


def ask(server, kind, wanted):
    with server.client(kind) as client:
        return client.infer("pipeline", inputs(kind, wanted)).as_numpy("images")


def expected(source, wanted):
    """The images of `trtq generate`, uint8[B,H,W,C]."""
    prompts, labels = wanted.get("prompt"), wanted.get("class_label")
    if prompts is not None:
        conditioning = Conditioning(len(prompts), prompts=[prompt.decode() for prompt in prompts])
    else:
        conditioning = Conditioning(len(labels), classes=torch.tensor(labels))
    (steps,), (seed,) = wanted["steps"], wanted["seed"]
    guidance = wanted.get("guidance", [None])[0]
    images = draw(source, conditioning, steps=steps, seed=seed, guidance=guidance, batch=8)
    return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def digits(digits_onnx, tmp_path_factory):
    place = tmp_path_factory.mktemp("server")
    package_triton(digits_onnx, place / "packaged")
    repository = runnable(place / "packaged", place / "repository")
    more = ("--model-control-mode=explicit", "--load-model=*")
    server = Server(repository, place, *more).wait()
    yield server
    server.stop()


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_the_server_draws_the_images_of_generate(digits, digits_onnx, kind):
    source = open_any(digits_onnx)
    for wanted in (
        {"class_label": [0, 1, 2, 3], "seed": [5], "steps": [4]},
        {"class_label": list(range(10)), "seed": [3], "steps": [3]},
        {"class_label": [3, 7], "seed": [2], "steps": [5], "guidance": [3.0]},
    ):
        images = ask(digits, kind, wanted)
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images, expected(source, wanted))


def test_requests_at_different_steps_share_calls_of_the_denoiser(digits, digits_onnx):
    wanted = [{"class_label": [i % 10], "seed": [i], "steps": [4 + 3 * (i % 5)]} for i in range(24)]
    before = digits.statistics("denoiser")
    with ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(lambda i: ask(digits, ("http", "grpc")[i % 2], wanted[i]), range(24))
        )
    after = digits.statistics("denoiser")
    source = open_any(digits_onnx)
    for images, request in zip(results, wanted, strict=True):
        np.testing.assert_array_equal(images, expected(source, request))
    items, calls = (after[key] - before[key] for key in ("inference_count", "execution_count"))
    assert items == sum(request["steps"][0] for request in wanted)
    assert calls < items
    print(f"{items} items of one image in {calls} calls")  # noqa: T201


BAD = {
    "class labels must lie in 0 .. 9": {"class_label": [11]},
    "steps=0 is out of range": {"class_label": [1], "steps": [0]},
    "steps=1000 is out of range": {"class_label": [1], "steps": [1000]},
    "guidance must be a number of 0 or more": {"class_label": [1], "guidance": [np.nan]},
    "the seed must be 0 or more": {"class_label": [1], "seed": [-1]},
    "has 0": {"class_label": []},
    "has 101": {"class_label": [1] * 101},
    "the request has no input 'class_label'": {"seed": [1]},
    "unexpected shape for input 'class_label'": {"class_label": [[1]]},
    "unexpected shape for input 'steps'": {"class_label": [1], "steps": [1, 2]},
    "unexpected inference input 'prompt'": {"class_label": [1], "prompt": [b"3"]},
}


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_an_invalid_request_gets_the_reason_and_the_server_keeps_running(digits, kind):
    from tritonclient.utils import InferenceServerException

    for message, wanted in BAD.items():
        with pytest.raises(InferenceServerException, match=re.escape(message)) as caught:
            ask(digits, kind, wanted)
        assert caught.value.status() in {"400", "StatusCode.INVALID_ARGUMENT"}
    assert ask(digits, kind, {"class_label": [1], "steps": [2]}).shape == (1, 8, 8, 1)


def test_a_cancelled_request_leaves_the_denoiser_at_once(digits):
    before, ended = digits.statistics("denoiser")["execution_count"], threading.Event()
    wanted = {"class_label": [1], "steps": [999]}
    with digits.client("grpc") as client:
        call = client.async_infer(
            "pipeline", inputs("grpc", wanted), lambda result, error: ended.set()
        )
        while digits.statistics("denoiser")["execution_count"] < before + 3:
            time.sleep(0.05)
        call.cancel()
        assert ended.wait(30)
    while True:  # A step in progress may end; then the counter must not move.
        seen = digits.statistics("denoiser")["execution_count"]
        time.sleep(1)
        if digits.statistics("denoiser")["execution_count"] == seen:
            break
    assert seen - before < 999
    assert ask(digits, "http", {"class_label": [1], "steps": [2]}).shape == (1, 8, 8, 1)


def test_a_denoiser_that_is_not_loaded_is_named(digits):
    from tritonclient.utils import InferenceServerException

    wanted = {"class_label": [1], "steps": [2]}
    with digits.client("http") as client:
        client.unload_model("denoiser")
        while client.is_model_ready("denoiser"):
            time.sleep(0.1)
        with pytest.raises(InferenceServerException, match=r"denoiser: .*not ready"):
            ask(digits, "grpc", wanted)
        client.load_model("denoiser")
    assert ask(digits, "grpc", wanted).shape == (1, 8, 8, 1)


@pytest.mark.parametrize(("platform", "backend"), [
    ('backend: "onnxruntime"', "onnxruntime"),
    ('platform: "tensorrt_plan"\ncc_model_filenames { key: "8.6" value: "model.plan" }', "tensorrt"),
], ids=["onnxruntime", "tensorrt"])  # fmt: skip
def test_packaged_graphs_lack_only_their_backend_here(digits_onnx, tmp_path, platform, backend):
    package_triton(digits_onnx, tmp_path / "packaged")
    config = tmp_path / "packaged" / "denoiser" / "config.pbtxt"
    config.write_text(config.read_text().replace('backend: "onnxruntime"', platform))
    more = ("--model-control-mode=explicit", "--load-model=denoiser")
    server = Server(tmp_path / "packaged", tmp_path, *more)
    assert server.process.wait(START_S) != 0
    assert f"unable to find backend library for backend '{backend}'" in server.log


@pytest.fixture(scope="module")
def shapes_onnx(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes") / "onnx"
    export("shapes", out)
    return out


def test_a_text_pipeline_is_served_whole(tmp_path, shapes_onnx):
    if not (FOLDER / "numpy").is_dir():
        pytest.skip("this server reads prompts only with NumPy 1, which the folder lacks")
    package_triton(shapes_onnx, tmp_path / "packaged")
    repository = runnable(tmp_path / "packaged", tmp_path / "repository")
    server = Server(repository, tmp_path, old_numpy=True).wait()
    try:
        wanted = {"prompt": [b"a red circle", b"a blue cross"], "seed": [4], "steps": [3]}
        source = open_any(shapes_onnx)
        for kind in ("http", "grpc"):
            np.testing.assert_array_equal(ask(server, kind, wanted), expected(source, wanted))
        from tritonclient.utils import InferenceServerException

        for message, bad in {
            "is not UTF-8": {"prompt": [b"\xff"]},
            "the request has no input 'prompt'": {"seed": [1]},
        }.items():
            with pytest.raises(InferenceServerException, match=message):
                ask(server, "grpc", bad)
        with server.client("http") as client:
            names = {entry["name"] for entry in client.get_model_repository_index()}
        assert names == {entry.parent.name for entry in repository.glob("*/config.pbtxt")}
    finally:
        server.stop()


def test_a_server_that_cannot_read_prompts_reports_it_at_the_start(tmp_path, shapes_onnx):
    if int(np.__version__.split(".")[0]) < 2:
        pytest.skip("this Python has NumPy 1")
    package_triton(shapes_onnx, tmp_path / "packaged")
    more = ("--model-control-mode=explicit", "--load-model=pipeline")
    server = Server(tmp_path / "packaged", tmp_path, *more)
    assert server.process.wait(START_S) != 0
    assert "cannot read prompts with NumPy 2" in server.log
