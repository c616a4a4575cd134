"""Copies of modules that run on engines."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Self

from trtq.errors import UsageError

__all__ = ["SharesEngines"]

_ENGINES = ("engine", "decoder", "encoder", "graphs", "model", "model_class")


class SharesEngines:
    """A module whose copies share its engines, which keep no state between calls."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy on the same engines."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        for name, value in vars(self).items():
            vars(other)[name] = value if name in _ENGINES else deepcopy(value, memo)
        return other

    def __getstate__(self) -> Any:
        """Not available, since engines belong to their process.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "a graph that is open cannot be pickled; call trtq.load on its folder in the other process"
        )
