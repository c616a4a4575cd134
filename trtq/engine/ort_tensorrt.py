"""Graphs on onnxruntime's TensorRT providers, with options from the ranges of the export.

`tensorrt` is part of onnxruntime-gpu and uses the engine builder of an installed TensorRT 10;
`tensorrt-rtx` is a separate package, which registers itself with any onnxruntime.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from trtq._optional import require
from trtq.artefact.files import sha256
from trtq.engine.bound_graphs import GRAPH_OPTIONS, cuda_graphs_wanted
from trtq.engine.foreign_errors import onnxruntime_errors
from trtq.engine.ort import (
    OWN_PACKAGES,
    PROVIDERS,
    OrtSession,
    open_graph,
    open_session,
    session_options,
)
from trtq.engine.ort_context import context_key, context_options, kept_session
from trtq.engine.prepared.cache import rewrites_id
from trtq.engine.tensorrt.job import Profile
from trtq.errors import UsageError
from trtq.graph.runtimes.prepare import load_graph, prepare
from trtq.plugins.driver import first_gpu_text
from trtq.resources import cache_folder

__all__ = ["OrtTensorRtEngine", "provider_settings"]

logger = logging.getLogger(__name__)

_PACKAGES = (
    "onnxruntime-ep-nv-tensorrt-rtx",
    "onnxruntime-ep-nv-tensorrt-rtx-cu12",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
)
"""Packages whose versions decide whether a compiled engine can be loaded."""
_SHAPES = ("min", "opt", "max")
_registered: set[str] = set()
"""Providers whose packages this process has registered; onnxruntime accepts each only once."""


def provider_settings(
    provider: str, profile: Profile, key: str, *, graphs: bool = False, context: bool = False
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
        context: whether the engine is in a context file or written into one. The provider `tensorrt`
            then puts its engines next to that file, and refuses another folder.

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
    if context and provider == "tensorrt":
        return settings | {"trt_engine_cache_enable": "1"}
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
        graphs, key = cuda_graphs_wanted(), _key(path)

        def open_with(model: Any, file: Path | None, entries: Mapping[str, str]) -> Any:
            """A session with new options, since a session changes its options."""
            options = session_options(threads)
            for entry, value in entries.items():
                options.add_session_config_entry(entry, value)
            settings = provider_settings(
                name, profile, key, graphs=graphs, context=file is not None
            )
            listed: Mapping[str, str] | None = settings
            if PROVIDERS[name] not in require("onnxruntime").get_available_providers():
                _add_plugin(options, name, settings)
                listed = None
            if model is None:
                return open_session(path, str(file), options, name, listed)
            return open_graph(path, model, options, name, listed)

        def compile_to(file: Path | None) -> Any:
            model = prepare(load_graph(path), name)
            return open_with(model, file, {} if file is None else context_options(file))

        settings = provider_settings(name, profile, key, graphs=graphs, context=True)
        kept = kept_session(
            context_key([name, key, rewrites_id(), *_versions(), json.dumps(settings)]),
            lambda file: open_with(None, file, {}),
            compile_to,
        )
        super().__init__(kept.session, name, graphs=graphs, metadata=kept.metadata)


def _versions() -> list[str]:
    """What an engine depends on besides the graph: onnxruntime, the provider, and the GPU."""
    versions = [f"onnxruntime {require('onnxruntime').__version__}"]
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    return [*versions, first_gpu_text() or "no GPU"]


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
