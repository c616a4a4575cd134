"""Tiny models for servers: a formula, and a real low-bit graph."""

import asyncio
import contextlib
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from tests.conftest import shared, tiny_pipeline
from tests.serve.recorded import Recorded, quantized
from trtq.exporter.export import export
from trtq.runs.quantize import quantize
from trtq.serve.models.base import ImageModel, InitialState, Inputs, ModelInfo, Sizes, class_label
from trtq.serve.models.solver import Ddim

DDIM = {"_class_name": "DDIMScheduler", "steps_offset": 1, "clip_sample": True}


class ToyModel(ImageModel):
    """Predicts noise by a formula, counts its calls, and can wait or fail on demand."""

    def __init__(self, name="toy"):
        classes = ("zero", "one", "two")
        self.info = ModelInfo(name, "class", classes, (4, 4), 5, 1000, 1.0, True, "cpu", None)
        self._ddim = Ddim(DDIM)
        self.calls = []
        self.go = threading.Event()
        self.go.set()
        self.fail = None
        self.decoded = 0
        self.seconds = 0.0

    def inputs(self, request):
        label = np.array([class_label(self.info, request.prompt)])
        return Inputs({"class_labels": label}, {"class_labels": np.array([3])})

    def starts(self, request):
        shape = (1, *(request.size or self.info.image_size))
        inputs = self.inputs(request)
        solver = self._ddim.solver(request.steps)
        states = []
        for index in range(request.count):
            noise = np.random.default_rng([request.seed, index]).standard_normal((1, *shape))
            states.append(InitialState(noise.astype(np.float32), inputs, solver, request.guidance))
        return states

    def denoise(self, x, timestep, conditional, shared):
        assert self.go.wait(10)
        self.calls.append(timestep.tolist())
        if self.seconds:
            time.sleep(self.seconds)
        if self.fail is not None:
            raise self.fail
        label = conditional["class_labels"].reshape(-1, 1, 1, 1)
        return np.tanh(x * (label + 1) + timestep.reshape(-1, 1, 1, 1) / 500).astype(np.float32)

    def decode(self, x):
        self.decoded += 1
        return ((x[0, 0].clip(-1, 1) + 1) * 127.5).astype(np.uint8)


class TextToy(ToyModel):
    """A text model of several sizes; its images depend on the lengths of both prompts."""

    def __init__(self, name="text"):
        super().__init__(name)
        sizes = Sizes((4, 4), (8, 12), 4)
        self.info = replace(
            self.info, kind="text", classes=(), sizes=sizes, takes_negative_prompt=True
        )

    def inputs(self, request):
        lengths = len(request.prompt) % 3, len(request.negative_prompt or "???") % 5
        conditional, without = ({"class_labels": np.array([length])} for length in lengths)
        return Inputs(conditional, without)


@pytest.fixture
def toy():
    model = ToyModel()
    yield model
    model.go.set()


@pytest.fixture(scope="session")
def served_onnx(tmp_path_factory):
    """An ONNX folder of the tiny class-conditional model at W4A8; three classes, four steps."""

    def make(folder):
        recipe = {"method": "minmax", "bits": "w4a8", "steps": 4, "calibration": {"images": 8}}
        quantize(tiny_pipeline(), recipe, folder / "run")
        export(folder / "run", folder / "onnx")

    return shared(tmp_path_factory, "served", make) / "onnx"


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """The three recorded pipelines as runs, by name."""
    names = ("text", "img2img", "inpaint")
    folder = shared(tmp_path_factory, "recorded", lambda folder: quantized(folder, *names))
    return {name: Recorded(folder / name, name) for name in names}


@contextlib.contextmanager
def running(app, port=0, **options):
    """Run an ASGI application on a loopback port, in a thread, and yield its address."""
    import uvicorn

    config = uvicorn.Config(app, port=port, log_config=None, lifespan="off", ws="none", **options)
    config.timeout_graceful_shutdown = 2
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
