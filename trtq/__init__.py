"""trtq: low-bit diffusion models, from checkpoint to images.

    import trtq

    trtq.quantize("digits", "efficientdm", "run")
    trtq.export("run", "onnx")
    pipeline = trtq.load("onnx")
    image = pipeline(7).images[0]

Importing this package loads neither torch nor an engine; the functions do, when they are called.
"""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

_LINKS = ("plugins", "calib", "cli.py")
"""Links of a checkout to the top of the repository; in an installed package they are real."""


def _check_links(folder: _Path) -> None:
    """Raise unless the links of a checkout are links.

    Git under Windows writes them as small text files unless it may make symbolic links.

    Raises:
        ImportError: a link is a text file.
    """
    for name in _LINKS:
        link = folder / name
        # A folder has no such size, and the real cli.py is larger.
        if link.is_file() and link.stat().st_size < 64:
            raise ImportError(
                f"{link} is a text file and was a symbolic link: this checkout was made without "
                "symbolic links, as Git does under Windows by default. Install the wheel (pip "
                "install trtq), use WSL 2, or turn on Windows' developer mode and clone again with "
                "git clone -c core.symlinks=true"
            )


_check_links(_Path(__file__).parent)

__version__ = "0.1.0"

__all__ = ["__version__", "build", "export", "load", "quantize"]

if TYPE_CHECKING:
    from trtq.exporter.build import build
    from trtq.exporter.export import export
    from trtq.pipelines.open import load
    from trtq.runs.quantize import quantize

_PUBLIC = {
    "build": ("trtq.exporter.build", "build"),
    "export": ("trtq.exporter.export", "export"),
    "load": ("trtq.pipelines.open", "load"),
    "quantize": ("trtq.runs.quantize", "quantize"),
}
"""Module and name of what is imported when it is asked for."""


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _PUBLIC:
        raise AttributeError(f"module 'trtq' has no attribute {name!r}")
    module, function = _PUBLIC[name]
    return getattr(import_module(module), function)
