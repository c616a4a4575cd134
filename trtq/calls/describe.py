"""What a pipeline's call takes, and a call's arguments, as texts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from trtq.calls.arguments import type_text
from trtq.calls.user_call import UserCall, accepted_arguments
from trtq.documents import shown
from trtq.results import Result

__all__ = ["CallArgument", "CallDescription", "argument_text", "describe_call"]

_HIDDEN = ("generator", "return_dict")
_MAX_TEXT = 160
_ENTRY = re.compile(r"^(\s*)(\w+)\s*(?:\(.*)?:\s*$|^(\s*)(\w+)\s*\([^)]*\):\s*(\S.*)$")
_SENTENCE = re.compile(r"(?<=[.!?])\s")


@dataclass(frozen=True, kw_only=True)
class CallArgument(Result):
    """An argument of a pipeline's call.

    Attributes:
        name: name of the argument.
        type: type of the argument, as diffusers annotates it; empty if it does not.
        required: whether the call needs the argument.
        default: value without the argument, as text; None if the argument is required.
        text: first sentence of its documentation; empty if there is none.
        value: value in the recorded call, as text; None if the call does not pass the argument.
    """

    name: str
    type: str
    required: bool
    default: str | None
    text: str
    value: str | None


@dataclass(frozen=True, kw_only=True)
class CallDescription(Result):
    """What a pipeline's call takes.

    Attributes:
        pipeline: class of the pipeline.
        recorded: whether the values come from the call that was recorded for the artefact.
        arguments: arguments of the call, in the order of the signature.
    """

    pipeline: str
    recorded: bool
    arguments: list[CallArgument]


def describe_call(pipeline_class: type, call: UserCall | None = None) -> CallDescription:
    """Describe a pipeline's call.

    Args:
        pipeline_class: class of the pipeline.
        call: the recorded call; None: there is none.
    """
    texts = _documented(inspect.getdoc(pipeline_class.__call__) or "")
    given: Mapping[str, Any] = {} if call is None else call.arguments
    rows = []
    for name, parameter in accepted_arguments(pipeline_class).items():
        if name in _HIDDEN or name.startswith("callback"):
            continue
        required = parameter.default is inspect.Parameter.empty
        rows.append(
            CallArgument(
                name=name,
                type=type_text(parameter),
                required=required,
                default=None if required else argument_text(parameter.default),
                text=texts.get(name, ""),
                value=argument_text(given[name]) if name in given else None,
            )
        )
    return CallDescription(
        pipeline=pipeline_class.__name__, recorded=call is not None, arguments=rows
    )


def argument_text(value: Any) -> str:
    """A value for people: pictures and tensors by their size, other values as they are."""
    if isinstance(value, Tensor | np.ndarray):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{list(value.shape)}"
    if hasattr(value, "getbands") and hasattr(value, "size"):
        return f"picture {value.width}x{value.height} (WIDTHxHEIGHT)"
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float | str):
        return f"list of {len(value)}: {argument_text(value[0])}"
    return shown(value)


def _documented(text: str) -> dict[str, str]:
    """The first sentence about each argument of a docstring in the style of diffusers."""
    entries: dict[str, list[str]] = {}
    current: list[str] | None = None
    indent = -1
    for line in text.partition("Args:")[2].partition("Returns:")[0].splitlines():
        depth = len(line) - len(line.lstrip())
        match = _ENTRY.match(line)
        if match is not None and (indent < 0 or depth <= indent):
            name, same_line = match[2] or match[4], match[5]
            indent = depth
            current = entries.setdefault(name, [])
            if same_line:
                current.append(same_line)
        elif current is not None and line.strip():
            current.append(line.strip())
    return {name: _first_sentence(" ".join(lines)) for name, lines in entries.items()}


def _first_sentence(text: str) -> str:
    sentence = _SENTENCE.split(text, maxsplit=1)[0].replace("`", "")
    return sentence if len(sentence) <= _MAX_TEXT else f"{sentence[:_MAX_TEXT]} ..."
