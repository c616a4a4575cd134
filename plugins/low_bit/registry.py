"""What the plugins of TensorRT share: bases, attributes, creators, and records of errors."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from trtq.errors import TrtqError, UsageError
from trtq.plugins.low_bit.attributes import NAMESPACE, VERSION

__all__ = [
    "field_collection",
    "plugin_bases",
    "recording_failures",
    "register_creators",
    "take_failures",
]


def field_collection(trt: Any, fields: dict[str, list[int]]) -> tuple[list[Any], Any]:
    """The attributes as a TensorRT collection, with the objects that own their memory."""
    owned: list[Any] = [np.array(values, np.int32) for values in fields.values()]
    named = zip(fields, list(owned), strict=True)
    owned += [trt.PluginField(name, data, trt.PluginFieldType.INT32) for name, data in named]
    return owned, trt.PluginFieldCollection(owned[len(fields) :])


_failures: deque[str] = deque(maxlen=3)


def take_failures() -> list[str]:
    """Return and clear the latest errors of plugins since the previous call.

    TensorRT prints errors of Python plugins to standard error and does not pass them to its caller.
    """
    failures = list(_failures)
    _failures.clear()
    return failures


def recording_failures(method: Any) -> Any:
    """A method of a plugin whose errors are recorded for `take_failures` and raised again."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except Exception as err:
            text = str(err) if isinstance(err, TrtqError) else f"{type(err).__name__}: {err}"
            name = getattr(self, "plugin_name", None) or getattr(self, "name", "")
            _failures.append(f"plugin {name}: {text}")
            raise

    return call


def plugin_bases(trt: Any) -> tuple[type, ...]:
    """TensorRT's base classes of a plugin."""
    return (
        trt.IPluginV3,
        trt.IPluginV3OneCore,
        trt.IPluginV3OneBuild,
        trt.IPluginV3OneRuntime,
    )


def _creator_class(
    trt: Any,
    name: str,
    fields: Mapping[str, int],
    create: Callable[[str, dict[str, list[int]]], Any],
) -> type:
    """The class of a creator of plugins, for the parser and for loaded engines."""

    class LowBitCreator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Creates plugins of one name."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = name
            self.plugin_namespace, self.plugin_version = NAMESPACE, VERSION
            self._fields, self.field_names = field_collection(trt, {key: [] for key in fields})

        @recording_failures
        def create_plugin(self, _: str, given: Any, phase: Any) -> Any:
            values = {
                field.name: [int(value) for value in np.atleast_1d(field.data)]
                for field in given
                if field.name in fields
            }
            return create(name, values)

    return LowBitCreator


_registered: list[Any] = []


def register_creators(
    trt: Any,
    names: Iterable[str],
    fields: Mapping[str, int],
    create: Callable[[str, dict[str, list[int]]], Any],
) -> None:
    """Register creators that TensorRT does not have yet.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        names: names of the plugins.
        fields: number of integers of each attribute, by name.
        create: function that makes a plugin from its name and attributes.

    Raises:
        UsageError: TensorRT does not accept them.
    """
    registry = trt.get_plugin_registry()
    for name in names:
        if registry.get_creator(name, VERSION, NAMESPACE) is not None:
            continue
        creator = _creator_class(trt, name, fields, create)()
        if not registry.register_creator(creator, NAMESPACE):
            raise UsageError(f"{trt.__name__} does not accept the plugin {name}")
        # The registry does not own Python objects.
        _registered.append(creator)
