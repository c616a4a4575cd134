"""Types of the entries of a manifest: texts, names of files and layers, digests, numbers."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from trtq.documents import shown

__all__ = ["Bits", "Digest", "FileName", "Given", "ModulePath", "Number", "Text", "path_fault"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_WINDOWS = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_NAME_BYTES, _PATH_BYTES = 255, 2048
_TEXT = 4096


def path_fault(relative: str) -> str | None:
    """What is wrong with a relative file name; None if it is valid on every operating system."""
    if not relative or len(relative.encode("utf-8", "replace")) > _PATH_BYTES:
        return "is empty or too long"
    if _CONTROL.search(relative):
        return "holds a control character"
    if any(mark in relative for mark in ("\\", ":")) or relative.startswith("/"):
        return "leaves the folder"
    for part in relative.split("/"):
        if part == "..":
            return "leaves the folder"
        if part in ("", "."):
            return "is not in normal form"
        if _WINDOWS.fullmatch(part):
            return "is a device name on Windows"
        if part.endswith((".", " ")) or any(mark in part for mark in '<>"|?*'):
            return "is not valid on Windows"
        if len(part.encode("utf-8", "replace")) > _NAME_BYTES:
            return "is too long"
    return None


def _text(value: str) -> str:
    if _CONTROL.search(value):
        raise ValueError("it holds a control character")
    try:
        value.encode()
    except UnicodeEncodeError as err:
        raise ValueError("it contains half of a surrogate pair") from err
    return value


def _file_name(value: str) -> str:
    fault = path_fault(value)
    if fault is not None:
        raise ValueError(f"the name of the file {shown(value)} {fault}; do not use it")
    return value


Text = Annotated[str, Field(strict=True, max_length=_TEXT), AfterValidator(_text)]
Given = Annotated[str, Field(strict=True, max_length=_TEXT, pattern=r"^[^\x00]*$")]
"""A name or path given by the user, whose folders may have any name."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Bits = Annotated[int, Field(strict=True, ge=2, le=8)]
Digest = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]
ModulePath = Annotated[
    str, Field(strict=True, max_length=512, pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$")
]
FileName = Annotated[str, Field(strict=True), AfterValidator(_file_name)]
