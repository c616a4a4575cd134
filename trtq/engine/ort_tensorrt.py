"""Graphs on onnxruntime's TensorRT providers, with options made from what the graph was exported for.

`tensorrt` is part of onnxruntime-gpu and takes the engine's builder from an installed TensorRT 10;
`tensorrt-rtx` comes as a package of its own, which registers itself with any onnxruntime.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from trtq._optional import require
from trtq.artefact.files import sha256
from trtq.engine.ort import OWN_PACKAGES, PROVIDERS, OrtSession, open_graph, session_options
from trtq.engine.tensorrt.job import Profile
from trtq.errors import UsageError
from trtq.graph.runtimes.prepare import load_graph, prepare
from trtq.resources import cache_folder

__all__ = ["OrtTensorRtEngine", "provider_settings"]

logger = logging.getLogger(__name__)

_SHAPES = ("min", "opt", "max")
_registered: set[str] = set()
"""Providers whose packages this process has given to onnxruntime, which takes each once."""


def provider_settings(provider: str, profile: Profile, key: str) -> dict[str, str]:
    """Options of a provider: ranges of the inputs, and where it keeps what it builds.

    CUDA graphs stay off: a session is called with arrays of the host, whose copies on the device may
    move, and a captured graph reads and writes where they were when it was captured. Each later call
    would give the first one's result.

    Args:
        provider: `tensorrt` or `tensorrt-rtx`.
        profile: smallest, most frequent and largest shape of every input.
        key: of the graph and its weights. The provider names engines after the graph's nodes, so two
            models of one shape, e.g. two fine-tunings, would share an engine, and the first's weights.
    """
    short = "trt" if provider == "tensorrt" else "nv"
    found = {}
    for place, name in enumerate(_SHAPES):
        shapes = (f"{key}:{'x'.join(map(str, three[place]))}" for key, three in profile.items())
        found[f"{short}_profile_{name}_shapes"] = ",".join(shapes)
    try:
        cache = cache_folder("onnxruntime") / key
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as err:  # Without a place for them, engines are built each time.
        logger.warning("engines of onnxruntime are not kept: %s", err)
        return found
    if provider == "tensorrt":
        return found | {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}
    return found | {"nv_runtime_cache_path": str(cache)}


def _key(path: Path) -> str:
    """Of a graph and of all that lies beside it: weights are not in the file of the graph."""
    found = hashlib.sha256()
    for file in sorted(path.parent.iterdir()):
        if file.is_file():
            found.update(f"{file.name}:{sha256(file)};".encode())
    return found.hexdigest()[:32]


class OrtTensorRtEngine(OrtSession):
    """An ONNX file in one session of a TensorRT provider.

    Args:
        path: the graph; its external data lie beside it.
        provider: `tensorrt` or `tensorrt-rtx`.
        profile: ranges of its inputs.
        threads: threads of what the provider leaves to the CPU.

    Raises:
        UsageError: the provider is not installed, or sees no GPU.
        ArtefactError: the graph cannot be loaded.
    """

    def __init__(
        self, path: Path, provider: str, profile: Profile, threads: int | None = None
    ) -> None:
        name: Literal["tensorrt", "tensorrt-rtx"]
        name = "tensorrt" if provider == "tensorrt" else "tensorrt-rtx"
        options = session_options(threads)
        settings = provider_settings(name, profile, _key(path))
        present = require("onnxruntime").get_available_providers()
        listed: Mapping[str, str] | None = settings
        if PROVIDERS[name] not in present:
            _add_plugin(options, name, settings)
            listed = None
        model = prepare(load_graph(path), name)
        super().__init__(open_graph(path, model, options, name, listed), name)


def _add_plugin(options: Any, provider: str, settings: Mapping[str, str]) -> None:
    """Give a session the devices of the provider's own package."""
    advice = (
        f"the installed onnxruntime has no provider {provider!r}: it takes an NVIDIA GPU and "
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
    try:
        if provider not in _registered:
            runtime.register_execution_provider_library(
                package.get_ep_name(), package.get_library_path()
            )
            _registered.add(provider)
        devices = [d for d in runtime.get_ep_devices() if d.ep_name == PROVIDERS[provider]]
    except Exception as err:  # onnxruntime's own exceptions share no base but Exception.
        raise UsageError(f"the provider {provider!r} cannot start on this machine: {err}") from err
    if not devices:
        raise UsageError(f"the provider {provider!r} sees no NVIDIA GPU that it can use")
    options.add_provider_for_devices(devices[:1], dict(settings))
