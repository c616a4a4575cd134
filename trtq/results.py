"""The base class of the public functions' results: typed attributes, and the JSON of `--json`.

Until version 0.2 a result can also be read by key like the dictionary of earlier versions:
`result["bytes_after"]`. New code reads attributes, or calls `to_json()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

__all__ = ["OMITTED_IF_NONE", "Result", "json_key", "to_plain"]

_KEY = "trtq_key"
_OMITTED = "trtq_omitted"
OMITTED_IF_NONE = MappingProxyType({_OMITTED: True})
"""Metadata of a field whose JSON key is left out while its value is None."""


def json_key(key: str) -> Mapping[str, str]:
    """Metadata of a field whose JSON key differs from its name."""
    return MappingProxyType({_KEY: key})


@dataclass(frozen=True, kw_only=True)
class Result(Mapping[str, Any]):
    """Base class of frozen dataclasses that a public function returns.

    Access by key (`result["seconds"]`, `"seconds" in result`, `result.get(...)`, `result.keys()`) is
    deprecated and remains for one release.
    """

    def to_json(self) -> dict[str, Any]:
        """Return the result as objects that `json.dumps` accepts, under the keys of `--json`."""
        return {key: to_plain(value) for key, value in self.items()}

    def __getitem__(self, key: str) -> Any:
        """Deprecated: read a value by its JSON key."""
        return self._by_key()[key]

    def __iter__(self) -> Iterator[str]:
        """Deprecated: iterate over the JSON keys."""
        return iter(self._by_key())

    def __len__(self) -> int:
        """Deprecated: count the JSON keys."""
        return len(self._by_key())

    def _by_key(self) -> dict[str, Any]:
        """The values by JSON key; nested results are not converted."""
        values = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None or not entry.metadata.get(_OMITTED):
                values[entry.metadata.get(_KEY, entry.name)] = value
        return values


def to_plain(value: Any) -> Any:
    """Convert results inside lists, tuples and mappings to JSON objects; tuples become lists."""
    if isinstance(value, Result):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value
