"""The optional dependencies of trtq: what each adds, what is installed of it, and how to install it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata

from trtq.results import Result

__all__ = ["EXTRAS", "Extra", "installed_extras"]


@dataclass(frozen=True)
class _Package:
    """A package of an extra.

    Attributes:
        name: name in the package index.
        low: first version that trtq uses; empty: any.
        below: first version that trtq does not use; empty: none.
    """

    name: str
    low: str = ""
    below: str = ""


_POLYGRAPHY = _Package("polygraphy", "0.53.6")
EXTRAS: dict[str, tuple[str, tuple[_Package, ...]]] = {
    "cpu": (
        "runs ONNX folders on the CPU: --provider cpu, openvino",
        (_Package("onnxruntime-openvino", "1.23"),),
    ),
    "gpu": (
        "runs ONNX folders on an NVIDIA GPU: --provider cuda",
        (_Package("onnxruntime-gpu", "1.23"), _Package("nvidia-ml-py", "12")),
    ),
    "rtx": (
        "trtq build without a GPU, for RTX 20 and later",
        (_Package("tensorrt-rtx", "1.7", "1.8"), _POLYGRAPHY),
    ),
    "trt": (
        "trtq build --backend tensorrt, on and for the GPU of this machine",
        (_Package("tensorrt", "10.13", "12"), _POLYGRAPHY),
    ),
    "polygraphy": ("trtq verify --against; trtq inspect of graphs", (_POLYGRAPHY,)),
    "modelopt": (
        "NVIDIA's own quantisation, to compare with",
        (_Package("nvidia-modelopt", "0.47", "1"),),
    ),
    "plugins": (
        "trtq's CUDA kernels: --target plugin, --provider torch",
        (_Package("cuda-bindings", "12.8"), _Package("nvidia-cuda-nvrtc", "13")),
    ),
    "eval": (
        "reports, plots and Fréchet distances",
        (
            _Package("jinja2", "3.1"),
            _Package("matplotlib", "3.8"),
            _Package("torchmetrics", "1.4"),
        ),
    ),
    "serve": ("trtq serve", (_Package("fastapi", "0.115"), _Package("uvicorn", "0.34"))),
    "ray": ("trtq serve --ray", (_Package("ray", "2.60"),)),
    "video": ("MP4 files", (_Package("imageio", "2.34"), _Package("imageio-ffmpeg", "0.5"))),
}
"""Purpose and packages of each extra. Extras for developers are left out."""
_ALTERNATIVES = {
    "onnxruntime-openvino": ("onnxruntime",),
    "nvidia-cuda-nvrtc": ("nvidia-cuda-nvrtc-cu12",),
}
"""Packages that serve instead of another one, in any version."""


@dataclass(frozen=True, kw_only=True)
class Extra(Result):
    """An optional dependency.

    Attributes:
        name: name of the extra, as in `pip install 'trtq[NAME]'`.
        adds: what it adds.
        packages: installed version by package; None if it is not installed.
        ok: whether all packages are installed in versions that trtq uses.
        problem: what is missing or of a wrong version; None if nothing is.
        install: the command that installs or updates it.
    """

    name: str
    adds: str
    packages: dict[str, str | None]
    ok: bool
    problem: str | None
    install: str


def installed_extras() -> list[Extra]:
    """What is installed of each extra."""
    return [_extra(name, adds, packages) for name, (adds, packages) in EXTRAS.items()]


def _extra(name: str, adds: str, packages: tuple[_Package, ...]) -> Extra:
    versions, problems = {}, []
    for package in packages:
        version = _version(package.name)
        versions[package.name] = version
        others = {other: _version(other) for other in _ALTERNATIVES.get(package.name, ())}
        instead = {other: present for other, present in others.items() if present is not None}
        if version is None and instead:
            versions.update(instead)
        elif version is None:
            problems.append(f"{package.name} is not installed")
        elif not _fits(version, package):
            limits = f">={package.low}" + (f",<{package.below}" if package.below else "")
            problems.append(f"{package.name} {version} is not {limits}")
    return Extra(
        name=name,
        adds=adds,
        packages=versions,
        ok=not problems,
        problem="; ".join(problems) or None,
        install=f"pip install -U 'trtq[{name}]'",
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _fits(version: str, package: _Package) -> bool:
    number = _numbers(version)
    return number >= _numbers(package.low) and (
        not package.below or number < _numbers(package.below)
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
