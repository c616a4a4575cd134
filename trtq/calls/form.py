"""The form of a denoiser's call: its tensors by path, and the template around them.

A call `unet(x, t, added_cond_kwargs={"text_embeds": e})` consists of the tensors `sample`, `timestep`
and `added_cond_kwargs.text_embeds`, and of a template that says where they belong. The template also
holds everything that is not a tensor: numbers, texts, None and the nesting. Calls with the same template
can share a graph, whose inputs are the tensors.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from trtq.errors import ArtefactError, UsageError

__all__ = ["CallForm", "flatten_call", "flatten_value", "rebuild_value", "result_tensors"]

Entry = dict[str, Any]
"""Entry of a template, see `CallForm`."""
_MAX_DEPTH = 16


@dataclass(frozen=True)
class CallForm:
    """Everything about a call except the values of its tensors.

    Attributes:
        template: JSON object of the arguments by name. A tensor is `{"tensor": path}`, a constant
            `{"value": v}`; `{"list": [...]}`, `{"tuple": [...]}` and `{"dict": {...}}` nest them;
            `{"object": text}` is a value that JSON cannot hold.
        objects: the values behind `{"object": text}`, by text; empty for a form that was read from a
            file.
    """

    template: dict[str, Any]
    objects: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def key(self) -> str:
        """Text that is equal for calls that can share a graph."""
        return json.dumps(self.template, sort_keys=True)

    @property
    def names(self) -> list[str]:
        """Paths of the tensors, in the order of the arguments."""
        paths: list[str] = []
        _visit(self.template, lambda kind, value: paths.append(value) if kind == "tensor" else None)
        return paths

    @property
    def opaque(self) -> list[str]:
        """Descriptions of the values that only this process can pass."""
        texts: list[str] = []
        _visit(self.template, lambda kind, value: texts.append(value) if kind == "object" else None)
        return texts

    def rebuild(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of the call.

        Args:
            tensors: the tensors by path.

        Raises:
            ArtefactError: the call holds a value that cannot be read from a file.
        """
        return {
            name: rebuild_value(entry, tensors, self.objects)
            for name, entry in self.template.items()
        }


def _visit(template: Any, seen: Callable[[str, Any], None]) -> None:
    """Call `seen(kind, value)` for each tensor, constant and object of a template, in order."""
    for entry in template.values():
        ((kind, value),) = entry.items()
        if kind in ("list", "tuple"):
            _visit({str(index): item for index, item in enumerate(value)}, seen)
        elif kind == "dict":
            _visit(value, seen)
        else:
            seen(kind, value)


def rebuild_value(entry: Any, tensors: Mapping[str, Any], objects: Mapping[str, Any]) -> Any:
    """The value that an entry of a template describes.

    Args:
        entry: entry of a template, see `CallForm`.
        tensors: values of the tensors by path.
        objects: values of the objects by text.

    Raises:
        ArtefactError: the entry is an object without a value.
    """
    ((kind, value),) = entry.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "object":
        if value not in objects:
            raise ArtefactError(f"the call passes {value}, which no file can hold")
        return objects[value]
    if kind == "dict":
        return {key: rebuild_value(item, tensors, objects) for key, item in value.items()}
    if kind in ("list", "tuple"):
        items = [rebuild_value(item, tensors, objects) for item in value]
        return items if kind == "list" else tuple(items)
    return value


def flatten_value(
    value: Any, path: str, tensors: dict[str, Any], objects: dict[str, Any], depth: int = 0
) -> Entry:
    """Entry of a template for a value; tensors and objects are added to the given dicts.

    Args:
        value: any value.
        path: path of the value.
        tensors: receives the tensors by path.
        objects: receives other values by text.
        depth: nesting of the value.

    Raises:
        UsageError: the value is nested too deep.
    """
    if depth > _MAX_DEPTH:
        raise UsageError(f"the argument {path.partition('.')[0]!r} is nested too deep")
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}

    def inner(key: Any, item: Any) -> dict[str, Any]:
        return flatten_value(item, f"{path}.{key}", tensors, objects, depth + 1)

    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: inner(key, item) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [inner(index, item) for index, item in enumerate(value)]}
    text = f"{type(value).__module__}.{type(value).__qualname__} {path}"
    objects[text] = value
    return {"object": text}


def flatten_call(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    numbers: frozenset[str] = frozenset(),
) -> tuple[CallForm, dict[str, Tensor]]:
    """Form and tensors of one call.

    Args:
        module: the denoiser.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call; `return_dict` is left out.
        numbers: names of arguments whose numbers become tensors, such as the timestep.

    Returns:
        The form, and the tensors by path; they are not copied.
    """
    # A stand-in has the class of its model, whose forward names the arguments.
    forward: Any = module.__class__.forward
    names = [name for name in inspect.signature(forward).parameters if name != "self"]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    given.pop("return_dict", None)
    tensors: dict[str, Tensor] = {}
    objects: dict[str, Any] = {}
    template = {}
    for name, value in given.items():
        if name in numbers and isinstance(value, int | float) and not isinstance(value, bool):
            value = torch.tensor(float(value))
        template[name] = flatten_value(value, name, tensors, objects)
    return CallForm(template, objects), tensors


def result_tensors(result: Any) -> Iterator[Tensor]:
    """The tensors of a denoiser's result, in order."""
    if hasattr(result, "to_tuple"):
        result = result.to_tuple()
    for leaf in _pytree.tree_leaves(result):
        if isinstance(leaf, Tensor):
            yield leaf
