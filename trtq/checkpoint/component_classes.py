"""The classes that a `model_index.json` names, from diffusers and transformers only."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from trtq.checkpoint.layout import INDEX_NAME
from trtq.checkpoint.wording import one_line
from trtq.errors import ArtefactError

__all__ = ["is_component", "is_diffusers", "is_diffusers_model", "part_class", "pipeline_class"]


def is_component(name: str, entry: Any) -> bool:
    """Whether an entry of the index is a component, `[library, class]`, and not a setting."""
    return (
        isinstance(entry, list)
        and not name.startswith("_")
        and len(entry) == 2
        and all(item is None or isinstance(item, str) for item in entry)
    )


def _attribute(module: Any, name: str) -> Any:
    """An attribute of a library; None if it is missing or cannot be imported."""
    try:
        return getattr(module, name, None)
    except (ImportError, RuntimeError):
        return None


def _check_installed(path: Path, name: Any, packages: list[str]) -> None:
    if packages:
        raise ArtefactError(
            f"{path}: {name} requires {' and '.join(packages)}; install the missing packages"
        )


def pipeline_class(folder: Path, index: Mapping[str, Any]) -> Any:
    """The diffusers class of the pipeline in a folder.

    Args:
        folder: folder of the pipeline.
        index: content of its `model_index.json`.

    Raises:
        ArtefactError: diffusers has no such pipeline, or a package that it requires is missing.
    """
    import diffusers

    path, name = folder / INDEX_NAME, str(index.get("_class_name"))
    if (folder / "pipeline.py").is_file():
        raise ArtefactError(
            f"{path} names a custom pipeline ({name!r}), i.e. code that is stored with the model; "
            "trtq does not run such code. If its components fit a pipeline of diffusers, write the "
            "name of that pipeline into _class_name"
        )
    cls: Any = _attribute(diffusers, name.removeprefix("Flax"))
    _check_installed(path, name, getattr(cls, "_backends", None) or [])
    if not isinstance(cls, type) or not issubclass(cls, diffusers.DiffusionPipeline):
        raise ArtefactError(
            f"{path} names a pipeline that diffusers does not have: {name!r} (installed: diffusers "
            f"{diffusers.__version__})"
        )
    return cls


def part_class(folder: Path, part: str, library: Any = None, class_name: Any = None) -> Any:
    """The class of a component.

    Args:
        folder: folder of the pipeline.
        part: name of the component.
        library: `diffusers`, `transformers`, or a pipeline module of diffusers; None: no component.
        class_name: class name in the library; None: no component.

    Returns:
        The class, or None if there is no component.

    Raises:
        ArtefactError: the class is from another library, does not exist, or cannot be loaded from a
            folder.
    """
    if library is None:
        return None
    path = folder / INDEX_NAME
    module_name = _module_name(path, part, str(library))
    try:
        module = importlib.import_module(module_name)
    except ImportError as err:
        raise ArtefactError(
            f"{path}: cannot import {module_name!r} for the component {part!r}: {one_line(err)}"
        ) from err
    cls: Any = _attribute(module, str(class_name))
    if cls is None and str(class_name).endswith("FeatureExtractor"):
        # transformers 5 dropped the old names of its image processors.
        cls = _attribute(module, class_name.removesuffix("FeatureExtractor") + "ImageProcessor")
    if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
        package = importlib.import_module(module_name.partition(".")[0])
        raise ArtefactError(
            f"{path} names {class_name!r} as the class of {part!r}, but {module_name} has no such "
            f"class (installed version: {getattr(package, '__version__', 'unknown')})"
        )
    if cls.__module__.startswith("diffusers.utils.dummy"):
        _check_installed(path, class_name, getattr(cls, "_backends", None) or [])
    if cls.__name__.endswith("Pipeline"):
        raise ArtefactError(f"{path} names the pipeline {class_name!r} as its component {part!r}")
    return cls


def _module_name(path: Path, part: str, library: str) -> str:
    """The module that defines the classes of a library in the index."""
    if library in ("diffusers", "transformers"):
        return library
    from diffusers import pipelines

    if not isinstance(_attribute(pipelines, library), ModuleType):
        raise ArtefactError(
            f"{path}: the component {part!r} is from {library!r}; only diffusers and transformers "
            "are supported"
        )
    return f"diffusers.pipelines.{library}"


def is_diffusers(cls: Any) -> bool:
    """Whether diffusers' loader, rather than transformers', loads a class."""
    from diffusers import ModelMixin

    return issubclass(cls, ModelMixin)


def is_diffusers_model(cls: Any) -> bool:
    """Whether a component's class is a model that diffusers loads."""
    return isinstance(cls, type) and issubclass(cls, nn.Module) and is_diffusers(cls)
