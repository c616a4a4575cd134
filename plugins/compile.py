"""Compilation of CUDA C to cubins with NVRTC, which needs no GPU, no driver and no nvcc.

The user's cache holds cubins under a hash of all inputs of the compilation. A cubin is compiled at its
first use, or in advance by `trtq plugins build`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from trtq.documents import shown
from trtq.errors import KernelError, MissingDependencyError, UsageError
from trtq.plugins.variants import ARCHITECTURES, Variant, all_variants, fused_variants
from trtq.progress import ProgressCallback, silent
from trtq.resources import cache_folder

__all__ = ["build_all", "cubin", "nvrtc_version", "ptx", "sources"]

_FOLDER = Path(__file__).parent
_HEADERS = ("ptx.cuh", "codes.cuh")
_ARCHITECTURE = re.compile(r"sm[1-9][0-9]{1,2}[af]?")
_OPTIONS = ("--std=c++17", "--extra-device-vectorization")


def sources(kernel: str) -> dict[str, str]:
    """Source files of a kernel by name; the main file is `kernel.cu`."""
    shared = [_FOLDER / "cuda" / name for name in _HEADERS]
    specific = [*sorted((_FOLDER / kernel).glob("*.cuh")), _FOLDER / kernel / "kernel.cu"]
    return {path.name: path.read_text(encoding="utf-8") for path in [*shared, *specific]}


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as err:
        raise MissingDependencyError(
            "kernels are compiled by NVRTC, which is not installed: pip install 'trtq[plugins]'"
        ) from err
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as err:  # The library itself is missing.
        raise MissingDependencyError(
            "kernels are compiled by NVRTC, whose library is not installed: pip install "
            "nvidia-cuda-nvrtc, or for a driver below 580 nvidia-cuda-nvrtc-cu12"
        ) from err
    return nvrtc


@cache
def nvrtc_version() -> tuple[int, int]:
    """Major and minor version of the installed NVRTC.

    Raises:
        MissingDependencyError: NVRTC is not installed.
    """
    _, major, minor = _nvrtc().nvrtcVersion()
    return int(major), int(minor)


def _version() -> str:
    return "{}.{}".format(*nvrtc_version())


def cubin(variant: Variant, architecture: str) -> bytes:
    """The cubin of a kernel for an architecture, from the cache or newly compiled.

    Args:
        variant: variant of the kernel.
        architecture: one of `ARCHITECTURES`, or another architecture that NVRTC supports, e.g. `sm87`.

    Raises:
        MissingDependencyError: the kernel is not cached and NVRTC is not installed.
        KernelError: NVRTC cannot compile the kernel.
    """
    key = _key(variant, architecture)
    try:
        path = cache_folder("kernels") / f"{key}.cubin"
        return path.read_bytes()
    except OSError:
        pass
    except RuntimeError:  # The user has no home folder.
        return _compile(variant, architecture)
    code = _compile(variant, architecture)
    _keep(path, code)
    return code


def _key(variant: Variant, architecture: str) -> str:
    record = [sources(variant.kernel), variant.defines, architecture, _OPTIONS, _version()]
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return f"{variant}-{architecture}-{digest[:16]}"


def _keep(path: Path, code: bytes) -> None:
    """Write a temporary file and rename it; do nothing if the cache is not writable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(code)
            Path(partial).replace(path)
        finally:
            Path(partial).unlink(missing_ok=True)
    except OSError:
        return


_PTX_VERSIONS = {
    "sm75": b"6.5",
    "sm80": b"7.0",
    "sm86": b"7.1",
    "sm87": b"7.4",
    "sm89": b"7.8",
    "sm90": b"7.8",
    "sm100": b"8.6",
    "sm103": b"8.8",
    "sm110": b"9.0",
    "sm120": b"8.7",
    "sm121": b"8.8",
}
"""First PTX version that supports an architecture and the instructions of the kernels; every driver
that supports the GPU accepts this version."""


def ptx(variant: Variant, architecture: str) -> bytes:
    """The PTX of a kernel, which later GPUs and TensorRT's loader accept; not cached.

    NVRTC marks its PTX with the newest PTX version, which only drivers of the same or a later minor
    CUDA version accept (for cubins the minor version does not matter). The version is therefore
    replaced with the one that introduced the architecture.

    Arguments and errors are those of `cubin`.
    """
    code = _compile(variant, architecture.replace("sm", "compute"), "PTX")
    version = _PTX_VERSIONS.get(architecture)
    if version is None:  # A later GPU, whose driver is recent enough.
        return code
    return re.sub(rb"(?m)^\.version \S+$", b".version " + version, code, count=1)


def _compile(variant: Variant, architecture: str, form: str = "CUBIN") -> bytes:
    nvrtc = _nvrtc()
    files = {name: text.encode() for name, text in sources(variant.kernel).items()}
    main = files.pop("kernel.cu")
    status, program = nvrtc.nvrtcCreateProgram(
        main, b"kernel.cu", len(files), list(files.values()), [name.encode() for name in files]
    )
    _check(nvrtc, status, f"{variant} cannot be read")
    try:
        name = re.sub(r"(?<=[a-z])(?=\d)", "_", architecture, count=1)
        options = [f"--gpu-architecture={name}", *_OPTIONS]
        options += [f"-D{macro}={value}" for macro, value in variant.defines.items()]
        (status,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        what = f"NVRTC {_version()} cannot compile {variant} for {architecture}"
        _check(nvrtc, status, f"{what}: {_log(nvrtc, program)}")
        status, size = getattr(nvrtc, f"nvrtcGet{form}Size")(program)
        _check(nvrtc, status, what)
        code = bytes(size)
        (status,) = getattr(nvrtc, f"nvrtcGet{form}")(program, code)
        _check(nvrtc, status, what)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code


def _log(nvrtc: Any, program: Any) -> str:
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    text = bytes(size)
    nvrtc.nvrtcGetProgramLog(program, text)
    lines = text.decode(errors="replace").strip("\0\n ").splitlines()
    errors = [line for line in lines if "error" in line]
    return " / ".join((errors or lines)[:3])


def _check(nvrtc: Any, status: Any, what: str) -> None:
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(f"{what} ({status.name})")


def build_all(
    architectures: tuple[str, ...] = ARCHITECTURES, progress: ProgressCallback = silent
) -> dict[str, list[str]]:
    """Compile every variant for every architecture in advance.

    Args:
        architectures: architectures, e.g. `sm89`.
        progress: callback with the stage's name, the completed work and the total.

    Returns:
        Names of the variants by architecture.

    Raises:
        MissingDependencyError: NVRTC is not installed.
        UsageError: a name is not the name of an architecture.
        KernelError: NVRTC does not support an architecture.
    """
    for name in architectures:
        if _ARCHITECTURE.fullmatch(name) is None:
            raise UsageError(
                f"unknown architecture {shown(name)}; choose one like {', '.join(ARCHITECTURES)}"
            )
    wanted = [
        (name, variant)
        for name in architectures
        for variant in (*all_variants(name), *fused_variants(name))
    ]
    built: dict[str, list[str]] = {name: [] for name in architectures}
    for index, (architecture, variant) in enumerate(wanted):
        progress("plugins build", index, len(wanted))
        cubin(variant, architecture)
        built[architecture].append(str(variant))
    progress("plugins build", len(wanted), len(wanted))
    return built
