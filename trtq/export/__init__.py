"""torch to ONNX: tracing, one graph rewrite per file, and the parity check.

`trtq.export(...)` is also the function that does it all: the house names both the same, and importing
this package sets the attribute `trtq.export` to it, so the package itself can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Write the ONNX folder of a run or checkpoint, see `trtq.stages.export.export_onnx`."""
        # Found at the call, by name: the stage stands above this package and imports it.
        from importlib import import_module

        result: dict[str, Any] = import_module("trtq.stages.export").export_onnx(*args, **kwargs)
        return result


sys.modules[__name__].__class__ = _CallableModule
