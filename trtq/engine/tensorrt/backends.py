"""Engine builders and their installed versions."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from trtq.errors import MissingDependencyError, UsageError

__all__ = ["BACKENDS", "CURRENT", "Backend", "check_architectures", "find_backend"]

CURRENT = "current"
"""The architecture of the GPU in the building machine."""


@dataclass(frozen=True)
class Backend:
    """A builder of engines.

    Attributes:
        name: value of `--backend`.
        module: name of the Python module.
        architectures: GPU architectures that the builder supports on any machine; empty: only the
            GPU in the building machine.
        default: architectures that engines are built for by default.
        install: how to install the builder.
    """

    name: Literal["tensorrt-rtx", "tensorrt"]
    module: str
    architectures: tuple[str, ...]
    default: tuple[str, ...]
    install: str

    @property
    def installed(self) -> bool:
        """Whether the module can be found; it is not imported."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def version(self) -> str:
        """Version of the installed package."""
        for name in metadata.packages_distributions().get(self.module, [self.module]):
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return "unknown"


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "tensorrt-rtx",
            "tensorrt_rtx",
            ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
            ("sm86", "sm89", "sm120"),
            "pip install 'trtq[rtx]'",
        ),
        Backend(
            "tensorrt",
            "tensorrt",
            (),
            (CURRENT,),
            "pip install 'trtq[trt]' (pip fetches its libraries from NVIDIA's package index)",
        ),
    )
}


def find_backend(name: str | None = None) -> Backend:
    """Find the builder with a name, or the first installed builder.

    Raises:
        UsageError: the name is unknown.
        MissingDependencyError: the named builder, or any builder, is not installed.
    """
    if name is not None and name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    candidates = BACKENDS.values() if name is None else [BACKENDS[name]]
    for backend in candidates:
        if backend.installed:
            return backend
    what = "neither TensorRT-RTX nor TensorRT is" if name is None else f"{name} is not"
    advice = " or ".join(backend.install for backend in candidates)
    raise MissingDependencyError(f"{what} installed: {advice}")


def check_architectures(backend: Backend, names: list[str]) -> list[str]:
    """Return the architectures to build for, without duplicates; the default for an empty list.

    Raises:
        UsageError: the backend cannot build for one of the architectures.
    """
    chosen = list(dict.fromkeys(name.lower().replace("_", "") for name in names))
    allowed = (*backend.architectures, CURRENT)
    for name in chosen:
        if name not in allowed:
            raise UsageError(
                f"{backend.name} cannot build for {name!r}; choose from {', '.join(allowed)}"
                + (" (the GPU of this machine)" if not backend.architectures else "")
            )
    if CURRENT in chosen and len(chosen) > 1:
        raise UsageError(
            f"{CURRENT!r} stands for the GPU of this machine, and cannot be one of several"
        )
    return chosen or list(backend.default)
