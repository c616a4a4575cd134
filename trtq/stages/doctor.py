"""What is installed, and what can run here."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

from trtq.diffusion.shipped import shipped_models
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.errors import MissingDependencyError
from trtq.processor import has_vnni, processor_features

__all__ = ["doctor"]

_REQUIRED = ("torch", "diffusers", "accelerate", "onnx", "onnxscript", "safetensors", "numpy")
_OPTIONAL = {
    "onnxruntime-openvino": "cpu",
    "onnxruntime-gpu": "gpu",
    "onnxruntime": "cpu",
    "tensorrt-rtx": "rtx",
    "cuda-bindings": "plugins",
    "nvidia-cuda-nvrtc": "plugins",
    "matplotlib": "eval",
    "jinja2": "eval",
}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _providers() -> list[str]:
    from trtq.engine.ort import available_providers

    try:
        return available_providers()
    except MissingDependencyError:
        return []


def doctor() -> dict[str, Any]:
    """Look around; nothing is changed.

    Returns:
        `ok`, `problems` (what stands in the way of the main path, and what to do), `hints` (what else
        could be had), `python`, `machine`, `vnni` (whether the CPU adds int8 products without loss),
        `cpu_features` (those of `trtq.processor.FEATURES` that it is taken to have),
        `packages`, `providers` (what `--provider` can be here), `builders` (of engines), `cuda`,
        `models` (that ship with trtq).
    """
    packages = {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)}
    problems = [f"{name} is missing: pip install trtq" for name in _REQUIRED if not packages[name]]
    providers = _providers()
    if not providers:
        problems.append("no onnxruntime: pip install 'trtq[cpu]' (or [gpu])")
    runtimes = [
        name
        for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")
        if packages[name]
    ]
    if len(runtimes) > 1:
        problems.append(
            f"{' and '.join(runtimes)} install the same module over each other; keep one of them"
        )
    hints = []
    if any(not packages[name] for name in ("matplotlib", "jinja2")):
        hints.append("reports need matplotlib and jinja2: pip install 'trtq[eval]'")
    builders = [name for name, backend in BACKENDS.items() if backend.installed]
    if not builders:
        hints.append("engines need a builder: pip install 'trtq[rtx]'")
    if not (packages["cuda-bindings"] and packages["nvidia-cuda-nvrtc"]):
        hints.append("our own GPU kernels need NVRTC: pip install 'trtq[plugins]'")
    if not has_vnni():
        hints.append(
            "this CPU has no VNNI: the openvino provider runs weights of at most 7 bits in integers "
            "(w7a8, w4a8), 8-bit ones in float"
        )
    cuda = None
    if packages["torch"]:
        import torch

        cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    models = shipped_models()
    if not models:
        problems.append("the models that ship with trtq are not installed: install it again")
    return {
        "ok": not problems,
        "problems": problems,
        "hints": hints,
        "python": sys.version.split()[0],
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "vnni": has_vnni(),
        "cpu_features": sorted(processor_features()),
        "packages": packages,
        "providers": ["torch", *providers] if packages["torch"] else providers,
        "builders": builders,
        "cuda": cuda,
        "models": models,
    }
