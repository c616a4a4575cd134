"""Low-bit diffusion models: from a checkpoint to images.

    import trtq

    trtq.quantize("digits", "efficientdm", "run")
    trtq.export("run", "onnx")
    pipeline = trtq.load("onnx")
    image = pipeline(7).images[0]

The functions are `quantize`, `export`, `build`, `load`, `generate`, `evaluate`, `benchmark`,
`inspect`, `verify` and `doctor`. `Recipe` holds the settings of a quantisation; `trtq.errors` lists the
tree of exceptions. Importing this package loads neither torch nor an engine: each name is imported at
its first use.
"""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

_LINKS = ("plugins", "calib", "cli.py")
"""Links of a checkout to the top of the repository; in an installed package they are real files."""


def _check_links(folder: _Path) -> None:
    """Raise unless the links of a checkout are links.

    Git under Windows writes links as small text files unless it may create symbolic links.

    Raises:
        ImportError: a link is a text file.
    """
    for name in _LINKS:
        link = folder / name
        # A real link leads to a folder, or to a larger file.
        if link.is_file() and link.stat().st_size < 64:
            raise ImportError(
                f"{link} is a text file and was a symbolic link: this checkout was made without "
                "symbolic links, as Git does under Windows by default. Install the wheel (pip "
                "install trtq), use WSL 2, or turn on Windows' developer mode and clone again with "
                "git clone -c core.symlinks=true"
            )


_check_links(_Path(__file__).parent)

__version__ = "0.1.0"

__all__ = [
    "ArtefactError",
    "BuildError",
    "CancelledError",
    "GateError",
    "IntegrityError",
    "KernelError",
    "LegalityError",
    "MeasurementError",
    "MissingDependencyError",
    "NonFiniteError",
    "QuantizationError",
    "Recipe",
    "RecipeError",
    "ServerError",
    "StepError",
    "TrtqError",
    "UsageError",
    "__version__",
    "benchmark",
    "build",
    "compare",
    "doctor",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "quantize",
    "verify",
]

if TYPE_CHECKING:
    from trtq.bench.run import benchmark
    from trtq.calib.recipe import Recipe
    from trtq.comparison.compare import compare
    from trtq.engine.doctor import doctor
    from trtq.errors import (
        ArtefactError,
        BuildError,
        CancelledError,
        GateError,
        IntegrityError,
        KernelError,
        LegalityError,
        MeasurementError,
        MissingDependencyError,
        NonFiniteError,
        QuantizationError,
        RecipeError,
        ServerError,
        StepError,
        TrtqError,
        UsageError,
    )
    from trtq.evaluation.evaluate import evaluate
    from trtq.exporter.build import build
    from trtq.exporter.export import export
    from trtq.exporter.verify import verify
    from trtq.pipelines.generate import generate
    from trtq.pipelines.inspect import inspect
    from trtq.pipelines.open import load
    from trtq.runs.quantize import quantize

_MODULES = {
    "Recipe": "trtq.calib.recipe",
    "benchmark": "trtq.bench.run",
    "build": "trtq.exporter.build",
    "compare": "trtq.comparison.compare",
    "doctor": "trtq.engine.doctor",
    "evaluate": "trtq.evaluation.evaluate",
    "export": "trtq.exporter.export",
    "generate": "trtq.pipelines.generate",
    "inspect": "trtq.pipelines.inspect",
    "load": "trtq.pipelines.open",
    "quantize": "trtq.runs.quantize",
    "verify": "trtq.exporter.verify",
}
"""Module of each public name; the exceptions are in `trtq.errors`."""


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module 'trtq' has no attribute {name!r}")
    value = getattr(import_module(_MODULES.get(name, "trtq.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for `dir`, `help` and completion in a shell."""
    return sorted(__all__)
