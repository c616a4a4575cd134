"""The parts of a diffusers folder that travel with a run or an ONNX folder, and back to a pipeline."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from trtq.diffusion.checkpoint import assemble, load_part
from trtq.diffusion.component_classes import part_class, pipeline_class
from trtq.diffusion.configs import check_config
from trtq.diffusion.layout import (
    CLASSES_NAME,
    INDEX_NAME,
    read_index,
    read_json,
    read_null_class,
)
from trtq.diffusion.loading import DENOISERS, wrap_pipeline
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.prompts import PROMPTS_NAME
from trtq.diffusion.quiet import quiet_diffusers
from trtq.diffusion.wording import one_line
from trtq.errors import ArtefactError, UsageError

__all__ = [
    "AUTOENCODERS",
    "DECODER",
    "ENCODER",
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


def save_pipeline_parts(source: LoadedPipeline, folder: Path, *, graphs: bool = False) -> None:
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
    """The class that diffusers itself knows: the nearest ancestor outside this package.

    DDIMPipeline turns every scheduler into DDIM; with another one a pipeline is a DDPMPipeline, which
    keeps it.
    """
    if hasattr(pipeline, "classes") and type(pipeline.scheduler).__name__ != "DDIMScheduler":
        from diffusers import DDPMPipeline

        return DDPMPipeline
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
    return any(
        part in names and isinstance(entry, list) and entry[:1] not in ([], [None])
        for part, entry in index.items()
    )


def import_classes(folder: Path) -> None:
    """Import what loading this pipeline would import, for those who time the loading itself.

    Raises:
        ArtefactError: there is no index to be read.
    """
    index = read_index(folder)
    with suppress(ArtefactError):
        pipeline_class(folder, index)
    for part, entry in index.items():
        # Lists of another length are settings.
        if isinstance(entry, list) and len(entry) == 2 and not part.startswith("_"):
            # What cannot be imported is the business of whoever loads it.
            with suppress(ArtefactError):
                part_class(folder, part, *entry)


def skeleton(folder: Path, denoiser_name: str) -> nn.Module:
    """The denoiser's class with its configuration; its parameters have shapes but no memory.

    Raises:
        ArtefactError: the class is not one of diffusers', or the configuration does not fit it.
    """
    import diffusers
    from accelerate import init_empty_weights

    entry = read_index(folder).get(denoiser_name)
    if not isinstance(entry, list) or len(entry) != 2:
        raise ArtefactError(
            f"{folder / INDEX_NAME} names no {denoiser_name!r}, which is its denoiser"
        )
    library, class_name = entry
    cls: Any = getattr(diffusers, str(class_name), None) if library == "diffusers" else None
    if not inspect.isclass(cls) or not issubclass(cls, diffusers.ModelMixin):
        raise ArtefactError(
            f"{folder}: {library}.{class_name} is not a model of diffusers; only those are loaded"
        )
    path = folder / denoiser_name / "config.json"
    config = read_json(path)
    check_config(path, config, cls)
    try:
        with init_empty_weights():
            build: Any = cls
            model: nn.Module = build.from_config(config).eval()
    # What a constructor raises of a wrong setting is anything.
    except Exception as err:
        raise ArtefactError(
            f"{path} does not make a {class_name}: {type(err).__name__}: {one_line(err)}"
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
    parts: dict[str, Any] = {}

    def load(name: str, cls: Any) -> Any:
        found = None if cls is None or load_graph is None else load_graph(name, cls)
        parts[name] = load_part(folder, name, cls) if found is None else found
        return parts[name]

    pipeline = assemble(folder, load, (denoiser_name, denoiser))
    # The part, not the pipeline's: runs of earlier versions say DDIMPipeline of every scheduler.
    return wrap_pipeline(pipeline, read_null_class(folder), parts.get("scheduler"))


DECODER, ENCODER = "vae_decoder", "vae_encoder"
