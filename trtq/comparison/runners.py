"""Runners of polygraphy for what trtq computes: torch, every provider of onnxruntime, engines.

This module imports polygraphy, so it is imported inside the functions that need it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType

from trtq.engine.base import Engine, TensorSpec
from trtq.engine.ort import OrtSession
from trtq.engine.tensorrt.run import TensorRtEngine

__all__ = ["EngineRunner", "EngineSession", "TorchRunner", "engine_runner"]

_Feeds = Mapping[str, np.ndarray]
_ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "float64": "tensor(double)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "bool": "tensor(bool)",
}


def _metadata(specs: Mapping[str, TensorSpec]) -> TensorMetadata:
    metadata = TensorMetadata()
    for name, spec in specs.items():
        shape = [size if isinstance(size, int) else None for size in spec.shape]
        metadata.add(name, dtype=DataType.from_dtype(spec.dtype), shape=shape)
    return metadata


class TorchRunner(BaseRunner):  # type: ignore[misc]
    """A denoiser in torch: a float model or a run.

    Args:
        name: name of the runner in results.
        inputs: inputs by name.
        call: function from inputs to outputs, arrays by name.
    """

    def __init__(
        self,
        name: str,
        inputs: Mapping[str, TensorSpec],
        call: Callable[[_Feeds], dict[str, np.ndarray]],
    ) -> None:
        super().__init__(name=name, prefix="trtq-torch")
        self._inputs, self._call = inputs, call

    def activate_impl(self) -> None:
        """Nothing to start: the module is loaded."""

    def deactivate_impl(self) -> None:
        """Nothing to release: the module belongs to the caller."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and shapes of the inputs."""
        return _metadata(self._inputs)

    @torch.no_grad()
    def infer_impl(self, feed_dict: _Feeds) -> OrderedDict[str, np.ndarray]:
        """Call the module once."""
        start = time.perf_counter()
        outputs = OrderedDict(self._call(feed_dict))
        self.inference_time = time.perf_counter() - start
        return outputs


class EngineRunner(BaseRunner):  # type: ignore[misc]
    """An engine of TensorRT-RTX, or any other `trtq.engine.base.Engine`.

    Args:
        name: name of the runner in results.
        engine: the opened engine.
    """

    def __init__(self, name: str, engine: Engine) -> None:
        super().__init__(name=name, prefix=f"trtq-{engine.provider}")
        self._engine = engine

    def activate_impl(self) -> None:
        """Nothing to start: the engine is loaded."""

    def deactivate_impl(self) -> None:
        """Nothing to release: the engine belongs to the caller."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and shapes of the inputs."""
        return _metadata(self._engine.inputs)

    def infer_impl(self, feed_dict: _Feeds) -> OrderedDict[str, np.ndarray]:
        """Run the engine once."""
        start = time.perf_counter()
        outputs = OrderedDict(self._engine.run(feed_dict))
        self.inference_time = time.perf_counter() - start
        return outputs


@dataclass(frozen=True)
class _Node:
    """An input or output as onnxruntime describes it."""

    name: str
    type: str
    shape: list[int | str]


class EngineSession:
    """An engine with the interface of an onnxruntime session, for polygraphy's `OnnxrtRunner`.

    OpenVINO needs one session per shape of the inputs, which `trtq.engine.openvino` keeps.

    Args:
        engine: an engine on onnxruntime.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get_inputs(self) -> list[_Node]:
        """The inputs."""
        return _nodes(self._engine.inputs)

    def get_outputs(self) -> list[_Node]:
        """The outputs."""
        return _nodes(self._engine.outputs)

    def run(self, names: Any, feeds: _Feeds) -> list[np.ndarray]:
        """The named outputs, or all for None."""
        outputs = self._engine.run(feeds)
        return [outputs[name] for name in names or self._engine.outputs]


def _nodes(specs: Mapping[str, TensorSpec]) -> list[_Node]:
    return [
        _Node(name, _ORT_TYPES[np.dtype(spec.dtype).name], list(spec.shape))
        for name, spec in specs.items()
    ]


def engine_runner(name: str, engine: Engine) -> BaseRunner:
    """The runner of an opened engine.

    Args:
        name: name of the runner in results.
        engine: an engine of onnxruntime, TensorRT or TensorRT-RTX.

    Returns:
        Polygraphy's own `OnnxrtRunner` for graphs and `TrtRunner` for engines of full TensorRT, an
        `EngineRunner` for TensorRT-RTX, whose bindings polygraphy uses instead of TensorRT's only by a
        variable of the environment.
    """
    if isinstance(engine, OrtSession):
        return OnnxrtRunner(engine.session, name=name)
    if isinstance(engine, TensorRtEngine):
        if engine.provider == "tensorrt":
            from polygraphy.backend.trt import TrtRunner

            return TrtRunner(engine.loaded, name=name)
        return EngineRunner(name, engine)
    return OnnxrtRunner(EngineSession(engine), name=name)
