"""A user's call in files: `call.json`, a PNG file per image, and one file of tensors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trtq.calls.form import flatten_value, rebuild_value
from trtq.calls.user_call import UserCall
from trtq.documents import check_depth, read_object
from trtq.errors import ArtefactError, UsageError

__all__ = ["CALL_FOLDER", "load_call", "save_call"]

CALL_FOLDER = "call"
_FILE = "call.json"
_TENSORS = "tensors.safetensors"
_IMAGE = re.compile(r"image-[0-9]{1,6}\.png")
_MAX_LEVELS = 24
_KINDS = ("tensor", "value", "list", "tuple", "dict", "object")


def save_call(call: UserCall, folder: Path) -> None:
    """Write a call into a new folder.

    Args:
        call: the call.
        folder: folder to create.

    Raises:
        UsageError: an argument is neither a number, a text, an image, a tensor nor a list of these.
    """
    from PIL import Image

    tensors: dict[str, Any] = {}
    objects: dict[str, Any] = {}
    template = {
        name: flatten_value(value, name, tensors, objects) for name, value in call.arguments.items()
    }
    images: dict[str, str] = {}
    folder.mkdir(parents=True)
    for text, value in objects.items():
        if not isinstance(value, Image.Image):
            argument = text.rpartition(" ")[2].partition(".")[0]
            raise UsageError(
                f"the argument {argument!r} is a {type(value).__name__}, which a run cannot hold; "
                "trtq takes numbers, texts, images, tensors, and lists of these"
            )
        images[text] = f"image-{len(images)}.png"
        value.save(folder / images[text], format="PNG")
    if tensors:
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(kept, folder / _TENSORS)
    record = {"arguments": template, "images": images}
    (folder / _FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_call(folder: Path) -> UserCall:
    """Read a call that `save_call` wrote.

    Raises:
        ArtefactError: a file is missing or damaged.
    """
    path = folder / _FILE
    record = read_object(path)
    try:
        check_depth(record, _MAX_LEVELS)
        template, images = record["arguments"], record["images"]
        _check(template)
        tensors: dict[str, torch.Tensor] = {}
        if (folder / _TENSORS).is_file():
            tensors = load_file(folder / _TENSORS)
        objects = {text: _image(folder, name) for text, name in images.items()}
        arguments = {
            name: rebuild_value(entry, tensors, objects) for name, entry in template.items()
        }
    except (KeyError, ValueError, TypeError, AttributeError, OSError, SafetensorError) as err:
        raise ArtefactError(f"{path} is damaged: {type(err).__name__}: {err}") from err
    return UserCall(arguments)


def _check(template: Any) -> None:
    """Raise ValueError unless every entry of a template is of a known kind."""
    for entry in template.values():
        ((kind, value),) = entry.items()
        if kind not in _KINDS:
            raise ValueError(f"an argument is of the unknown kind {kind!r}")
        if kind == "dict":
            _check(value)
        elif kind in ("list", "tuple"):
            _check({str(index): item for index, item in enumerate(value)})


def _image(folder: Path, name: str) -> Any:
    from PIL import Image

    if _IMAGE.fullmatch(name) is None:
        raise ValueError(f"{name!r} is not the name of an image of the call")
    with Image.open(folder / name) as image:
        image.load()
        return image
