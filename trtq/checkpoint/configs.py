"""Checks of a component's configuration: types, ranges and layer counts."""

from __future__ import annotations

import inspect
import logging
import math
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trtq.checkpoint.component_classes import is_diffusers_model
from trtq.checkpoint.layout import INDEX_NAME, MAX_TRAINED
from trtq.checkpoint.weights import Weights
from trtq.checkpoint.wording import list_names, one_line
from trtq.errors import ArtefactError
from trtq.limits import MAX_SIDE

__all__ = ["check_config", "check_layer_counts", "config_leaves"]

logger = logging.getLogger(__name__)

_MAX_INTEGER = 1 << 31
_COUNTS = re.compile(r"channels|layers|heads|groups|_dim$|_size$|_dim_|_blocks")
_POSITIVE = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "norm_num_groups",
    "sample_size",
    "patch_size",
    "hidden_size",
    "num_hidden_layers",
)
_LAYERS = re.compile(r"layers|_blocks$")
_NO_LAYERS = ("dual_attention_layers", "max_window_layers")
"""Settings that match `_LAYERS` but are indices of layers instead of layer counts."""


def config_leaves(value: Any) -> Iterator[Any]:
    """The scalars of a setting: the items of nested lists, or the value itself."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from config_leaves(item)
    else:
        yield value


def _leaf_types(annotation: Any) -> set[Any] | None:
    """The scalar types that an annotation allows; None if it also allows other types."""
    arguments = typing.get_args(annotation)
    if not arguments:
        known = (int, float, str, bool, type(None), Ellipsis)
        if annotation in known:
            return {annotation}
        return set() if annotation in (tuple, list) else None
    types: set[Any] = set()
    for argument in arguments:
        inner = _leaf_types(argument)
        if inner is None:
            return None
        types |= inner
    return types


def _fits(value: Any, allowed: set[Any]) -> bool:
    """Whether a scalar has one of the allowed types or can be converted to one without loss."""
    if value is None:
        return True
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, int):
        return bool(allowed & {int, float}) or (bool in allowed and value in (0, 1))
    if isinstance(value, float):
        return float in allowed or (int in allowed and value.is_integer())
    return type(value) in allowed


def check_config(path: Path, config: Mapping[str, Any], cls: Any) -> None:
    """Raise unless a component can be built from a configuration.

    Args:
        path: file of the configuration, used in messages.
        config: content of the file.
        cls: class of the component.

    Raises:
        ArtefactError: a value has the wrong type or is out of range, or the weights are already
            quantised; the message names the key.
    """
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ArtefactError(
            f"{path} has a quantization_config ({method or 'unknown method'}): its weights are "
            "already quantised; give the float checkpoint that they were made from"
        )
    named = config.get("_class_name")
    if (
        isinstance(named, str)
        and named.removeprefix("Flax") != cls.__name__
        and is_diffusers_model(cls)
    ):
        raise ArtefactError(
            f"{path} configures a {named}, but {INDEX_NAME} names a {cls.__name__}; download both files "
            "from the same repository"
        )
    for key, value in config.items():
        for leaf in config_leaves(value):
            # Settings of schedulers may be infinite numbers.
            if isinstance(leaf, float) and not math.isfinite(leaf) and is_diffusers_model(cls):
                raise ArtefactError(f"{path}: {key} must be a finite number, got {leaf}")
            if isinstance(leaf, int) and not isinstance(leaf, bool):
                _check_integer(path, key, leaf)
    if is_diffusers_model(cls):
        _check_signature(path, config, cls)


def _check_integer(path: Path, key: str, value: int) -> None:
    """Raise unless an integer setting is in the range that its name implies."""
    allowed = f"below {_MAX_INTEGER}"
    fits = abs(value) < _MAX_INTEGER
    if key == "num_train_timesteps":
        fits, allowed = 1 <= value <= MAX_TRAINED, f"1 .. {MAX_TRAINED}"
    elif key == "sample_size":
        fits, allowed = 1 <= value <= MAX_SIDE, f"1 .. {MAX_SIDE}"
    elif key in _POSITIVE and value < 1:
        fits, allowed = False, "at least 1"
    elif _COUNTS.search(key) and value < 0:
        fits, allowed = False, "at least 0"
    if not fits:
        raise ArtefactError(f"{path}: {key} must be {allowed}, got {value}")


def _check_signature(path: Path, config: Mapping[str, Any], cls: Any) -> None:
    """Raise unless the settings match the arguments of the class; warn of unknown settings."""
    parameters = inspect.signature(cls.__init__).parameters
    hints: dict[str, Any] = {}
    try:
        hints = typing.get_type_hints(cls.__init__)
    except (NameError, TypeError):
        logger.debug("%s: the types of its settings are unknown", cls.__name__)
    unknown = []
    for key, value in config.items():
        if key.startswith("_"):
            continue
        if key in parameters:
            _check_setting(path, key, value, parameters[key].default, hints)
        else:
            unknown.append(key)
    if unknown:
        logger.warning("%s: %s has no setting %s; ignored", path, cls.__name__, list_names(unknown))


def _check_setting(
    path: Path, key: str, value: Any, default: Any, hints: Mapping[str, Any]
) -> None:
    """Raise unless a setting has the type of its argument; lists must be of a valid length."""
    if isinstance(value, list) and not value and isinstance(default, tuple | list) and default:
        raise ArtefactError(f"{path}: {key} must be a list with at least one entry, got []")
    allowed = _leaf_types(hints[key]) if key in hints else None
    if allowed is None:
        return
    if type(default) in (bool, int, float, str):
        # Some annotations of diffusers do not fit their own defaults.
        allowed |= {type(default)}
    if not all(_fits(leaf, allowed) for leaf in config_leaves(value)):
        names = " or ".join(sorted(t.__name__ for t in allowed if t not in (type(None), Ellipsis)))
        raise ArtefactError(f"{path}: {key} must be of type {names}, got {one_line(repr(value))}")
    if key == "sample_size" and isinstance(value, list) and len(value) != 2:
        raise ArtefactError(
            f"{path}: sample_size must be one integer or two, got {one_line(repr(value))}"
        )


def check_layer_counts(path: Path, config: Mapping[str, Any], weights: Weights) -> None:
    """Raise if a configuration has more layers than tensors, before a constructor loops over them.

    Args:
        path: file of the configuration, used in messages.
        config: content of the file.
        weights: headers of the component's weights.

    Raises:
        ArtefactError: a layer count is too large.
    """
    for key, value in config.items():
        if not _LAYERS.search(key) or key in _NO_LAYERS:
            continue
        for leaf in config_leaves(value):
            if isinstance(leaf, int) and leaf > len(weights.tensors):
                raise ArtefactError(
                    f"{path}: {key} is {leaf}, but there are only {len(weights.tensors)} tensors in the "
                    "weights; one of the two is from another model"
                )
