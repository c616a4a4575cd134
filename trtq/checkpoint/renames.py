"""Inverse of a conversion that renames tensors by tables of replacements, by trying.

The replacements are read from the source text of diffusers' conversion; a candidate counts only if the
conversion itself turns it into the name that is looked for.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any

from trtq.checkpoint.conversion_probe import ConversionError, run_conversion

__all__ = ["renamed_original"]

_MAX_CANDIDATES = 4096
_MORE = (
    ("query_norm.scale", "query_norm.weight"),
    ("key_norm.scale", "key_norm.weight"),
    ("double_blocks", "transformer_blocks"),
    ("single_blocks", "single_transformer_blocks"),
    ("txt_attn.qkv", "attn.add_q_proj"),
    ("txt_attn.qkv", "attn.add_k_proj"),
    ("txt_attn.qkv", "attn.add_v_proj"),
    ("img_attn.qkv", "attn.to_q"),
    ("img_attn.qkv", "attn.to_k"),
    ("img_attn.qkv", "attn.to_v"),
    ("blocks.", "transformer_blocks."),
)
"""Replacements that some conversions do by other means than tables."""
_WAN = ("head.head.", "head.modulation")
"""Names of Wan where another name has the same replacement."""


def renamed_original(
    convert: Callable[..., Any], name: str, config: Mapping[str, Any], known: dict[str, list[int]]
) -> str:
    """The name of the file's tensor that a conversion turns into `name`, perhaps with other tensors.

    Args:
        convert: a `checkpoint_mapping_fn` of diffusers.
        name: name of a tensor of the model.
        config: configuration of the model.
        known: replacements that fitted names of the same form, by form; extended here.

    Raises:
        ConversionError: no candidate is converted to the name.
    """
    pairs = _replacements(convert)
    form = re.sub(r"\.\d+(?=\.)", ".#", name)
    if form in known:
        candidate = _apply(name, pairs, known[form])
        if candidate is not None and _gives(convert, candidate, name, config):
            return candidate
    fitting = [
        (candidate, used)
        for candidate, used in islice(_candidates(name, pairs, len(pairs)), _MAX_CANDIDATES)
        if _gives(convert, candidate, name, config)
    ]
    if not fitting:
        raise ConversionError(f"no name is converted to {name!r}")
    # The longer the replaced texts, the less likely they fit by chance.
    candidate, known[form] = max(
        fitting,
        key=lambda pair: (pair[0].startswith(_WAN), sum(len(pairs[i][1]) for i in pair[1])),
    )
    return candidate


def _gives(
    convert: Callable[..., Any], candidate: str, name: str, config: Mapping[str, Any]
) -> bool:
    """Whether a conversion of the candidate alone gives the name."""
    try:
        return name in run_conversion(convert, [candidate], config)
    except ConversionError:
        return False


def _undo(name: str, pair: tuple[str, str]) -> str | None:
    """A name before a replacement; None if the replacement's result is not among its levels."""
    old, new = pair
    if not new or new not in name:
        return None
    start = "" if new.startswith(".") else r"(?:^|(?<=\.))"
    end = "" if new.endswith(".") else r"(?=\.|$)"
    before, count = re.subn(start + re.escape(new) + end, lambda _: old, name)
    return before if count else None


def _apply(name: str, pairs: tuple[tuple[str, str], ...], used: list[int]) -> str | None:
    """A name before all of these replacements; None if one of them does not fit."""
    before: str | None = name
    for index in used:
        if before is not None:
            before = _undo(before, pairs[index])
    return before


def _candidates(
    name: str, pairs: tuple[tuple[str, str], ...], end: int, used: tuple[int, ...] = ()
) -> Iterator[tuple[str, list[int]]]:
    """All results of undoing some of the first `end` replacements, from last to first."""
    for index in range(end - 1, -1, -1):
        before = _undo(name, pairs[index])
        if before is not None:
            yield from _candidates(before, pairs, index, (*used, index))
    yield name, list(used)


@cache
def _replacements(convert: Callable[..., Any]) -> tuple[tuple[str, str], ...]:
    """The pairs (old, new) in the source of a conversion: of dicts of texts, and of `.replace`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(convert)))
    except (OSError, SyntaxError):
        # Without source text, or a lambda inside a dict.
        return ()
    located: list[tuple[int, str, str]] = []
    for node in ast.walk(tree):
        couples: list[tuple[Any, Any]] = []
        if isinstance(node, ast.Dict):
            couples = list(zip(node.keys, node.values, strict=True))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "replace":
            couples = [(node.args[0], node.args[1])] if len(node.args) >= 2 else []
        located += [
            (old.lineno, old.value, new.value)
            for old, new in couples
            if _is_text(old) and _is_text(new)
        ]
    ordered = sorted(located, key=lambda item: item[0])
    return (*_MORE, *((old, new) for _, old, new in ordered))


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
