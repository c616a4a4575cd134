"""Headers of safetensors files: names, shapes and dtypes of tensors.

This module does not import torch and reads no tensor. A file whose content does not match its name is
refused before anything is built from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtq.errors import ArtefactError

__all__ = ["FLOATS", "TensorInfo", "Weights", "check_pointers", "is_pointer", "read_header"]

_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
_HEADER_BYTES = 100_000_000
"""Maximum size of a header; the reference implementation of safetensors has the same limit."""
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8,
    "U64": 8, "F64": 8, "C64": 8, "C128": 16,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3")
"""Supported dtypes of weights; all are read as float32."""


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of one tensor.

    Attributes:
        dtype: dtype in safetensors' notation: `F32`, `BF16`, `I64`, ...
        shape: sizes of the axes, in elements.
        file: file that holds the tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return math.prod(self.shape) * _BYTES[self.dtype]


@dataclass(frozen=True)
class Weights:
    """Headers of the weights of one component.

    Attributes:
        tensors: header entries by tensor name.
        variant: variant of the file name, `fp16` in `model.fp16.safetensors`; None for a plain name.
    """

    tensors: dict[str, TensorInfo]
    variant: str | None

    @property
    def nbytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer, a few lines of text in place of the real file.

    Raises:
        ArtefactError: the file cannot be read.
    """
    try:
        if not path.is_file() or path.stat().st_size > _POINTER_BYTES:
            return False
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError as err:
        raise ArtefactError(f"cannot read {path}: {err.strerror}") from err


def check_pointers(folder: Path) -> None:
    """Raise if a component's folder holds Git LFS pointers instead of files.

    Raises:
        ArtefactError: a file is a pointer or cannot be read; the message names the first one.
    """
    try:
        files = sorted(folder.iterdir())
    except OSError as err:
        raise ArtefactError(f"cannot read {folder}: {err.strerror}") from err
    for path in files:
        if is_pointer(path):
            raise ArtefactError(
                f"{path} is a Git LFS pointer, not the file itself; install git-lfs and run `git "
                "lfs pull` in the clone, or download the repository with `hf download`"
            )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{duplicate!r} occurs more than once")
    return entries


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file; the header is checked against the size of the file.

    Raises:
        ArtefactError: the file cannot be read, is cut short, or has an invalid header.
    """
    if not path.is_file():
        raise ArtefactError(f"there is no file {path}")
    if is_pointer(path):
        check_pointers(path.parent)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if size < 10:
                raise ArtefactError(
                    f"{path} is not a safetensors file: its size is {size} bytes; download it again"
                )
            if not 2 <= length <= min(size - 8, _HEADER_BYTES):
                raise ArtefactError(
                    f"{path} is not a complete safetensors file: its first bytes announce a header of "
                    f"{length:,} bytes, but the file has {size:,} bytes{_other_format(start)}; "
                    "download it again"
                )
            raw = file.read(length)
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as err:
        raise ArtefactError(f"cannot read {path}: {err.strerror}") from err
    except (ValueError, RecursionError) as err:
        raise ArtefactError(
            f"{path} is not a safetensors file: its header is damaged ({err}); download it again"
        ) from err
    if not isinstance(header, dict):
        raise ArtefactError(
            f"{path} is not a safetensors file: its header is not a JSON object; download it again"
        )
    return dict(_entries(path, header, size - 8 - length))


def _other_format(start: bytes) -> str:
    """The format that the first bytes of a file indicate, in brackets, or an empty string."""
    if start.startswith(b"GGUF"):
        return " (it is GGUF)"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return " (it is a pickle from torch.save)"
    return " (it is text)" if start.isascii() and start.decode("ascii").isprintable() else ""


def _entries(path: Path, header: dict[str, Any], size: int) -> Iterator[tuple[str, TensorInfo]]:
    """The checked entries of a header; `size` is the size of the file's data, in bytes."""
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict):
            raise ArtefactError(f"{path}: the header entry of {name!r} is not a JSON object")
        dtype: Any = entry.get("dtype")
        shape: Any = entry.get("shape")
        offsets: Any = entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _BYTES:
            raise ArtefactError(f"{path}: {name!r} has the unknown dtype {dtype!r}")
        if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
            raise ArtefactError(
                f"{path}: the header entry of {name!r} is damaged: shape {shape!r}, offsets "
                f"{offsets!r}"
            )
        tensor = TensorInfo(dtype, tuple(shape), path)
        if offsets[1] - offsets[0] != tensor.nbytes:
            raise ArtefactError(
                f"{path}: {name!r} has {tensor.nbytes:,} bytes by its shape but "
                f"{offsets[1] - offsets[0]:,} by its offsets"
            )
        if offsets[1] > size:
            raise ArtefactError(
                f"{path} is cut short: {name!r} ends at byte {offsets[1]:,}, but the file holds "
                f"{size:,} bytes of data; download it again"
            )
        yield name, tensor


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values
    )
