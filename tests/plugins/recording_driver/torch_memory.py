"""torch's tensors in the memory of the recording driver, as with torch for CUDA."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trtq.plugins.device import Gpu

__all__ = ["DeviceMemory"]


class DeviceMemory(TorchFunctionMode):
    """Inside, every new tensor of torch is in memory of the driver.

    The tensors are tensors of torch's CPU; torch's current stream is the stream of `gpu`.

    Args:
        gpu: memory and stream.
    """

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.mine: set[int] = set()
        cuda: Any = torch.cuda
        cuda.device = lambda _: nullcontext()
        cuda.current_device = lambda: 0
        cuda.current_stream = lambda: SimpleNamespace(cuda_stream=gpu.stream)

    def placed(self, tensor: Tensor) -> Tensor:
        """A copy in the driver's memory with the same strides; a tensor that is there stays."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.mine or not tensor.numel():
            return tensor
        address = self.gpu.allocate(storage.nbytes())
        ctypes.memmove(address, storage.data_ptr(), storage.nbytes())
        memory = (ctypes.c_ubyte * storage.nbytes()).from_address(address)
        flat = torch.frombuffer(memory, dtype=tensor.dtype)
        self.mine.add(address)
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return self.placed(result) if isinstance(result, Tensor) else result
