"""Report on the installed packages and on what can run on this machine."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from dataclasses import dataclass
from importlib import metadata

from trtq.checkpoint.shipped import shipped_models
from trtq.engine.extras import Extra, installed_extras
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.errors import KernelError, MissingDependencyError
from trtq.plugins.device import first_gpu
from trtq.plugins.driver import cuda_text, driver_cuda, old_driver
from trtq.processor import has_vnni, processor_features
from trtq.results import Result

__all__ = ["DoctorResult", "doctor"]

_REQUIRED = ("torch", "diffusers", "accelerate", "onnx", "onnxscript", "safetensors", "numpy")
_OPTIONAL = {
    "onnxruntime-openvino": "cpu",
    "onnxruntime-gpu": "gpu",
    "onnxruntime": "cpu",
    "tensorrt-rtx": "rtx",
    "cuda-bindings": "plugins",
    "nvidia-cuda-nvrtc": "plugins",
    "nvidia-cuda-nvrtc-cu12": "plugins",
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


def _torch_gpu() -> str | None:
    """The GPU that torch sees; torch's warnings are dropped, since `doctor` has hints for them."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
        except RuntimeError:
            return None


def _no_gpu() -> str | None:
    """Reason why no GPU can be used although there is a driver; None if a GPU can be used."""
    try:
        first_gpu()
    except KernelError as err:
        return str(err)
    return None


@dataclass(frozen=True, kw_only=True)
class DoctorResult(Result):
    """Installed packages, and what can run on this machine.

    Attributes:
        ok: whether there are no problems.
        problems: faults of the installation that prevent normal use, with remedies.
        hints: optional packages to install, and limitations of this machine.
        python: version of Python.
        machine: operating system, processor architecture and number of cores.
        vnni: whether the processor adds int8 products without saturation.
        cpu_features: instruction sets of `trtq.processor.FEATURES` that the processor supports.
        packages: installed version by package; None if it is not installed.
        providers: values of `--provider` that work here.
        builders: backends that can build engines here.
        cuda: name of the GPU that torch sees.
        driver: the NVIDIA driver and the CUDA version that it supports; None without a driver.
        models: models that ship with trtq.
        extras: the optional dependencies: what each adds, what is installed of it, and the command that
            installs it.
    """

    ok: bool
    problems: list[str]
    hints: list[str]
    python: str
    machine: str
    vnni: bool
    cpu_features: list[str]
    packages: dict[str, str | None]
    providers: list[str]
    builders: list[str]
    cuda: str | None
    driver: str | None
    models: list[str]
    extras: list[Extra]


def doctor() -> DoctorResult:
    """Report the installed packages and what can run on this machine; nothing is changed."""
    packages = {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)}
    providers = _providers()
    builders = [name for name, backend in BACKENDS.items() if backend.installed]
    cuda = _torch_gpu() if packages["torch"] else None
    driver = driver_cuda()
    models = shipped_models()
    problems = _package_problems(packages, providers)
    if not models:
        problems.append("the models that ship with trtq are not installed: install it again")
    return DoctorResult(
        ok=not problems,
        problems=problems,
        hints=[*_package_hints(packages, builders), *_device_hints(packages, driver, cuda)],
        python=sys.version.split()[0],
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        vnni=has_vnni(),
        cpu_features=sorted(processor_features()),
        packages=packages,
        providers=["torch", *providers] if packages["torch"] else providers,
        builders=builders,
        cuda=cuda,
        driver=None if driver is None else cuda_text(driver),
        models=models,
        extras=installed_extras(),
    )


def _package_problems(packages: dict[str, str | None], providers: list[str]) -> list[str]:
    """Missing or conflicting packages that prevent normal use."""
    problems = [f"{name} is missing: pip install trtq" for name in _REQUIRED if not packages[name]]
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
    return problems


def _package_hints(packages: dict[str, str | None], builders: list[str]) -> list[str]:
    """Hints about packages that would add a feature."""
    hints = []
    if any(not packages[name] for name in ("matplotlib", "jinja2")):
        hints.append("reports need matplotlib and jinja2: pip install 'trtq[eval]'")
    if not builders:
        hints.append("engines need a builder: pip install 'trtq[rtx]'")
    nvrtc = packages["nvidia-cuda-nvrtc"] or packages["nvidia-cuda-nvrtc-cu12"]
    if not (packages["cuda-bindings"] and nvrtc):
        hints.append("our own GPU kernels need NVRTC: pip install 'trtq[plugins]'")
    return hints


def _device_hints(
    packages: dict[str, str | None], driver: tuple[int, int] | None, cuda: str | None
) -> list[str]:
    """Hints about limitations of this machine's processor and GPU."""
    hints = []
    old = old_driver()
    if old is not None:
        hints.append(f"nothing of ours runs on the GPU: {old}")
    elif driver is not None and packages["cuda-bindings"]:
        why = _no_gpu()
        hints += [] if why is None else [f"nothing of ours runs on a GPU: {why}"]
    if not has_vnni():
        hints.append(
            "this CPU has no VNNI: the openvino provider runs weights of at most 7 bits in integers "
            "(w7a8, w4a8), 8-bit ones in float"
        )
    if driver is not None and packages["torch"] and cuda is None:
        hints.append(
            f"torch {packages['torch']} sees no GPU, so runs are computed on the CPU: install torch for "
            f"CUDA, of a version that the driver {cuda_text(driver)} takes"
        )
    return hints
