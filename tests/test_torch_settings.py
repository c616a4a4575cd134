"""Work under settings of torch and numpy that applications change for their own models."""

from contextlib import contextmanager
from threading import Thread

import numpy as np
import pytest
import torch

import trtq
from tests.families import pipelines
from trtq.artefact.files import sha256
from trtq.torch_settings import own_settings

RECIPE = {
    "method": "minmax",
    "bits": "w8a8",
    "steps": 2,
    "calibration": {"images": 2, "samples_per_step": 64},
}
FILE = "quantized.safetensors"


@contextmanager
def _default(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "bfloat16 by default": lambda: _default(torch.bfloat16),
    "float64 by default": lambda: _default(torch.float64),
    "meta device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "numpy raises": lambda: np.errstate(all="raise"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings") / "model"
    pipelines.build("ldm_vq").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(model):
    trtq.quantize(model, RECIPE, model.parent / "plain")
    return sha256(model.parent / "plain" / FILE)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_does_not_depend_on_the_settings_of_its_caller(name, model, weights, tmp_path):
    with SETTINGS[name]():
        trtq.quantize(model, RECIPE, tmp_path / "run")
        pipeline = trtq.load(tmp_path / "run")
    assert sha256(tmp_path / "run" / FILE) == weights
    assert all(part.device.type == "cpu" for part in pipeline.vqvae.parameters())
    assert all(part.dtype == torch.float32 for part in pipeline.vqvae.parameters())


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_of_the_caller_come_back(name):
    def settings():
        return (
            torch.is_autocast_enabled("cpu"),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            np.geterr(),
            torch.get_rng_state().tolist(),
        )

    plain = settings()
    with SETTINGS[name]():
        before = settings()
        with own_settings():
            assert settings() == plain
            torch.nn.Linear(1, 1, device="cpu")
        assert settings() == before != plain


def test_runs_from_several_threads_do_not_disturb_each_other(model, weights, tmp_path):
    def quantize(index):
        trtq.quantize(model, RECIPE, tmp_path / str(index))

    state = torch.get_rng_state()
    threads = [Thread(target=quantize, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sha256(tmp_path / str(index) / FILE) for index in range(3)] == [weights] * 3
    assert torch.equal(torch.get_rng_state(), state)
