"""Graphs on onnxruntime: sessions for all providers, and the engine for CPU and CUDA."""

from __future__ import annotations

import importlib.util
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtq._optional import require
from trtq.engine.base import Engine
from trtq.engine.bound_graphs import GRAPH_OPTIONS, CapturedShapes, cuda_graphs_wanted
from trtq.engine.foreign_errors import onnxruntime_errors
from trtq.engine.ort_specs import input_specs, output_specs
from trtq.engine.prepared import prepared_graph
from trtq.errors import UsageError
from trtq.graph.nodes import DOMAIN
from trtq.processor import has_vnni

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from trtq.engine.binding import TensorBinding

__all__ = [
    "GPU_PROVIDERS",
    "OWN_PACKAGES",
    "PROVIDERS",
    "OrtEngine",
    "OrtSession",
    "available_providers",
    "check_provider",
    "input_specs",
    "open_graph",
    "open_serialized",
    "open_session",
    "run_session",
    "session_options",
]

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
OWN_PACKAGES = {"tensorrt-rtx": "onnxruntime_ep_nv_tensorrt_rtx"}
"""Python modules of providers that onnxruntime lists only after they have been registered."""
GPU_PROVIDERS = ("cuda", "tensorrt-rtx", "tensorrt")
"""Providers that compute on an NVIDIA GPU; the last two are also the names of engine builders."""

_FLOAT_ACTIVATIONS = "1"
"""onnxruntime's accuracy level at which MatMulNBits computes with float32 activations; the default, 4,
has an SNR of 44 to 46 dB per layer (onnxruntime 1.24 and 1.31)."""
_PLUGIN_DOMAIN = b"\x3a\x04" + DOMAIN.encode()
"""The domain of a plugin node in a serialised graph: field 7, a text of four bytes."""


def available_providers() -> list[str]:
    """The names in `PROVIDERS` that the installed onnxruntime lists."""
    present = require("onnxruntime").get_available_providers()
    return [name for name, long in PROVIDERS.items() if long in present]


def check_provider(provider: str) -> None:
    """Raise unless onnxruntime lists the provider, or the provider's own package is installed.

    Raises:
        UsageError: the provider is unknown or not installed.
    """
    if provider not in PROVIDERS:
        raise UsageError(f"unknown provider {provider!r}; choose one of {', '.join(PROVIDERS)}")
    present = available_providers()
    package = OWN_PACKAGES.get(provider)
    if provider not in present and (package is None or importlib.util.find_spec(package) is None):
        raise UsageError(
            f"the installed onnxruntime has no provider {provider!r}, only {', '.join(present)}; "
            "install trtq with another extra: [cpu] for cpu and openvino, [gpu] for cuda; or, for "
            "tensorrt-rtx, onnxruntime and onnxruntime-ep-nv-tensorrt-rtx"
        )


def session_options(threads: int | None) -> Any:
    """Session options that all sessions of trtq share.

    Args:
        threads: number of intra-op threads; None: the number of cores.
    """
    options = require("onnxruntime").SessionOptions()
    options.log_severity_level = 3
    # By default onnxruntime quantises the activations of products with weight-only codes to 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", _FLOAT_ACTIVATIONS)
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def open_session(
    path: Path, model: str | bytes, options: Any, provider: str, settings: Mapping[str, str] | None
) -> Any:
    """Open an onnxruntime session that runs on one provider only.

    Args:
        path: file of the graph, for messages.
        model: path of the graph, or the serialised graph.
        options: session options, see `session_options`.
        provider: one of `PROVIDERS`.
        settings: options of the provider; None: `options` already holds the provider's devices.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        UsageError: the provider cannot start.
        ArtefactError: the graph cannot be loaded.
    """
    chosen = None if settings is None else [(PROVIDERS[provider], dict(settings))]
    runtime = require("onnxruntime")
    with onnxruntime_errors("load", path):
        session = runtime.InferenceSession(model, options, providers=chosen)
        # By default onnxruntime replaces a failing provider by the CPU's and prints that on stdout.
        session.disable_fallback()
    if PROVIDERS[provider] not in session.get_providers():
        raise UsageError(
            f"the provider {provider!r} cannot start on this machine; onnxruntime fell back to "
            f"{', '.join(session.get_providers())}"
        )
    return session


def open_graph(
    path: Path, model: ir.Model, options: Any, provider: str, settings: Mapping[str, str] | None
) -> Any:
    """Open a session of a graph in memory whose external data are in the folder of `path`.

    Arguments and errors are those of `open_session`.
    """
    import onnx_ir as ir

    return open_serialized(
        path, ir.to_proto(model).SerializeToString(), options, provider, settings
    )


def open_serialized(
    path: Path, model: bytes, options: Any, provider: str, settings: Mapping[str, str] | None
) -> Any:
    """Open a session of a serialised graph whose external data are in the folder of `path`.

    Arguments and errors are those of `open_session`.
    """
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    return open_session(path, model, options, provider, settings)


def _mentions_plugins(path: Path) -> bool:
    """Whether a file contains the domain of plugin nodes; the graph is not parsed."""
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return content.find(_PLUGIN_DOMAIN) >= 0
    except (OSError, ValueError):  # ValueError: the file is empty.
        return False


def run_session(
    session: Any, names: Sequence[str], feeds: Mapping[str, np.ndarray], provider: str = "cpu"
) -> list[np.ndarray]:
    """Run a session and return the named outputs, in order.

    Raises:
        ArtefactError: onnxruntime fails; the message is one line.
    """
    with onnxruntime_errors("run", provider):
        outputs: list[np.ndarray] = session.run(list(names), dict(feeds))
    return outputs


def _keep_packed(options: Any) -> None:
    """Let a session fold and pack no weights, and unpack each where the graph uses it."""
    runtime = require("onnxruntime")
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    # Each weight is then unpacked directly before its product, see `trtq.graph.runtimes.delay_weights`.
    options.execution_order = runtime.ExecutionOrder.PRIORITY_BASED


def _delayed(path: Path) -> ir.Model:
    """A graph for onnxruntime whose weights are unpacked layer by layer."""
    from trtq.graph.runtimes.delay_weights import DelayWeights
    from trtq.graph.runtimes.prepare import load_graph, prepare

    model = prepare(load_graph(path), "onnxruntime")
    DelayWeights()(model)
    return model


class OrtSession(Engine):
    """A session of onnxruntime as an engine.

    Args:
        session: session of onnxruntime.
        provider: one of `PROVIDERS`.
        graphs: whether the session was opened with CUDA graphs, see `trtq.engine.bound_graphs`.
        metadata: metadata of the graph, if the session's file has lost it; None: that of the session.

    Raises:
        ArtefactError: an input or output has a type that trtq does not support.
    """

    def __init__(
        self,
        session: Any,
        provider: str,
        *,
        graphs: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if metadata is None:
            metadata = session.get_modelmeta().custom_metadata_map
        super().__init__(provider, input_specs(session), output_specs(session), metadata)
        self._session = session
        self._graphs = graphs
        self._binding: TensorBinding | None = None

    @property
    def session(self) -> Any:
        """The session, an `onnxruntime.InferenceSession`."""
        return self._session

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph once; inputs and outputs are arrays by name, batch first.

        Raises:
            ArtefactError: onnxruntime fails, e.g. because the GPU's memory is full.
        """
        if self._graphs:
            import torch

            # A captured graph needs fixed addresses, which `session.run` does not have.
            tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
            return {name: value.cpu().numpy() for name, value in self.run_tensors(tensors).items()}
        names = list(self.outputs)
        values = run_session(self._session, names, feeds, self.provider)
        return dict(zip(names, values, strict=True))

    @property
    def device(self) -> str:
        """Torch's name of the device on which `run_tensors` leaves its outputs."""
        return str(self.binding.place.device) if self.provider in GPU_PROVIDERS else "cpu"

    @property
    def binding(self) -> TensorBinding:
        """The binding of torch's tensors to the session."""
        if self._binding is None:
            from trtq.engine.binding import TensorBinding
            from trtq.engine.place import place_of

            graphs = CapturedShapes(self.provider) if self._graphs else None
            place = place_of(self.provider in GPU_PROVIDERS)
            self._binding = TensorBinding(
                self._session, self.provider, self.inputs, self.outputs, place, graphs
            )
        return self._binding

    def run_tensors(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph once on tensors of torch, which are bound by their addresses.

        Args:
            feeds: a tensor for each input, by name, of any device.

        Returns:
            The outputs by name, on `device`: new tensors, which belong to the caller.

        Raises:
            UsageError: an input is missing, unknown or empty.
            ArtefactError: onnxruntime fails, e.g. because the GPU's memory is full.
        """
        return self.binding.run(feeds)


class OrtEngine(OrtSession):
    """An ONNX file in one onnxruntime session, which accepts every shape that the graph accepts.

    Args:
        path: file of the graph, in one folder with its external data.
        provider: `cpu` or `cuda`; other modules implement the other providers.
        threads: number of intra-op threads; None: the number of cores.
        low_memory: release memory after every operator, for one or two runs of a large graph.
        packed: compute the graph as it is written, so that its weights stay in their file, and each is
            unpacked and converted when it is used, e.g. for a graph that hardly fits into memory.

    Raises:
        UsageError: the provider is unknown or not in the installed onnxruntime.
        ArtefactError: the file cannot be loaded.
    """

    def __init__(
        self,
        path: Path,
        provider: str = "cpu",
        threads: int | None = None,
        *,
        low_memory: bool = False,
        packed: bool = False,
    ) -> None:
        check_provider(provider)
        options = session_options(threads)
        if packed:
            _keep_packed(options)
        # A memory plan per shape is as large as the arena and saves time only when the shape recurs.
        options.enable_mem_pattern = options.enable_cpu_mem_arena = not low_memory
        graphs = provider in GPU_PROVIDERS and cuda_graphs_wanted()
        settings = {GRAPH_OPTIONS[provider]: "1"} if graphs else {}
        if packed:
            session = open_graph(path, _delayed(path), options, provider, settings)
        elif _mentions_plugins(path) or (provider == "cpu" and has_vnni()):
            model = prepared_graph(path, "onnxruntime").model
            session = open_serialized(path, model, options, provider, settings)
        else:
            session = open_session(path, str(path), options, provider, settings)
        super().__init__(session, provider, graphs=graphs)
