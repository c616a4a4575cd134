"""Graphs on onnxruntime: what all its providers share, and those of the CPU and of CUDA."""

from __future__ import annotations

import importlib.util
import mmap
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtq._optional import require
from trtq.engine.base import TensorSpec
from trtq.engine.prepared import prepared_graph
from trtq.errors import ArtefactError, UsageError
from trtq.graph.nodes import DOMAIN
from trtq.processor import has_vnni

if TYPE_CHECKING:
    import onnx_ir as ir

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
"""Modules of providers that register themselves with an onnxruntime which does not list them before."""
GPU_PROVIDERS = ("cuda", "tensorrt-rtx", "tensorrt")
"""Those that compute on an NVIDIA GPU; engines have the names of the last two."""

_PLUGIN_DOMAIN = b"\x3a\x04" + DOMAIN.encode()
"""A node's field 7, as protobuf writes it."""
_LONGEST = 400
_SOURCE_PLACE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |/\S+\.(?:cc|h):\d+ \S.*?\) (?=[A-Z])"
)
"""Of onnxruntime's messages: codes, and the line and function of its own source."""
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def available_providers() -> list[str]:
    """Those of `PROVIDERS` that the installed onnxruntime has."""
    present = require("onnxruntime").get_available_providers()
    return [name for name, long in PROVIDERS.items() if long in present]


def check_provider(provider: str) -> None:
    """Nothing, if the installed onnxruntime has it, or a package of the provider's own is installed.

    Raises:
        UsageError: the provider is unknown or not there.
    """
    if provider not in PROVIDERS:
        raise UsageError(f"unknown provider {provider!r}; choose one of {', '.join(PROVIDERS)}")
    present = available_providers()
    own = OWN_PACKAGES.get(provider)
    if provider not in present and (own is None or importlib.util.find_spec(own) is None):
        raise UsageError(
            f"the installed onnxruntime has no provider {provider!r}, it has {', '.join(present)}; "
            "install trtq with another extra: [cpu] brings cpu and openvino, [gpu] brings cuda; or, for "
            "tensorrt-rtx, onnxruntime and onnxruntime-ep-nv-tensorrt-rtx"
        )


def session_options(threads: int | None) -> Any:
    """Options that every session of ours has."""
    options = require("onnxruntime").SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def open_session(
    path: Path, model: str | bytes, options: Any, provider: str, settings: Mapping[str, str] | None
) -> Any:
    """An onnxruntime session that runs on the provider and on nothing else.

    Args:
        path: the graph's file, for messages.
        model: its path or its bytes.
        options: see `session_options`.
        provider: one of `PROVIDERS`.
        settings: of the provider; None: the options have its devices already.

    Raises:
        UsageError: the provider cannot start.
        ArtefactError: the graph cannot be loaded.
    """
    chosen = None if settings is None else [(PROVIDERS[provider], dict(settings))]
    try:
        session = require("onnxruntime").InferenceSession(model, options, providers=chosen)
        # Otherwise a provider that fails goes over to the CPU's, and says so on standard output.
        session.disable_fallback()
    except Exception as err:  # onnxruntime's own exceptions share no base but Exception.
        raise ArtefactError(f"onnxruntime cannot load {path}: {_line(err)}") from err
    if PROVIDERS[provider] not in session.get_providers():
        raise UsageError(
            f"the provider {provider!r} cannot start on this machine; onnxruntime fell back to "
            f"{', '.join(session.get_providers())}"
        )
    return session


def open_graph(
    path: Path, model: ir.Model, options: Any, provider: str, settings: Mapping[str, str] | None
) -> Any:
    """A session of a graph in memory whose external data lie beside `path`.

    Arguments and errors are those of `open_session`.
    """
    import onnx_ir as ir

    return open_serialized(
        path, ir.to_proto(model).SerializeToString(), options, provider, settings
    )


def open_serialized(
    path: Path, model: bytes, options: Any, provider: str, settings: Mapping[str, str] | None
) -> Any:
    """A session of a serialized graph whose external data lie beside `path`.

    Arguments and errors are those of `open_session`.
    """
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    return open_session(path, model, options, provider, settings)


def _line(err: Exception) -> str:
    """What onnxruntime says, in one line and without end."""
    text = _SOURCE_PLACE.sub("", " ".join(str(err).split()))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def input_specs(session: Any) -> dict[str, TensorSpec]:
    """The inputs of a session by name."""
    return _session_specs(session.get_inputs())


def _session_specs(nodes: Any) -> dict[str, TensorSpec]:
    found = {}
    for node in nodes:
        if node.type not in _DTYPES:
            raise ArtefactError(
                f"{node.name!r} of the graph is a {node.type}, which no graph of trtq takes or gives; "
                f"it has {', '.join(_DTYPES)}"
            )
        # A free axis without a name has one all the same, as nothing is known of it.
        sizes = tuple("?" if size is None else size for size in node.shape)
        found[node.name] = TensorSpec(np.dtype(_DTYPES[node.type]), sizes)
    return found


def _mentions_plugins(path: Path) -> bool:
    """Whether the domain of our nodes is in a file; asks nothing of a graph that is damaged."""
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
    """What a session gives, by name of the output.

    Raises:
        ArtefactError: onnxruntime gives up on it, in one line.
    """
    try:
        found: list[np.ndarray] = session.run(list(names), dict(feeds))
    except Exception as err:  # onnxruntime's own exceptions share no base but Exception.
        line = _line(err)
        full = "memory" in line or "CUBLAS_STATUS_ALLOC_FAILED" in line
        advice = "; take a smaller batch or size" if full else ""
        raise ArtefactError(
            f"onnxruntime cannot run the graph on {provider}: {line}{advice}"
        ) from err
    return found


class OrtSession:
    """A session of onnxruntime as an engine.

    Args:
        session: onnxruntime's.
        provider: what runs it, one of `PROVIDERS`.
    """

    def __init__(self, session: Any, provider: str) -> None:
        self._session = session
        self._provider = provider
        self._names = [node.name for node in session.get_outputs()]

    @property
    def provider(self) -> str:
        """Name of what runs it."""
        return self._provider

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The graph's inputs by name."""
        return input_specs(self._session)

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """The graph's outputs by name."""
        return _session_specs(self._session.get_outputs())

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the graph's file says about itself."""
        found: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        return found

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; arrays by name, batch first.

        Raises:
            ArtefactError: onnxruntime gives up on it, e.g. for want of memory on a GPU.
        """
        found = run_session(self._session, self._names, feeds, self._provider)
        return dict(zip(self._names, found, strict=True))


class OrtEngine(OrtSession):
    """An ONNX file in one onnxruntime session, which takes every shape that the graph takes.

    Args:
        path: the graph; its external data lie beside it.
        provider: `cpu` or `cuda`; the others have modules of their own.
        threads: threads of one operator; None: as many as there are cores.
        low_memory: give memory back after every operator, for one or two runs of a large graph.

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
    ) -> None:
        check_provider(provider)
        options = session_options(threads)
        # A plan of memory for a shape is as large as the arena, and saves time only when it comes again.
        options.enable_mem_pattern = options.enable_cpu_mem_arena = not low_memory
        if _mentions_plugins(path) or (provider == "cpu" and has_vnni()):
            model = prepared_graph(path, "onnxruntime").model
            session = open_serialized(path, model, options, provider, {})
        else:
            session = open_session(path, str(path), options, provider, {})
        super().__init__(session, provider)
