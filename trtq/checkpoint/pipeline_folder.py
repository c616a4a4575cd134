"""Load a diffusers folder with checks: all tensors are present, fit, and are finite floats.

diffusers and transformers fill missing tensors with random numbers and only report them; here a missing
tensor is an error. Problems in headers and configurations are reported before anything is built.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from trtq.checkpoint.component_classes import (
    is_component,
    is_diffusers,
    part_class,
    pipeline_class,
)
from trtq.checkpoint.configs import check_config, check_layer_counts
from trtq.checkpoint.ip_adapter import adapter_names, add_ip_adapter
from trtq.checkpoint.layout import (
    CONFIG_NAME,
    INDEX_NAME,
    SCHEDULER_NAME,
    read_index,
    read_json,
    read_scheduler,
)
from trtq.checkpoint.quiet import quiet_diffusers
from trtq.checkpoint.stored_models import half_dtype, keep_half, read_tensors, stored_model
from trtq.checkpoint.tensor_checks import (
    check_dtypes,
    check_finite,
    check_loading_report,
    check_names,
    check_sizes,
    meta_model,
)
from trtq.checkpoint.weight_files import find_weights
from trtq.checkpoint.weights import check_pointers
from trtq.checkpoint.wording import list_names, one_line
from trtq.errors import ArtefactError, TrtqError
from trtq.resources import return_freed_memory

__all__ = ["align_tensors", "assemble", "load_part", "load_pipeline"]

logger = logging.getLogger(__name__)

_MAX_TEXT = 1 << 20
"""Maximum `model_max_length` of a CLIP tokenizer, in tokens; the default is far larger."""

_ALIGNMENT = 64
"""Alignment of torch's own allocations on the CPU, in bytes."""


def load_part(folder: Path, part: str, cls: Any, *, stored: bool = False) -> Any:
    """Load one component of a pipeline in float32, from safetensors only.

    Args:
        folder: folder of the pipeline.
        part: name of the component and of its folder.
        cls: class of the component, from `part_class`; None: the pipeline has no such component.
        stored: whether large weights stay in their files or in their own dtype until they are used, see
            `trtq.checkpoint.stored_models`.

    Raises:
        ArtefactError: the component is missing, cannot be read, or does not fit its class.
        NonFiniteError: a weight holds NaN or infinity.
    """
    if cls is None:
        return None
    place = folder / part
    if not place.is_dir():
        raise ArtefactError(
            f"{folder} has no folder {part!r}, but its {INDEX_NAME} names that component "
            f"({cls.__name__}); download the whole pipeline, or set the entry to [null, null] if the "
            "pipeline works without it"
        )
    check_pointers(place)
    if stored:
        return_freed_memory()
    if issubclass(cls, nn.Module):
        return _load_module(place, cls, stored=stored)
    if (place / SCHEDULER_NAME).is_file():
        check_config(place / SCHEDULER_NAME, read_scheduler(folder, part), cls)
    _check_vocabulary(place, cls)
    component = _guarded(place, cls, lambda: cls.from_pretrained(place, local_files_only=True))
    if cls.__name__.startswith("CLIPTokenizer") and component.model_max_length > _MAX_TEXT:
        raise ArtefactError(
            f"{place} does not limit the length of a text: model_max_length is missing in its "
            "tokenizer_config.json; download the tokenizer again"
        )
    return component


def _check_vocabulary(place: Path, cls: Any) -> None:
    """Raise unless a tokenizer's folder holds a vocabulary; transformers would use an empty one.

    Raises:
        ArtefactError: the files of the fast and of the slow tokenizer are missing.
    """
    names = getattr(cls, "vocab_files_names", None)
    if not isinstance(names, dict) or not names:
        return
    fast = names.get("tokenizer_file", "tokenizer.json")
    slow = [name for key, name in names.items() if key != "tokenizer_file"]
    missing = [name for name in slow if not (place / name).is_file()]
    if (place / fast).is_file() or (slow and not missing) or any(place.glob("*.model")):
        return
    raise ArtefactError(
        f"{place} holds no vocabulary: {fast} is missing"
        + (f", and {' and '.join(missing)}" if missing else "")
        + "; download the tokenizer again"
    )


def _guarded(place: Path, cls: Any, load: Callable[[], Any]) -> Any:
    """Call `load` and turn an error of a library into an `ArtefactError` of one line."""
    try:
        with quiet_diffusers():
            return load()
    except TrtqError:
        raise
    # The libraries' parsers may raise any exception, even a bare Exception.
    except Exception as err:
        raise ArtefactError(
            f"cannot load {place.name!r} from {place} as {cls.__name__}: {one_line(err)}"
        ) from err


def _load_module(place: Path, cls: Any, *, stored: bool) -> nn.Module:
    path = place / CONFIG_NAME
    config = read_json(path)
    if path.read_bytes().startswith(b"\xef\xbb\xbf"):
        raise ArtefactError(
            f"{path} begins with a byte-order mark, which diffusers and transformers cannot read; "
            "save the file as UTF-8 without it"
        )
    check_config(path, config, cls)
    by_diffusers = is_diffusers(cls)
    weights = find_weights(place, "diffusion_pytorch_model" if by_diffusers else "model")
    check_layer_counts(path, config, weights)
    if weights.variant is not None:
        logger.warning("%s: reading the variant %r, the only one present", place, weights.variant)
    model = meta_model(path, config, cls)
    adapter = adapter_names(weights.tensors) if by_diffusers else []
    if adapter and model is not None:
        # The configuration does not describe the adapter.
        shapes = {name: weights.tensors[name].shape for name in adapter}
        empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        _guarded(place, cls, lambda: add_ip_adapter(model, empty))
    check_sizes(path, config, model, weights)
    check_dtypes(place, model, weights.tensors)
    if by_diffusers and model is not None:
        check_names(place, config, model, weights.tensors)
    if stored and by_diffusers and not adapter:
        named: nn.Module | None = _guarded(
            place, cls, lambda: stored_model(place, config, cls, weights.tensors)
        )
        if named is not None:
            align_tensors(named)
            return named
    options: dict[str, Any] = {
        "local_files_only": True,
        "use_safetensors": True,
        "dtype": half_dtype(weights.tensors) if stored else torch.float32,
        "variant": weights.variant,
        "output_loading_info": True,
    }
    if not by_diffusers:
        # With this option transformers returns wrong shapes in the report instead of printing them.
        options["ignore_mismatched_sizes"] = True
    loaded, report = _guarded(place, cls, lambda: cls.from_pretrained(place, **options))
    if adapter:
        tensors = read_tensors({name: weights.tensors[name] for name in adapter})
        _guarded(place, cls, lambda: add_ip_adapter(loaded, tensors))
        report["unexpected_keys"] = set(report["unexpected_keys"]) - set(adapter)
    check_loading_report(place, report, weights.tensors)
    module: nn.Module = loaded.eval()
    if stored:
        keep_half(module)
    else:
        module.float()
    if meta := [name for name, tensor in module.state_dict().items() if tensor.is_meta]:
        raise ArtefactError(f"{place}: {len(meta)} tensors got no value: {list_names(meta)}")
    check_finite(module, str(place))
    align_tensors(module)
    return module


def align_tensors(module: nn.Module) -> None:
    """Copy the parameters that a file's layout has placed at unaligned addresses.

    Kernels may round differently there, so results would depend on the file and not only on its values.

    Args:
        module: model on the CPU, changed in place.
    """
    for parameter in module.parameters():
        if parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def assemble(
    folder: Path, load: Callable[[str, Any], Any], given: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """Build a pipeline from the components that a folder's index names.

    Args:
        folder: folder of the pipeline.
        load: function `(name, class) -> component`.
        given: components that are used instead of loading them, by name.

    Raises:
        ArtefactError: the index or a component is invalid, or the components do not fit the pipeline.
    """
    index = read_index(folder)
    cls = pipeline_class(folder, index)
    settings = inspect.signature(cls.__init__).parameters
    parts: dict[str, Any] = {}
    classes: dict[str, Any] = {}
    for name, entry in index.items():
        if name in given:
            parts[name] = given[name]
        elif name not in settings:
            if is_component(name, entry) and entry[0] is not None:
                raise ArtefactError(
                    f"{folder / INDEX_NAME}: {cls.__name__} has no component {name!r}; remove the "
                    "entry, or use a pipeline class with that component"
                )
        elif is_component(name, entry):
            classes[name] = part_class(folder, name, *entry)
        else:
            parts[name] = entry
    # As in diffusers, the index may leave out optional components.
    for name in getattr(cls, "_optional_components", ()):
        if name in settings and name not in index and name not in parts:
            parts[name] = None
    # All classes are resolved before loading, so a missing one is reported before large files are read.
    for name, part in classes.items():
        parts[name] = load(name, part)
    try:
        with quiet_diffusers():
            pipeline = cls(**parts)
    # A pipeline's constructor may raise any exception for a wrong component.
    except Exception as err:
        raise ArtefactError(f"{folder}: cannot build the {cls.__name__}: {one_line(err)}") from err
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(folder: Path, *, stored: bool = False) -> Any:
    """Load the pipeline in a folder in float32, from safetensors only, with all tensors checked.

    Args:
        folder: folder of the pipeline.
        stored: see `load_part`.

    Raises:
        ArtefactError: a component is missing, cannot be read, or does not fit.
        NonFiniteError: a weight holds NaN or infinity.
    """
    return assemble(folder, lambda name, cls: load_part(folder, name, cls, stored=stored))
