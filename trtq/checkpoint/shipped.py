"""The models that ship inside the package, by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["shipped_model", "shipped_models"]


def _root() -> Path:
    return Path(str(files("trtq"))) / "demo" / "models"


def shipped_models() -> list[str]:
    """Names of the shipped models, sorted."""
    root = _root()
    return sorted(p.parent.name for p in root.glob("*/model_index.json")) if root.is_dir() else []


def shipped_model(name: str) -> Path | None:
    """The folder of a shipped model; None for other names."""
    return _root() / name if name in shipped_models() else None
