"""Import of optional packages; the error names the extra that installs them."""

from __future__ import annotations

import importlib
from typing import Any

from trtq.errors import MissingDependencyError

__all__ = ["require"]

_EXTRAS = {
    "onnxruntime": "cpu",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "ray": "ray",
    "matplotlib": "eval",
    "jinja2": "eval",
    "torchmetrics": "eval",
    "sklearn": "dev",
    "imageio": "video",
    "imageio_ffmpeg": "video",
    "polygraphy": "polygraphy",
}


def require(module: str) -> Any:
    """Import an optional package.

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: the package is not installed; the message explains how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as err:
        extra = _EXTRAS[module.partition(".")[0]]
        raise MissingDependencyError(
            f"{module} is required here but not installed: pip install 'trtq[{extra}]'"
        ) from err
