"""The parts of a diffusers folder that travel with a run or an ONNX folder, and back to a pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from trtq.diffusion.source import (
    CLASSES_NAME,
    INDEX_NAME,
    Source,
    read_null_class,
    wrap_pipeline,
)
from trtq.errors import ArtefactError

__all__ = ["load_pipeline_parts", "save_pipeline_parts", "skeleton"]


def save_pipeline_parts(source: Source, folder: Path) -> None:
    """Write model index, scheduler and the denoiser's configuration, in diffusers' layout."""
    name = source.denoiser_name
    scheduler = source.pipeline.scheduler
    index: dict[str, Any] = {
        "_class_name": _diffusers_class(source.pipeline),
        name: ["diffusers", type(source.model).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    if source.folder is not None and (source.folder / CLASSES_NAME).is_file():
        shutil.copyfile(source.folder / CLASSES_NAME, folder / CLASSES_NAME)
    elif source.pipeline.config.get("null_class") is not None:
        classes = {"null_class": source.pipeline.config.null_class}
        (folder / CLASSES_NAME).write_text(json.dumps(classes) + "\n")
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    scheduler.save_pretrained(folder / "scheduler")
    source.model.save_config(folder / name)


def _diffusers_class(pipeline: Any) -> str:
    """The class that diffusers itself knows: the nearest ancestor outside this package."""
    for cls in type(pipeline).__mro__:
        if cls.__module__.startswith("diffusers"):
            return str(cls.__name__)
    return "DiffusionPipeline"


def _index(folder: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads((folder / INDEX_NAME).read_text())
    except (OSError, ValueError) as err:
        raise ArtefactError(f"cannot read {folder / INDEX_NAME}: {err}") from err
    return index


def skeleton(folder: Path, denoiser_name: str) -> nn.Module:
    """The denoiser's class with its configuration and fresh weights.

    Raises:
        ArtefactError: the class is not one of diffusers', or the configuration does not fit it.
    """
    import diffusers

    library, class_name = _index(folder).get(denoiser_name, ("", ""))
    cls = getattr(diffusers, class_name, None) if library == "diffusers" else None
    if cls is None or not issubclass(cls, nn.Module):
        raise ArtefactError(
            f"{folder}: {library}.{class_name} is not a model of diffusers; only those are loaded"
        )
    try:
        model: nn.Module = cls.from_config(cls.load_config(folder / denoiser_name)).eval()
    except (OSError, ValueError, TypeError) as err:
        raise ArtefactError(f"{folder}: cannot build {class_name}: {err}") from err
    return model


def load_pipeline_parts(folder: Path, denoiser_name: str, denoiser: Any) -> Any:
    """A pipeline around a denoiser, from what `save_pipeline_parts` wrote.

    Raises:
        ArtefactError: a part is missing, or not one of diffusers' classes.
    """
    import diffusers

    index = _index(folder)
    _, scheduler_name = index.get("scheduler", ("", ""))
    scheduler_class = getattr(diffusers, scheduler_name, None)
    pipeline_class = getattr(diffusers, str(index.get("_class_name")), None)
    if scheduler_class is None or pipeline_class is None:
        raise ArtefactError(f"{folder / INDEX_NAME} names classes that diffusers does not have")
    try:
        scheduler = scheduler_class.from_pretrained(folder / "scheduler")
    except (OSError, ValueError) as err:
        raise ArtefactError(f"{folder}: cannot load the scheduler: {err}") from err
    pipeline = pipeline_class(**{denoiser_name: denoiser, "scheduler": scheduler})
    pipeline = wrap_pipeline(pipeline, read_null_class(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
