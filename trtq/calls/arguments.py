"""Checks of single arguments of a pipeline's call."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable
from typing import Any

from trtq.documents import shown
from trtq.errors import UsageError

__all__ = ["check_type", "nearest_text", "type_text"]

_NUMBERS = ("int", "float", "bool")
_SIMPLE = re.compile(r"[A-Za-z_][A-Za-z_0-9.]*")
_WRAPPERS = ("Optional", "Union", "typing", "None", "NoneType")


def nearest_text(name: str, names: Iterable[str]) -> str:
    """A hint at the name that is spelt like a wrong one, or an empty text."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def type_text(parameter: inspect.Parameter) -> str:
    """The annotation of a parameter as text; empty without an annotation."""
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(typing|torch|numpy|np|PIL\.Image|PIL)\.(?=\w)", "", text)


def check_type(name: str, value: Any, parameter: inspect.Parameter) -> None:
    """Raise if an argument is no number or text though its annotation allows only these.

    Annotations of diffusers mix up `int` and `float`, so every number is accepted for either.

    Args:
        name: name of the argument.
        value: value of the argument.
        parameter: parameter of the pipeline's call.

    Raises:
        UsageError: the value is of another type; the message shows the type that is required.
    """
    text = type_text(parameter)
    kinds = [word for word in _SIMPLE.findall(text) if word not in _WRAPPERS]
    lists = "[" in re.sub(r"\b(Optional|Union)\[", "", text)
    if not kinds or lists or value is None or not all(k in (*_NUMBERS, "str") for k in kinds):
        return
    numbers = any(kind in _NUMBERS for kind in kinds)
    fits = (numbers and isinstance(value, int | float)) or (
        "str" in kinds and isinstance(value, str)
    )
    if not fits:
        given = (
            shown(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
        )
        raise UsageError(
            f"the argument {name!r} must be {text.replace(' | None', '')}, got {given}"
        )
