"""Graphs on onnxruntime's TensorRT providers, with options from the ranges of the export.

`tensorrt` is part of onnxruntime-gpu and uses the engine builder of an installed TensorRT 10;
`tensorrt-rtx` is a separate package, which registers itself with any onnxruntime.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from trtq._optional import require
from trtq.artefact.files import sha256
from trtq.engine.bound_graphs import GRAPH_OPTIONS, cuda_graphs_wanted
from trtq.engine.foreign_errors import onnxruntime_errors
from trtq.engine.ort import OWN_PACKAGES, PROVIDERS, OrtSession, open_graph, session_options
from trtq.engine.tensorrt.job import Profile
from trtq.errors import UsageError
from trtq.graph.runtimes.prepare import load_graph, prepare
from trtq.resources import cache_folder

__all__ = ["OrtTensorRtEngine", "provider_settings"]

logger = logging.getLogger(__name__)

_SHAPES = ("min", "opt", "max")
_registered: set[str] = set()
"""Providers whose packages this process has registered; onnxruntime accepts each only once."""


def provider_settings(
    provider: str, profile: Profile, key: str, *, graphs: bool = False
) -> dict[str, str]:
    """Options of a provider: ranges of the inputs, and the cache folder of engines.

    Args:
        provider: `tensorrt` or `tensorrt-rtx`.
        profile: minimum, optimum and maximum shape of every input.
        key: hash of the graph and its weights. The provider names cached engines after the graph's
            nodes, so two models of one shape, e.g. two fine-tunings, would otherwise share the engine
            and the weights of the first.
        graphs: whether to capture CUDA graphs. A captured graph keeps reading and writing the addresses
            of its first call, so each call must bind the same addresses; see
            `trtq.engine.bound_graphs`.

    Returns:
        The options by name, as onnxruntime expects them.
    """
    short = "trt" if provider == "tensorrt" else "nv"
    settings = {GRAPH_OPTIONS[provider]: "1"} if graphs else {}
    for place, name in enumerate(_SHAPES):
        shapes = (
            f"{tensor}:{'x'.join(map(str, three[place]))}" for tensor, three in profile.items()
        )
        settings[f"{short}_profile_{name}_shapes"] = ",".join(shapes)
    try:
        cache = cache_folder("onnxruntime") / key
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as err:  # Without a cache engines are built each time.
        logger.warning("engines of onnxruntime are not kept: %s", err)
        return settings
    if provider == "tensorrt":
        return settings | {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}
    return settings | {"nv_runtime_cache_path": str(cache)}


def _key(path: Path) -> str:
    """Hash of all files in a graph's folder: weights are not in the file of the graph."""
    digest = hashlib.sha256()
    for file in sorted(path.parent.iterdir()):
        if file.is_file():
            digest.update(f"{file.name}:{sha256(file)};".encode())
    return digest.hexdigest()[:32]


class OrtTensorRtEngine(OrtSession):
    """An ONNX file in one session of a TensorRT provider.

    Args:
        path: file of the graph, in one folder with its external data.
        provider: `tensorrt` or `tensorrt-rtx`.
        profile: ranges of the graph's inputs.
        threads: number of intra-op threads of operators that the provider leaves to the CPU.

    Raises:
        UsageError: the provider is not installed, or finds no GPU.
        ArtefactError: the graph cannot be loaded.
    """

    def __init__(
        self, path: Path, provider: str, profile: Profile, threads: int | None = None
    ) -> None:
        name: Literal["tensorrt", "tensorrt-rtx"]
        name = "tensorrt" if provider == "tensorrt" else "tensorrt-rtx"
        options = session_options(threads)
        graphs = cuda_graphs_wanted()
        settings = provider_settings(name, profile, _key(path), graphs=graphs)
        present = require("onnxruntime").get_available_providers()
        listed: Mapping[str, str] | None = settings
        if PROVIDERS[name] not in present:
            _add_plugin(options, name, settings)
            listed = None
        model = prepare(load_graph(path), name)
        super().__init__(open_graph(path, model, options, name, listed), name, graphs=graphs)


def _add_plugin(options: Any, provider: str, settings: Mapping[str, str]) -> None:
    """Add the devices of the provider's own package to the session options."""
    advice = (
        f"the installed onnxruntime has no provider {provider!r}, which needs an NVIDIA GPU and "
        + (
            "pip install onnxruntime-gpu, with TensorRT 10 from NVIDIA's package index"
            if provider == "tensorrt"
            else "pip install onnxruntime onnxruntime-ep-nv-tensorrt-rtx"
        )
    )
    if provider == "tensorrt":
        raise UsageError(advice)
    import importlib

    try:
        package = importlib.import_module(OWN_PACKAGES[provider])
    except ImportError as err:
        raise UsageError(advice) from err
    runtime = require("onnxruntime")
    with onnxruntime_errors("start", provider):
        if provider not in _registered:
            runtime.register_execution_provider_library(
                package.get_ep_name(), package.get_library_path()
            )
            _registered.add(provider)
        devices = [d for d in runtime.get_ep_devices() if d.ep_name == PROVIDERS[provider]]
    if not devices:
        raise UsageError(f"the provider {provider!r} finds no NVIDIA GPU that it can use")
    options.add_provider_for_devices(devices[:1], dict(settings))
