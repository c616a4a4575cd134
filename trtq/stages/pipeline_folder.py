"""The parts of a diffusers folder that travel with a run or an ONNX folder, and back to a pipeline."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from trtq.diffusion.layout import (
    CLASSES_NAME,
    INDEX_NAME,
    read_index,
    read_null_class,
    read_scheduler,
)
from trtq.diffusion.prompts import PROMPTS_NAME
from trtq.diffusion.quiet import quiet_diffusers
from trtq.diffusion.source import DENOISERS, Source, wrap_pipeline
from trtq.errors import ArtefactError, TrtqError, UsageError

__all__ = [
    "AUTOENCODERS",
    "TEXT_ENCODERS",
    "denoiser_in",
    "has_parts",
    "import_classes",
    "load_pipeline_parts",
    "save_pipeline_parts",
    "skeleton",
]

TEXT_ENCODERS = {
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
    "text_encoder_3": "tokenizer_3",
    "bert": "tokenizer",
}
"""Names of text encoders in pipelines, and of the tokenizers that belong to them."""
AUTOENCODERS = ("vae", "vqvae")
_FOREIGN = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError),
    *(RuntimeError, ImportError, EOFError, SafetensorError),
)
"""What other libraries raise at configurations that do not fit their classes."""


def save_pipeline_parts(source: Source, folder: Path, *, graphs: bool = False) -> None:
    """Write all of the pipeline but the denoiser's weights, in diffusers' layout.

    Args:
        source: the pipeline.
        folder: where to.
        graphs: leave out what is written as a graph, too.
    """
    name = source.denoiser_name
    pipeline = source.pipeline
    index: dict[str, Any] = {"_class_name": _diffusers_class(pipeline).__name__}
    for part, component in pipeline.components.items():
        if component is None:
            index[part] = [None, None]
        elif part == name:
            index[part] = ["diffusers", type(source.model).__name__]
        else:
            index[part] = [_library(type(component)), _class_name(type(component))]
            if graphs and part in (*TEXT_ENCODERS, *AUTOENCODERS):
                continue
            with quiet_diffusers():
                component.save_pretrained(folder / part)
    settings = inspect.signature(type(pipeline).__init__).parameters
    index |= {
        key: value for key, value in pipeline.config.items() if key in settings and key not in index
    }
    if source.folder is not None and (source.folder / CLASSES_NAME).is_file():
        shutil.copyfile(source.folder / CLASSES_NAME, folder / CLASSES_NAME)
    elif pipeline.config.get("null_class") is not None:
        classes = {"null_class": pipeline.config.null_class}
        (folder / CLASSES_NAME).write_text(json.dumps(classes) + "\n")
    if source.prompts is not None:
        kept = source.prompts.model_copy(update={"evaluation": ()})
        (folder / PROMPTS_NAME).write_text(kept.model_dump_json() + "\n", encoding="utf-8")
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    source.model.save_config(folder / name)


def _class_name(cls: type) -> str:
    """What to call a class: tokenizers by the name under which older transformers read their files."""
    import transformers

    fast = f"{cls.__name__}Fast"
    return fast if getattr(transformers, fast, None) is cls else cls.__name__


def _library(cls: type) -> str:
    """Where diffusers looks a component up: a library, or one of its own pipeline modules."""
    library, *modules = cls.__module__.split(".")
    if library == "diffusers" and modules[:1] == ["pipelines"]:
        return modules[1]
    return library


def _diffusers_class(pipeline: Any) -> Any:
    """The class that diffusers itself knows: the nearest ancestor outside this package."""
    for cls in type(pipeline).__mro__:
        if cls.__module__.startswith("diffusers"):
            return cls
    raise UsageError(f"{type(pipeline).__name__} is not a pipeline of diffusers")


def denoiser_in(folder: Path) -> str:
    """The name of the denoiser in a pipeline's folder.

    Raises:
        ArtefactError: the folder names none.
    """
    index = read_index(folder)
    for name in DENOISERS:
        if isinstance(index.get(name), list):
            return name
    raise ArtefactError(f"{folder / INDEX_NAME} names no {' or '.join(DENOISERS)}")


def has_parts(folder: Path) -> bool:
    """Whether a pipeline's folder has text encoders or autoencoders.

    Raises:
        ArtefactError: it is no pipeline's folder.
    """
    index = read_index(folder)
    names = (*TEXT_ENCODERS, *AUTOENCODERS)
    return any(part in names and (entry or [None])[0] is not None for part, entry in index.items())


def import_classes(folder: Path) -> None:
    """Import what loading this pipeline would import, for those who time the loading itself.

    Raises:
        ArtefactError: there is no index to be read.
    """
    import diffusers

    index = read_index(folder)
    _attribute(diffusers, index["_class_name"])
    for part, entry in index.items():
        if isinstance(entry, list):
            # What cannot be imported is the business of whoever loads it.
            with suppress(ArtefactError):
                _part_class(folder, part, *entry)


def _attribute(module: Any, name: str) -> Any:
    """What a library has under a name; None if it has nothing, or cannot import it here."""
    try:
        return getattr(module, name, None)
    except (ImportError, RuntimeError):
        return None


def _is_class(found: Any, base: type) -> bool:
    return isinstance(found, type) and issubclass(found, base)


def _settings(cls: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls.__init__).parameters


def _said(err: BaseException) -> str:
    """The first line of what another library said, and of what kind its error is."""
    lines = str(err).strip().splitlines()
    return f"{type(err).__name__}: {lines[0]}" if lines else type(err).__name__


def skeleton(folder: Path, denoiser_name: str) -> nn.Module:
    """The denoiser's class with its configuration; its parameters have shapes but no memory.

    Raises:
        ArtefactError: the class is not one of diffusers', or the configuration does not fit it.
    """
    import diffusers
    from accelerate import init_empty_weights

    entry = read_index(folder).get(denoiser_name)
    if not isinstance(entry, list):
        raise ArtefactError(
            f"{folder / INDEX_NAME} names no {denoiser_name!r}, which is its denoiser"
        )
    library, class_name = entry
    cls: Any = _attribute(diffusers, class_name) if library == "diffusers" else None
    if not (_is_class(cls, nn.Module) and hasattr(cls, "load_config")):
        raise ArtefactError(
            f"{folder}: {library}.{class_name} is not a model of diffusers; only those are loaded"
        )
    try:
        with init_empty_weights():
            model: nn.Module = cls.from_config(cls.load_config(folder / denoiser_name)).eval()
    except _FOREIGN as err:
        raise ArtefactError(
            f"{folder / denoiser_name}: cannot build {class_name}: {_said(err)}"
        ) from err
    return model


def load_pipeline_parts(
    folder: Path,
    denoiser_name: str,
    denoiser: Any,
    load_graph: Callable[[str, Any], Any] | None = None,
) -> Any:
    """A pipeline around a denoiser, from what `save_pipeline_parts` wrote.

    Args:
        folder: where it lies.
        denoiser_name: the part that `denoiser` is.
        denoiser: a quantised model or an engine.
        load_graph: `(name, class) -> part`, or None for a part that is no graph.

    Raises:
        ArtefactError: a part is missing, or not one of diffusers' classes.
    """
    import diffusers

    index = read_index(folder)
    pipeline_class: Any = _attribute(diffusers, index["_class_name"])
    if not _is_class(pipeline_class, diffusers.DiffusionPipeline):
        raise ArtefactError(
            f"{folder / INDEX_NAME} names {index['_class_name']!r}, which is no pipeline of diffusers"
        )
    if isinstance(index.get("scheduler"), list):
        read_scheduler(folder)
    settings = _settings(pipeline_class)
    parts: dict[str, Any] = {}
    for part, entry in index.items():
        if part == denoiser_name:
            parts[part] = denoiser
        elif isinstance(entry, list):
            cls = _part_class(folder, part, *entry)
            found = None if cls is None or load_graph is None else load_graph(part, cls)
            parts[part] = _load_part(folder, part, cls) if found is None else found
        elif part in settings:
            parts[part] = entry
    try:
        pipeline = wrap_pipeline(pipeline_class(**parts), read_null_class(folder))
    except TrtqError:
        raise
    except _FOREIGN as err:
        raise ArtefactError(f"{folder}: cannot put the pipeline together: {_said(err)}") from err
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _part_class(folder: Path, part: str, library: Any = None, class_name: Any = None) -> Any:
    """The class of a component, of diffusers or transformers; None where there is no component."""
    if library is None:
        return None
    if library not in ("diffusers", "transformers"):
        from diffusers import pipelines

        if not isinstance(_attribute(pipelines, str(library)), ModuleType):
            raise ArtefactError(
                f"{folder / INDEX_NAME} wants {part!r} from {library!r}; only diffusers and "
                "transformers are loaded from"
            )
        library = f"diffusers.pipelines.{library}"
    try:
        cls = _attribute(importlib.import_module(library), str(class_name))
    except ImportError as err:
        raise ArtefactError(
            f"{folder / INDEX_NAME} wants {part!r} from {library!r}: {err}"
        ) from err
    if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
        raise ArtefactError(f"{folder / INDEX_NAME} names {class_name!r}, which {library} has not")
    return cls


def _load_part(folder: Path, part: str, cls: Any) -> Any:
    """One component of a pipeline, only from safetensors."""
    if cls is None:
        return None
    options: dict[str, Any] = {"local_files_only": True}
    if isinstance(cls, type) and issubclass(cls, nn.Module):
        options |= {"use_safetensors": True, "dtype": torch.float32}
    try:
        with quiet_diffusers():
            loaded = cls.from_pretrained(folder / part, **options)
    except _FOREIGN as err:
        raise ArtefactError(f"{folder}: cannot load {part!r}: {_said(err)}") from err
    return loaded.eval() if isinstance(loaded, nn.Module) else loaded
