"""trtq: low-bit diffusion models, from checkpoint to images.

    import trtq

    trtq.quantize("digits", "efficientdm", "run")
    trtq.export("run", "onnx")
    pipeline = trtq.load("onnx")
    image = pipeline(7).images[0]

Importing this package loads neither torch nor an engine; the functions do, when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["__version__", "build", "export", "load", "quantize"]

if TYPE_CHECKING:
    from trtq.stages.build import build_engines as build
    from trtq.stages.export import export_onnx as export
    from trtq.stages.load import load
    from trtq.stages.quantize import quantize


def __getattr__(name: str) -> Any:
    if name == "quantize":
        from trtq.stages.quantize import quantize

        return quantize
    if name == "build":
        from trtq.stages.build import build_engines

        return build_engines
    if name == "load":
        from trtq.stages.load import load

        return load
    if name == "export":
        # The package of that name is callable, so this is right before and after it is imported.
        import importlib

        return importlib.import_module("trtq.export")
    raise AttributeError(f"module 'trtq' has no attribute {name!r}")
