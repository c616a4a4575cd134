"""Store pipeline components in a run or an ONNX folder, and load them again."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from trtq.checkpoint.component_classes import is_component, part_class, pipeline_class
from trtq.checkpoint.components import AUTOENCODERS, DENOISERS, TEXT_ENCODERS
from trtq.checkpoint.configs import check_config
from trtq.checkpoint.ip_adapter import add_ip_adapter, set_scales
from trtq.checkpoint.layout import (
    CLASSES_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    read_index,
    read_json,
    read_null_class,
)
from trtq.checkpoint.pipeline_folder import assemble, load_part
from trtq.checkpoint.quiet import quiet_diffusers
from trtq.checkpoint.stored_models import plain_state
from trtq.checkpoint.wording import one_line
from trtq.diffusion.loading import wrap_pipeline
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.prompts import PROMPTS_NAME
from trtq.errors import ArtefactError, UsageError

__all__ = [
    "DECODER",
    "ENCODER",
    "denoiser_in",
    "has_parts",
    "import_classes",
    "load_pipeline_parts",
    "save_pipeline_parts",
    "skeleton",
]

DECODER, ENCODER = "vae_decoder", "vae_encoder"
"""Names of the graphs of an autoencoder's two halves."""


def save_pipeline_parts(
    loaded: LoadedPipeline, folder: Path, *, graphs: bool = False, denoisers: Collection[str] = ()
) -> None:
    """Write a pipeline in diffusers' layout, without the weights of its denoisers.

    Args:
        loaded: pipeline to write.
        folder: existing folder to write to.
        graphs: whether to skip text encoders and autoencoders because they are stored as graphs.
        denoisers: names of the denoisers; by default the pipeline's only one.
    """
    names = denoisers or (loaded.denoiser_name,)
    pipeline = loaded.pipeline
    index: dict[str, Any] = {"_class_name": _diffusers_class(pipeline).__name__}
    for part, component in pipeline.components.items():
        if component is None:
            index[part] = [None, None]
        elif part in names:
            model = _model_in(component)
            index[part] = [_library(type(model)), type(model).__name__]
            model.save_config(folder / part)
            _without_place(folder / part / CONFIG_NAME)
        else:
            index[part] = [_library(type(component)), _class_name(type(component))]
            if graphs and part in (*TEXT_ENCODERS, *AUTOENCODERS):
                continue
            with quiet_diffusers(), plain_state(component):
                component.save_pretrained(folder / part)
            _without_place(folder / part / CONFIG_NAME)
    settings = inspect.signature(type(pipeline).__init__).parameters
    index |= {
        key: value for key, value in pipeline.config.items() if key in settings and key not in index
    }
    if loaded.folder is not None and (loaded.folder / CLASSES_NAME).is_file():
        shutil.copyfile(loaded.folder / CLASSES_NAME, folder / CLASSES_NAME)
    elif pipeline.config.get("null_class") is not None:
        classes = {"null_class": pipeline.config.null_class}
        (folder / CLASSES_NAME).write_text(json.dumps(classes) + "\n", encoding="utf-8")
    if loaded.prompts is not None:
        kept = loaded.prompts.model_copy(update={"evaluation": ()})
        (folder / PROMPTS_NAME).write_text(kept.model_dump_json() + "\n", encoding="utf-8")
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _without_place(path: Path) -> None:
    """Remove from a configuration the path that its model was loaded from, if it has one."""
    config = read_json(path) if path.is_file() else {}
    if config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _model_in(denoiser: Any) -> Any:
    """The diffusers model: a denoiser itself, or the model inside a quantised denoiser."""
    return vars(denoiser).get("_modules", {}).get("denoiser", denoiser)


def _class_name(cls: type) -> str:
    """Name of a class in the index; for tokenizers, the name in older versions of transformers."""
    import transformers

    fast = f"{cls.__name__}Fast"
    return fast if getattr(transformers, fast, None) is cls else cls.__name__


def _library(cls: type) -> str:
    """Library of a component in the index; for some classes, a pipeline module of diffusers."""
    library, *modules = cls.__module__.split(".")
    if library == "diffusers" and modules[:1] == ["pipelines"]:
        return modules[1]
    return library


def _diffusers_class(pipeline: Any) -> Any:
    """The nearest ancestor of a pipeline that diffusers defines.

    DDIMPipeline converts any scheduler to DDIM, so a class-conditional pipeline with another scheduler
    is stored as a DDPMPipeline.
    """
    if hasattr(pipeline, "classes") and type(pipeline.scheduler).__name__ != "DDIMScheduler":
        from diffusers import DDPMPipeline

        return DDPMPipeline
    for cls in type(pipeline).__mro__:
        if cls.__module__.startswith("diffusers"):
            return cls
    raise UsageError(f"{type(pipeline).__name__} is not a diffusers pipeline")


def denoiser_in(folder: Path) -> str:
    """Component name of the denoiser in a pipeline's folder.

    Raises:
        ArtefactError: the index names no denoiser.
    """
    index = read_index(folder)
    for name in DENOISERS:
        if isinstance(index.get(name), list):
            return name
    raise ArtefactError(
        f"{folder / INDEX_NAME} names no {' or '.join(DENOISERS)}, i.e. no denoiser"
    )


def has_parts(folder: Path) -> bool:
    """Whether a pipeline's folder names text encoders or autoencoders.

    Raises:
        ArtefactError: the folder has no valid index.
    """
    index = read_index(folder)
    names = (*TEXT_ENCODERS, *AUTOENCODERS)
    return any(
        part in names and isinstance(entry, list) and entry[:1] not in ([], [None])
        for part, entry in index.items()
    )


def import_classes(folder: Path) -> None:
    """Import the modules that loading a pipeline needs, so that loading alone can be timed.

    Raises:
        ArtefactError: the folder has no valid index.
    """
    index = read_index(folder)
    with suppress(ArtefactError):
        pipeline_class(folder, index)
    for part, entry in index.items():
        # Lists of any other length are settings.
        if isinstance(entry, list) and len(entry) == 2 and not part.startswith("_"):
            # Loading reports import errors.
            with suppress(ArtefactError):
                part_class(folder, part, *entry)


def skeleton(
    folder: Path,
    denoiser_name: str,
    ip_adapter: Mapping[str, Sequence[int]] = MappingProxyType({}),
    scales: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> nn.Module:
    """Build the denoiser without weights: its parameters have shapes but no memory.

    Args:
        folder: folder of a pipeline.
        denoiser_name: name of the component, e.g. `unet`.
        ip_adapter: shapes of the tensors of IP-Adapters in the denoiser, by path.
        scales: strengths of the IP-Adapters, by path of the attention processor.

    Raises:
        ArtefactError: the class is not a diffusers model, or the configuration does not fit it.
    """
    import diffusers
    from accelerate import init_empty_weights

    entry = read_index(folder).get(denoiser_name)
    if not is_component(denoiser_name, entry) or entry == [None, None]:
        raise ArtefactError(
            f"{folder / INDEX_NAME} names no {denoiser_name!r}, which the artefact needs as its denoiser"
        )
    library, class_name = entry  # type: ignore[misc]
    cls: Any = None
    if library == "diffusers":
        cls = getattr(diffusers, str(class_name), None)
    elif library != "transformers":
        # A model that only one pipeline uses lies in the pipeline's module.
        cls = part_class(folder, denoiser_name, library, class_name)
    if not inspect.isclass(cls) or not issubclass(cls, diffusers.ModelMixin):
        raise ArtefactError(
            f"{folder}: {library}.{class_name} is not a diffusers model; trtq supports diffusers "
            "models only"
        )
    path = folder / denoiser_name / CONFIG_NAME
    config = read_json(path)
    check_config(path, config, cls)
    try:
        with init_empty_weights():
            build: Any = cls
            model: nn.Module = build.from_config(config).eval()
        if ip_adapter:
            shapes = {key: torch.empty(*shape, device="meta") for key, shape in ip_adapter.items()}
            add_ip_adapter(model, shapes)
            set_scales(model, scales)
    # A constructor may raise any exception for a wrong setting.
    except Exception as err:
        raise ArtefactError(
            f"cannot build a {class_name} from {path}: {type(err).__name__}: {one_line(err)}"
        ) from err
    return model


def load_pipeline_parts(
    folder: Path,
    denoisers: Mapping[str, Any],
    load_graph: Callable[[str, Any], Any] | None = None,
    *,
    stored: bool = False,
) -> Any:
    """Load the components that `save_pipeline_parts` wrote, around given denoisers.

    Args:
        folder: folder of the pipeline.
        denoisers: quantised models or engines by name of the component.
        load_graph: function `(name, class) -> component` that loads a graph and returns None for a
            component without a graph; None: no component is a graph.
        stored: whether large weights stay in their files, see `trtq.checkpoint.stored_models`.

    Raises:
        ArtefactError: a component is missing, or is not of a diffusers class.
    """
    parts: dict[str, Any] = {}

    def load(name: str, cls: Any) -> Any:
        graph = None if cls is None or load_graph is None else load_graph(name, cls)
        parts[name] = load_part(folder, name, cls, stored=stored) if graph is None else graph
        return parts[name]

    pipeline = assemble(folder, load, denoisers)
    # Not `pipeline.scheduler`: runs of earlier versions name DDIMPipeline, which converts schedulers.
    return wrap_pipeline(pipeline, read_null_class(folder), parts.get("scheduler"))
