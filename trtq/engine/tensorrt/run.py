"""Running engines of TensorRT and TensorRT-RTX, with arrays as inputs and outputs."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trtq.engine.base import NO_METADATA, Engine, TensorSpec
from trtq.engine.tensorrt.backends import BACKENDS, Backend
from trtq.engine.tensorrt.log import collecting_logger
from trtq.engine.tensorrt.runtime_cache import RuntimeCache
from trtq.errors import ArtefactError, KernelError, MissingDependencyError, UsageError
from trtq.plugins.device import Gpu, first_gpu
from trtq.plugins.fused.tensorrt import register
from trtq.plugins.low_bit.registry import take_failures

__all__ = ["Memory", "TensorRtEngine", "obstacle", "open_tensorrt"]

logger = logging.getLogger(__name__)

_GIB = 1 << 30


class Memory(Protocol):
    """Memory of the GPU; `trtq.plugins.device.Gpu` implements it."""

    stream: int

    def enter(self) -> None:
        """Make the GPU's context current in the calling thread."""

    def allocate(self, size: int) -> int:
        """Allocate memory of a size in bytes, and return its address."""

    def free(self, address: int) -> None:
        """Release the memory at an address."""

    def upload(self, address: int, host: Any) -> None:
        """Copy an array to an address on the device."""

    def download(self, host: Any, address: int) -> None:
        """Copy from an address on the device to an array."""

    def wait(self) -> None:
        """Wait until all operations on the GPU are done."""


def open_tensorrt(
    path: Path, provider: str, metadata: Mapping[str, str] = NO_METADATA
) -> TensorRtEngine:
    """Load an engine on the GPU of this machine.

    Args:
        path: file of the engine.
        provider: backend that built the engine.
        metadata: metadata of the graph, from the manifest.

    Returns:
        The loaded engine.

    Raises:
        MissingDependencyError: the backend or cuda-bindings is not installed.
        UsageError: there is no GPU that can run the engine.
        ArtefactError: the backend cannot load the file.
    """
    backend = BACKENDS[provider]
    if not backend.installed:
        raise MissingDependencyError(f"{provider} is not installed: {backend.install}")
    try:
        memory = Gpu()
    except KernelError as err:
        raise UsageError(
            f"engines run on an NVIDIA GPU, and none can be used here ({err}); the ONNX folder runs "
            "on any machine: trtq generate ONNX --provider openvino"
        ) from err
    return TensorRtEngine(path, backend, importlib.import_module(backend.module), memory, metadata)


def obstacle(provider: str) -> str | None:
    """Reason why engines of a backend cannot run on this machine; None if they can."""
    backend = BACKENDS[provider]
    if not backend.installed:
        return f"{provider} is not installed: {backend.install}"
    try:
        first_gpu()
    except (KernelError, MissingDependencyError) as err:
        return str(err)
    return None


class TensorRtEngine(Engine):
    """One engine with one execution context, whose buffers grow with the shapes of the calls.

    Kernels that TensorRT-RTX compiles for the GPU on first use are kept in the user's cache. A call with
    shapes that have been seen before runs as one CUDA graph.

    Args:
        path: file of the engine.
        backend: builder of the engine.
        trt: Python module of the backend.
        memory: memory of the GPU.
        metadata: metadata of the graph, from the manifest.

    Raises:
        UsageError: the backend cannot start on this machine.
        ArtefactError: the backend cannot load the file.
    """

    def __init__(
        self,
        path: Path,
        backend: Backend,
        trt: Any,
        memory: Memory,
        metadata: Mapping[str, str] = NO_METADATA,
    ) -> None:
        self._trt, self._memory = trt, memory
        self._errors: list[str] = []
        register(trt)
        self._logger = collecting_logger(trt, self._errors, [])
        try:
            self._runtime = trt.Runtime(self._logger)
        except (
            Exception
        ) as err:  # The bindings' exceptions share no base; usually a driver is missing.
            why = "; ".join(self._errors[-3:]) or str(err)
            raise UsageError(
                f"{backend.name} cannot start on this machine: {why}; `trtq doctor` shows its driver"
            ) from err
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ArtefactError(
                f"{backend.name} cannot load {path}: {self._failure()}; build it again on this machine: "
                "trtq build ONNX -o ENGINE"
            )
        self._stream_weights()
        self._cache: RuntimeCache | None = None
        self._context = self._engine.create_execution_context(*self._configured(path))
        if self._context is None:
            raise ArtefactError(f"{backend.name} cannot start {path}: {self._failure()}")
        super().__init__(backend.name, *self._specs(), metadata)
        self._buffers: dict[str, tuple[int, int]] = {}
        self._seen: set[tuple[tuple[int, ...], ...]] = set()

    def _failure(self) -> str:
        """Reason for the failure of the last call: errors of plugins, and messages of the backend."""
        return "; ".join([*take_failures(), *self._errors[-3:]]) or "it gave no reason"

    def _stream_weights(self) -> None:
        """Let an engine with weight streaming keep as many weights on the GPU as fit.

        Without a budget such an engine keeps all weights on the GPU.
        """
        streamable = getattr(self._engine, "streamable_weights_size", 0)
        if not streamable:
            return
        budget = min(int(self._engine.get_weight_streaming_automatic_budget()), streamable)
        self._engine.weight_streaming_budget_v2 = budget
        logger.info(
            "%.2f of %.2f GiB of weights stay on the GPU, the others are streamed",
            budget / _GIB,
            streamable / _GIB,
        )

    def _configured(self, path: Path) -> list[Any]:
        """Arguments of the execution context that only TensorRT-RTX supports."""
        if not hasattr(self._trt, "CudaGraphStrategy"):
            return []
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = RuntimeCache(config, path)
        return [config]

    def _specs(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        inputs: dict[str, TensorSpec] = {}
        outputs: dict[str, TensorSpec] = {}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            shape = tuple(
                f"{name}_{axis}" if size < 0 else int(size)
                for axis, size in enumerate(self._engine.get_tensor_shape(name))
            )
            dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
            given = self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            (inputs if given else outputs)[name] = TensorSpec(dtype, shape)
        return inputs, outputs

    @property
    def loaded(self) -> Any:
        """The deserialised engine, an `ICudaEngine` of the backend."""
        return self._engine

    def describe(self) -> list[dict[str, Any]]:
        """The engine's layers in order, as reported by the backend's inspector."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        form = self._trt.LayerInformationFormat.JSON
        rows = json.loads(inspector.get_engine_information(form)).get("Layers", [])
        # Without detailed profiling the inspector reports only names.
        return [row if isinstance(row, dict) else {"Name": row} for row in rows]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the engine once; inputs and outputs are arrays by name, batch first.

        Raises:
            UsageError: a shape is outside the engine's profile.
            ArtefactError: the engine fails.
        """
        self._memory.enter()
        self._errors.clear()
        take_failures()
        uploaded = []  # Kept until the copies are done.
        for name, spec in self.inputs.items():
            # Not ascontiguousarray, which adds an axis to a scalar.
            array = np.require(feeds[name], dtype=spec.dtype, requirements="C")
            if not self._context.set_input_shape(name, array.shape):
                raise UsageError(
                    f"the engine does not support {name!r} of shape {list(array.shape)}; it supports "
                    f"{self._range(name)}; build another: trtq build --batch-range, or export --size"
                )
            address = self._buffer(name, array.nbytes)
            self._memory.upload(address, array)
            uploaded.append(array)
        results = {}
        for name, spec in self.outputs.items():
            results[name] = np.empty(tuple(self._context.get_tensor_shape(name)), spec.dtype)
            self._buffer(name, results[name].nbytes)
        if not self._context.execute_async_v3(self._memory.stream):
            raise ArtefactError(f"the engine failed: {self._failure()}")
        for name, array in results.items():
            self._memory.download(array, self._buffers[name][0])
        self._memory.wait()
        shapes = tuple(array.shape for array in uploaded)
        if shapes not in self._seen:
            # Each new combination of shapes compiles more kernels.
            self._seen.add(shapes)
            if self._cache is not None:
                self._cache.save()
        return results

    def largest(self, name: str) -> tuple[int, ...]:
        """The maximum shape of an input of this engine."""
        return tuple(self._engine.get_tensor_profile_shape(name, 0)[2])

    def _range(self, name: str) -> str:
        smallest, _, largest = map(list, self._engine.get_tensor_profile_shape(name, 0))
        return f"{smallest} .. {largest}"

    def _buffer(self, name: str, size: int) -> int:
        """Address of a tensor's memory, which grows to the largest size so far, in bytes."""
        address, capacity = self._buffers.get(name, (0, 0))
        if size > capacity or not address:
            if address:
                self._memory.free(address)
            address = self._memory.allocate(size)
            self._buffers[name] = address, size
            self._context.set_tensor_address(name, address)
        return address
