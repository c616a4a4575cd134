"""Find and check a LoRA file, which must be a regular and complete safetensors file."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtq.errors import ArtefactError

__all__ = ["check_regular", "locate", "read_header"]

_MAX_HEADER = 100_000_000
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_LFS = b"version https://git-lfs"


def check_regular(path: Path, what: str) -> None:
    """Raise unless a path is a regular file, without opening it.

    Args:
        path: path to check.
        what: kind of file, used in messages.

    Raises:
        ArtefactError: the path does not exist, or is a folder, a pipe, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as err:
        raise ArtefactError(f"there is no {what} {path}") from err
    if not stat.S_ISREG(mode):
        raise ArtefactError(f"{path} is not a file (a pipe, a socket or a device); give a {what}")


def locate(path: Path) -> Path:
    """The LoRA file at a path: the file itself, or the only LoRA in a folder.

    Raises:
        ArtefactError: there is no LoRA file, or more than one.
    """
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError) as err:
        raise ArtefactError(f"there is no LoRA file {path}") from err
    if not is_folder:
        check_regular(path, "LoRA file")
        return path
    names = sorted(file.name for file in path.iterdir())
    for usual in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        if usual in names:
            check_regular(path / usual, "LoRA file")
            return path / usual
    files = [name for name in names if name.endswith(".safetensors")]
    if len(files) == 1:
        check_regular(path / files[0], "LoRA file")
        return path / files[0]
    if files:
        raise ArtefactError(
            f"{path} holds {len(files)} files; give one of them: {', '.join(files[:4])}"
        )
    pickled = [name for name in names if Path(name).suffix in _PICKLED]
    inside = [name for name in names if (path / name / "adapter_config.json").is_file()]
    if inside:
        hint = f"its adapters are in folders; give {path / inside[0]}"
    elif pickled:
        hint = f"{pickled[0]} is a pickle, which can run any code: save it as safetensors"
    else:
        hint = "give a .safetensors file, or a folder that PEFT or diffusers wrote"
    raise ArtefactError(f"the folder {path} holds no adapter_model.safetensors: {hint}")


def read_header(path: Path) -> Mapping[str, Any]:
    """The header of a safetensors file: dtype and shape of every tensor, and the metadata.

    Raises:
        ArtefactError: the file is not a complete safetensors file.
    """
    text = _header_text(path)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name appears twice")
        return entries

    try:
        header = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as err:
        raise ArtefactError(
            f"{path} is not a safetensors file (its header is damaged: {err})"
        ) from err
    if not isinstance(header, dict) or not all(isinstance(row, dict) for row in header.values()):
        raise ArtefactError(
            f"{path} is not a safetensors file (its header is not a table of tensors)"
        )
    return header


def _header_text(path: Path) -> bytes:
    """The JSON text of a safetensors header.

    Raises:
        ArtefactError: the file cannot be read, or is not a complete safetensors file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
            size = path.stat().st_size
            if not start:
                raise ArtefactError(f"{path} is empty; give a .safetensors file of a LoRA")
            if start.startswith(_LFS):
                raise ArtefactError(
                    f"{path} is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"
                )
            # The file begins with the header's length, whose bytes may look like a pickle.
            if start[8:9] != b"{" and (
                path.suffix in _PICKLED or start.startswith((b"PK\x03\x04", b"\x80"))
            ):
                raise ArtefactError(
                    f"{path} is a pickle, not a safetensors file; LoRAs are read from safetensors only, "
                    "since a pickle can run any code: save it as safetensors"
                )
            length = int.from_bytes(start[:8], "little")
            if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
                raise ArtefactError(f"{path} is not a safetensors file, or is cut short")
            file.seek(8)
            return file.read(length)
    except OSError as err:
        raise ArtefactError(f"{path} cannot be read ({err.strerror or err})") from err
