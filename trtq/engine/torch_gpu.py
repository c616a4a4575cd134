"""A low-bit denoiser on an NVIDIA GPU in torch, in half precision, with a CUDA graph per shape."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trtq.diffusion.families import family_named
from trtq.errors import KernelError
from trtq.quant.denoiser import QuantizedDenoiser
from trtq.quant.stand_in import StandIn
from trtq.quant.timestep import step_scope

__all__ = ["GpuDenoiser"]

_WARM_UP = 2
"""Number of calls before the capture, which load kernels and let libraries choose their algorithms."""


@contextmanager
def _kernel_error_if_full() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as err:
        first = str(err).splitlines()[0]
        raise KernelError(
            f"the GPU's memory is full: {first}; take a smaller batch or size"
        ) from err


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Mapping[str, Tensor]
    step: Tensor
    output: Tensor


class GpuDenoiser(StandIn):
    """Replaces the UNet or transformer in a pipeline of diffusers.

    Only the denoiser is on the GPU. The pipeline sees a module on the CPU in float32 that takes and
    returns tensors there. The step is looked up on the host, so no call waits for the GPU. The first
    calls of a shape record a CUDA graph, and later calls replay it.

    Args:
        quantized: a denoiser of `KernelLayer`s, which is moved and cast in place.
        device: the GPU; a CPU computes the same integers in torch, without CUDA graphs.
        dtype: floating-point type of the computation.
    """

    def __init__(
        self,
        quantized: QuantizedDenoiser,
        device: torch.device | str = "cuda",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        with _kernel_error_if_full():
            self.model = quantized.denoiser.to(device=device, dtype=dtype)
        if all(tensor.ndim != 5 for tensor in (*self.model.parameters(), *self.model.buffers())):
            # torch refuses the format for weights of 3-D convolutions.
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model_class = type(self.model)
        self.table = quantized.table
        self.config = quantized.config
        self._device, self._dtype = torch.device(device), dtype
        # A pipeline reads these attributes; its other components and latents stay on the CPU in float32.
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._lock = threading.Lock()
        self.family = family_named(type(self.model).__name__)
        self._names = list(inspect.signature(self.model.forward).parameters)
        self._captured: dict[tuple[Any, ...], _Captured] = {}

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments of the diffusers model -> `(prediction,)`, or an output with `.sample`.

        Raises:
            KernelError: a kernel cannot be launched, or the GPU's memory is full.
        """
        from diffusers.models.unets.unet_2d import UNet2DOutput

        given = dict(zip(self._names, args, strict=False)) | kwargs
        return_dict = given.pop("return_dict", True)
        flat = {
            name: torch.as_tensor(value)
            for name, value in self.family.flatten(given).items()
            if value is not None
        }
        sample = flat[self.family.sample]
        step = self.table.index(flat["timestep"].cpu()).expand(len(sample))
        inputs = {name: self._on_device(name, value) for name, value in flat.items()}
        with self._lock, _kernel_error_if_full():
            prediction = self._predict(inputs, step)
        prediction = prediction.to(sample.device, sample.dtype)
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)

    def _on_device(self, name: str, value: Tensor) -> Tensor:
        half = value.is_floating_point() and name != "timestep"
        return value.to(self._device, self._dtype if half else value.dtype)

    def _call(self, inputs: Mapping[str, Tensor], step: Tensor) -> Tensor:
        with step_scope(step):
            output: Tensor = self.model(**self.family.nest(dict(inputs)), return_dict=False)[0]
        return output

    def _predict(self, inputs: dict[str, Tensor], step: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return self._call(inputs, step)
        with torch.cuda.device(self._device):
            return self._replay(inputs, step)

    def _replay(self, inputs: dict[str, Tensor], step: Tensor) -> Tensor:
        key = tuple((name, tuple(v.shape), v.dtype) for name, v in sorted(inputs.items()))
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(inputs, step.to(self._device))
        for name, value in inputs.items():
            captured.inputs[name].copy_(value)
        captured.step.copy_(step)
        captured.graph.replay()
        return captured.output.clone()

    def _capture(self, inputs: Mapping[str, Tensor], step: Tensor) -> _Captured:
        copies = {name: value.clone() for name, value in inputs.items()}
        step = step.contiguous().clone()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._call(copies, step)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self._call(copies, step)
        return _Captured(graph, copies, step, output)
