"""An engine of TensorRT or TensorRT-RTX, run from arrays to arrays."""

from __future__ import annotations

import importlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trtq.artefact.files import sha256
from trtq.engine.base import NO_METADATA, TensorSpec
from trtq.engine.tensorrt.backends import BACKENDS, Backend
from trtq.engine.tensorrt.log import collecting_logger
from trtq.errors import ArtefactError, KernelError, MissingDependencyError, UsageError
from trtq.plugins.driver import Gpu, first_gpu
from trtq.plugins.low_bit.tensorrt import register, take_failures
from trtq.resources import cache_folder

__all__ = ["Memory", "TensorRtEngine", "obstacle", "open_tensorrt"]

logger = logging.getLogger(__name__)

_GIB = 1 << 30


class Memory(Protocol):
    """Of the GPU; `trtq.plugins.driver.Gpu` is one."""

    stream: int

    def enter(self) -> None:
        """Let the calling thread use it."""

    def allocate(self, size: int) -> int:
        """Address of new memory."""

    def free(self, address: int) -> None:
        """Give memory back."""

    def upload(self, address: int, host: Any) -> None:
        """Copy an array to the device."""

    def download(self, host: Any, address: int) -> None:
        """Copy to an array."""

    def wait(self) -> None:
        """Until everything is done."""


def open_tensorrt(
    path: Path, provider: str, metadata: Mapping[str, str] = NO_METADATA
) -> TensorRtEngine:
    """Load an engine on the GPU that is there.

    Args:
        path: the engine's file.
        provider: the backend that built it.
        metadata: what the manifest says about the graph.

    Raises:
        MissingDependencyError: the backend or cuda-bindings is not installed.
        UsageError: there is no GPU that can run it.
        ArtefactError: the backend does not take the file.
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
    """Why no engine of a backend can run on this machine; None: one can."""
    backend = BACKENDS[provider]
    if not backend.installed:
        return f"{provider} is not installed: {backend.install}"
    try:
        first_gpu()
    except (KernelError, MissingDependencyError) as err:
        return str(err)
    return None


class TensorRtEngine:
    """One engine with one execution context, whose buffers grow with the shapes it is given.

    What TensorRT-RTX compiles for the GPU on first use is kept in the user's cache, and a call is one
    CUDA graph once its shapes have been seen.

    Args:
        path: the engine's file.
        backend: that built it.
        trt: its module.
        memory: of the GPU.
        metadata: what the manifest says about the graph.

    Raises:
        UsageError: the backend cannot start on this machine.
        ArtefactError: the backend does not take the file.
    """

    def __init__(
        self,
        path: Path,
        backend: Backend,
        trt: Any,
        memory: Memory,
        metadata: Mapping[str, str] = NO_METADATA,
    ) -> None:
        self._trt, self._memory, self._metadata = trt, memory, metadata
        self._provider = backend.name
        self._errors: list[str] = []
        register(trt)
        self._logger = collecting_logger(trt, self._errors, [])
        try:
            self._runtime = trt.Runtime(self._logger)
        except (
            Exception
        ) as err:  # The bindings' own, without a base: most often for want of a driver.
            why = "; ".join(self._errors[-3:]) or str(err)
            raise UsageError(
                f"{backend.name} cannot start on this machine: {why}; `trtq doctor` says what driver it "
                "has"
            ) from err
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ArtefactError(
                f"{backend.name} cannot load {path}: {self._said()}; build it again on this machine: "
                "trtq build ONNX -o ENGINE"
            )
        self._stream_weights()
        self._cache: Any = None
        self._cache_file: Path | None = None
        self._context = self._engine.create_execution_context(*self._configured(path))
        if self._context is None:
            raise ArtefactError(f"{backend.name} cannot start {path}: {self._said()}")
        self._inputs, self._outputs = self._specs()
        self._buffers: dict[str, tuple[int, int]] = {}
        self._seen: set[tuple[tuple[int, ...], ...]] = set()

    def _said(self) -> str:
        """Why the last call failed: what plugins raised, and what the backend said of it."""
        return "; ".join([*take_failures(), *self._errors[-3:]]) or "it gave no reason"

    def _stream_weights(self) -> None:
        """Give an engine that was built for it as much of the GPU as is free; it streams the rest.

        Until it is told, it keeps all weights on the GPU, as if it had not been built for it.
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
        """The settings that only TensorRT-RTX has."""
        if not hasattr(self._trt, "CudaGraphStrategy"):
            return []
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        try:
            self._cache = config.create_runtime_cache()
            self._cache_file = cache_folder("runtime") / f"{sha256(path)}.bin"
            if self._cache_file.is_file():
                self._cache.deserialize(self._cache_file.read_bytes())
            config.set_runtime_cache(self._cache)
        except (OSError, RuntimeError) as err:  # A cache that cannot be used costs time, no more.
            logger.warning("the runtime cache is not used: %s", err)
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

    def describe(self) -> list[dict[str, Any]]:
        """The engine's layers as the backend's own inspector names them, in order."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        form = self._trt.LayerInformationFormat.JSON
        found = json.loads(inspector.get_engine_information(form)).get("Layers", [])
        # Without detailed profiling there are names only.
        return [row if isinstance(row, dict) else {"Name": row} for row in found]

    @property
    def provider(self) -> str:
        """Name of what runs it."""
        return self._provider

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The engine's inputs by name."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """The engine's outputs by name."""
        return self._outputs

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the manifest says about the graph."""
        return self._metadata

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; arrays by name, batch first.

        Raises:
            UsageError: a shape lies outside the engine's profile.
            ArtefactError: the engine fails.
        """
        self._memory.enter()
        self._errors.clear()
        take_failures()
        uploaded = []  # Kept until the copies are done.
        for name, spec in self._inputs.items():
            array = np.ascontiguousarray(feeds[name], dtype=spec.dtype)
            if not self._context.set_input_shape(name, array.shape):
                raise UsageError(
                    f"the engine does not take {name!r} of shape {list(array.shape)}, but "
                    f"{self._range(name)}; build it for another: trtq build --batch, or export --size"
                )
            address = self._buffer(name, array.nbytes)
            self._memory.upload(address, array)
            uploaded.append(array)
        found = {}
        for name, spec in self._outputs.items():
            found[name] = np.empty(tuple(self._context.get_tensor_shape(name)), spec.dtype)
            self._buffer(name, found[name].nbytes)
        if not self._context.execute_async_v3(self._memory.stream):
            raise ArtefactError(f"the engine failed: {self._said()}")
        for name, array in found.items():
            self._memory.download(array, self._buffers[name][0])
        self._memory.wait()
        shapes = tuple(array.shape for array in uploaded)
        if shapes not in self._seen:
            self._seen.add(shapes)
            self._keep_cache()
        return found

    def largest(self, name: str) -> tuple[int, ...]:
        """The largest shape of an input that the engine was built for."""
        return tuple(self._engine.get_tensor_profile_shape(name, 0)[2])

    def _range(self, name: str) -> str:
        least, _, most = (list(shape) for shape in self._engine.get_tensor_profile_shape(name, 0))
        return f"{least} .. {most}"

    def _buffer(self, name: str, size: int) -> int:
        """Memory for a tensor, as large as any so far."""
        address, capacity = self._buffers.get(name, (0, 0))
        if size > capacity or not address:
            if address:
                self._memory.free(address)
            address = self._memory.allocate(size)
            self._buffers[name] = address, size
            self._context.set_tensor_address(name, address)
        return address

    def _keep_cache(self) -> None:
        """After the first run of new shapes more is compiled; a full disk must not fail it."""
        if self._cache is None or self._cache_file is None:
            return
        try:
            self._cache_file.parent.mkdir(parents=True, exist_ok=True)
            # Another process may do the same at this moment.
            handle, name = tempfile.mkstemp(prefix=".partial-", dir=self._cache_file.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(bytes(self._cache.serialize()))
                Path(name).replace(self._cache_file)
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError as err:
            logger.warning("the runtime cache cannot be kept: %s", err)
            self._cache_file = None
