"""What can be read of a diffusers folder without torch and diffusers: its files, sizes, classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trtq.diffusion.weights import check_pointers, is_pointer
from trtq.errors import ArtefactError, UsageError

__all__ = [
    "CLASSES_NAME",
    "INDEX_NAME",
    "class_names",
    "parse_size",
    "parse_sizes",
    "read_json",
    "read_null_class",
]

INDEX_NAME = "model_index.json"
CLASSES_NAME = "classes.json"
_JSON_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ArtefactError: it cannot be read, or holds something else.
    """
    if is_pointer(path):
        check_pointers(path.parent)
    try:
        # A pipe or a device would be waited for, or read without end.
        if path.exists() and not path.is_file():
            raise ArtefactError(f"cannot read {path}: it is no regular file")
        if path.stat().st_size > _JSON_BYTES:
            raise ArtefactError(f"cannot read {path}: it is larger than {_JSON_BYTES:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as err:
        raise ArtefactError(f"cannot read {path}: it is nested too deeply") from err
    except OSError as err:
        raise ArtefactError(f"cannot read {path}: {err.strerror}") from err
    except ValueError as err:
        raise ArtefactError(f"cannot read {path}: it is no JSON ({err})") from err
    if not isinstance(found, dict):
        raise ArtefactError(f"{path} holds no object")
    return found


def read_null_class(folder: Path) -> int | None:
    """The label that means "no class", from a folder's `classes.json`; None without one.

    Raises:
        ArtefactError: the file does not hold a label.
    """
    path = folder / CLASSES_NAME
    if not path.is_file():
        return None
    found = read_json(path)
    if "null_class" not in found:
        raise ArtefactError(f"cannot read {path}: 'null_class' is missing")
    null_class = found["null_class"]
    if null_class is not None and not isinstance(null_class, int):
        raise ArtefactError(f"{path}: null_class is a label or null, got {null_class!r}")
    return null_class


def class_names(folder: Path | None, count: int) -> list[str]:
    """Names of a model's classes, from its `classes.json`; their numbers where it has none.

    Raises:
        ArtefactError: the file holds something else, or too few.
    """
    path = None if folder is None else folder / CLASSES_NAME
    labels = None if path is None or not path.is_file() else read_json(path).get("labels")
    if labels is None:
        return [str(label) for label in range(count)]
    if not isinstance(labels, list) or len(labels) < count:
        raise ArtefactError(f"{path}: labels are the names of {count} classes, got {labels!r}")
    return [str(label) for label in labels[:count]]


def parse_size(text: str) -> tuple[int, int]:
    """`512x768` -> (512, 768), height and width in pixels.

    Raises:
        UsageError: not of that form.
    """
    height, _, width = text.lower().partition("x")
    try:
        size = int(height), int(width)
    except ValueError:
        size = 0, 0
    if min(size) < 1:
        raise UsageError(f"the size {text!r} is not understood; write HEIGHTxWIDTH, e.g. 512x512")
    return size


def parse_sizes(text: str) -> tuple[str, str]:
    """`512x512:1024x1024` -> the smallest and the largest size; `512x512` -> twice the same.

    Raises:
        UsageError: not of that form, or the second is smaller.
    """
    low, _, high = text.partition(":")
    high = high or low
    if any(a > b for a, b in zip(parse_size(low), parse_size(high), strict=True)):
        raise UsageError(
            f"the sizes {text!r} shrink; write SMALLEST:LARGEST, e.g. 512x512:1024x768"
        )
    return low, high
