"""The denoiser on trtq's kernels, run on a CPU: everything except the CUDA graphs."""

import pytest
import torch

import trtq
from trtq.engine.torch_gpu import GpuDenoiser
from trtq.errors import KernelError
from trtq.pipelines import open as loading
from trtq.quant.kernel_form import KernelLayer
from trtq.runs.folder import open_run


@pytest.fixture(scope="module")
def run(digits_run):
    return open_run(digits_run)


def test_the_gpu_denoiser_is_called_like_the_model_that_it_replaces(run):
    sample = torch.randn(3, *run.source().sample_shape, generator=torch.Generator().manual_seed(0))
    timestep, labels = torch.tensor([10, 400, 990]), torch.tensor([0, 3, 9])
    kernels = run.denoiser(kernels=True)
    with torch.no_grad():
        expected = kernels(sample, timestep, labels).sample
    denoiser = GpuDenoiser(kernels, "cpu", torch.float32)
    assert torch.equal(denoiser(sample, timestep, labels).sample, expected)
    assert torch.equal(
        denoiser(sample, timestep, class_labels=labels, return_dict=False)[0], expected
    )
    shared = denoiser(sample, 400, labels).sample
    assert torch.equal(shared[1], expected[1])


def test_the_pipeline_sees_the_class_of_the_replaced_model(run):
    denoiser = GpuDenoiser(run.denoiser(kernels=True), "cpu", torch.float32)
    assert run.source(denoiser).model_class == run.source().model_class == "UNet2DModel"


def test_in_half_precision_the_output_has_the_type_of_the_input(run):
    denoiser = GpuDenoiser(run.denoiser(kernels=True), "cpu")
    sample = torch.randn(1, *run.source().sample_shape)
    prediction = denoiser(sample, 400, torch.tensor([3])).sample
    assert (prediction.dtype, denoiser.dtype) == (torch.float32, torch.float32)
    assert next(denoiser.model.parameters()).dtype == torch.float16
    layers = [module for module in denoiser.modules() if isinstance(module, KernelLayer)]
    assert layers
    assert all(layer.packed.is_contiguous() for layer in layers)
    assert torch.isfinite(prediction).all()


def test_full_memory_raises_one_error(run, monkeypatch):
    denoiser = GpuDenoiser(run.denoiser(kernels=True), "cpu", torch.float32)
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it")
    monkeypatch.setattr(denoiser, "_call", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(
        KernelError, match=r"memory is full: CUDA out of memory.*; take a smaller"
    ) as e:
        denoiser(torch.randn(1, *run.source().sample_shape), 400, torch.tensor([3]))
    assert "\n" not in str(e.value)


def test_a_gpu_that_torch_cannot_use_is_reported(digits_run, monkeypatch, caplog):
    """An example is a torch build for CPUs on a machine with a GPU, which is far slower."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading, "driver_cuda", lambda: None)
    trtq.load(digits_run, provider="torch")
    assert caplog.text == ""
    monkeypatch.setattr(loading, "driver_cuda", lambda: (12, 4))
    trtq.load(digits_run)
    assert caplog.text == ""
    trtq.load(digits_run, provider="torch")
    assert "on the CPU: there is an NVIDIA driver, 550 (CUDA 12.4), but torch" in caplog.text


def test_the_provider_torch_uses_the_gpu_if_there_is_one(digits_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "GpuDenoiser", lambda q: GpuDenoiser(q, "cpu", torch.float32))
    assert isinstance(trtq.load(digits_run, provider="torch").unet, GpuDenoiser)
    assert not isinstance(trtq.load(digits_run).unet, GpuDenoiser)
