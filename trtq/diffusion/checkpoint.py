"""Loading a diffusers folder, checked: every tensor is there, fits, and is a finite float number.

Diffusers and transformers fill tensors that a file lacks with random numbers and say so in a report.
Here that is an error. What headers and configurations tell is said before anything is built.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from trtq.diffusion.layout import (
    INDEX_NAME,
    MAX_TRAINED,
    read_index,
    read_json,
    read_scheduler,
)
from trtq.diffusion.quiet import quiet_diffusers
from trtq.diffusion.weights import FLOATS, TensorInfo, Weights, check_pointers, find_weights
from trtq.errors import ArtefactError, NonFiniteError
from trtq.limits import MAX_SIDE

__all__ = [
    "assemble",
    "check_config",
    "check_finite",
    "load_part",
    "load_pipeline",
    "one_line",
    "part_class",
    "pipeline_class",
]

logger = logging.getLogger(__name__)

_CONFIG_NAME = "config.json"
_SCHEDULER_NAME = "scheduler_config.json"
_LARGEST = 1 << 31
_LONGEST_TEXT = 1 << 20
_COUNTS = re.compile(r"channels|layers|heads|groups|_dim$|_size$|_dim_|_blocks")
_POSITIVE = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "norm_num_groups",
    "sample_size",
    "patch_size",
    "hidden_size",
    "num_hidden_layers",
)
_LAYERS = re.compile(r"layers|_blocks$")
_NO_LAYERS = ("dual_attention_layers",)
"""Lists of places, not numbers of layers."""
_BUFFER_BYTES = 1 << 30
_PREFIXES = {
    "_orig_mod.": "saved from a compiled module: save `model._orig_mod` instead",
    "module.": "saved from DataParallel: save `model.module` instead",
    "model.": "saved from a wrapper: save the model inside it instead",
}
_SHOWN = 3


def one_line(err: object) -> str:
    """What a library says, on one line and not endless."""
    text = " ".join(str(err).split()) or type(err).__name__
    return text if len(text) <= 400 else f"{text[:400]} ..."


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many there are: `'a', 'b' and 7 more`."""
    ordered = sorted(names)
    text = ", ".join(repr(name) for name in ordered[:_SHOWN])
    rest = len(ordered) - _SHOWN
    return f"{text} and {rest} more" if rest > 0 else text


def _is_component(part: str, entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and not part.startswith("_")
        and len(entry) == 2
        and all(item is None or isinstance(item, str) for item in entry)
    )


def _attribute(module: Any, name: str) -> Any:
    """What a library has under a name; None if it has nothing, or cannot import it here."""
    try:
        return getattr(module, name, None)
    except (ImportError, RuntimeError):
        return None


def pipeline_class(folder: Path, index: Mapping[str, Any]) -> Any:
    """Diffusers' class of a pipeline's folder.

    Raises:
        ArtefactError: diffusers has no such pipeline, or needs a package that is not installed.
    """
    import diffusers

    path, name = folder / INDEX_NAME, str(index.get("_class_name"))
    if (folder / "pipeline.py").is_file():
        raise ArtefactError(
            f"{path} names a custom pipeline ({name!r}), i.e. code that comes with the model, "
            "which trtq does not run; if its parts make a pipeline of diffusers, put that one's "
            "name into _class_name"
        )
    cls: Any = _attribute(diffusers, name.removeprefix("Flax"))
    if getattr(cls, "_backends", None):
        raise ArtefactError(
            f"{path}: {name} needs {' and '.join(cls._backends)}, not all installed"
        )
    if not isinstance(cls, type) or not issubclass(cls, diffusers.DiffusionPipeline):
        raise ArtefactError(
            f"{path} names a pipeline that diffusers does not have: {name!r} (diffusers "
            f"{diffusers.__version__} is installed)"
        )
    return cls


def part_class(folder: Path, part: str, library: Any = None, class_name: Any = None) -> Any:
    """The class of a component, of diffusers or transformers; None where there is no component.

    Raises:
        ArtefactError: it is not one of theirs, or not one that is loaded from a folder.
    """
    if library is None:
        return None
    path = folder / INDEX_NAME
    if library not in ("diffusers", "transformers"):
        from diffusers import pipelines

        if not isinstance(_attribute(pipelines, str(library)), ModuleType):
            raise ArtefactError(
                f"{path} wants {part!r} from {library!r}; only diffusers and transformers are "
                "loaded from"
            )
        library = f"diffusers.pipelines.{library}"
    try:
        module = importlib.import_module(library)
    except ImportError as err:
        raise ArtefactError(f"{path} wants {part!r} from {library!r}: {one_line(err)}") from err
    cls: Any = _attribute(module, str(class_name))
    if cls is None and str(class_name).endswith("FeatureExtractor"):
        # transformers 5 dropped the old names of its image processors.
        cls = _attribute(module, class_name.removesuffix("FeatureExtractor") + "ImageProcessor")
    if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
        raise ArtefactError(
            f"{path} names {class_name!r} as the class of {part!r}, which {library} does not have "
            "(version "
            f"{getattr(importlib.import_module(library.partition('.')[0]), '__version__', '?')})"
        )
    backends = getattr(cls, "_backends", None)
    if backends and cls.__module__.startswith("diffusers.utils.dummy"):
        raise ArtefactError(
            f"{path}: {class_name} needs {' and '.join(backends)}, not all installed"
        )
    if cls.__name__.endswith("Pipeline"):
        raise ArtefactError(f"{path} names the pipeline {class_name!r} as its component {part!r}")
    return cls


def load_part(folder: Path, part: str, cls: Any) -> Any:
    """One component of a pipeline, only from safetensors, in float32.

    Args:
        folder: the pipeline's.
        part: the component's name, which is its folder's, too.
        cls: from `part_class`; None for no component.

    Raises:
        ArtefactError: it is missing, cannot be read, or does not fit its class.
        NonFiniteError: a weight holds NaN or infinity.
    """
    if cls is None:
        return None
    place = folder / part
    if not place.is_dir():
        raise ArtefactError(
            f"{folder} has no folder {part!r}, which its {INDEX_NAME} names ({cls.__name__}); "
            "download the whole pipeline, or set it to [null, null] where the pipeline does "
            "without it"
        )
    check_pointers(place)
    if issubclass(cls, nn.Module):
        return _load_module(place, cls)
    if (place / _SCHEDULER_NAME).is_file():
        check_config(place / _SCHEDULER_NAME, read_scheduler(folder, part), cls)
    _check_vocabulary(place, cls)
    found = _guarded(place, cls, lambda: cls.from_pretrained(place, local_files_only=True))
    if cls.__name__.startswith("CLIPTokenizer") and found.model_max_length > _LONGEST_TEXT:
        raise ArtefactError(
            f"{place} does not limit the length of a text: model_max_length is missing in its "
            "tokenizer_config.json"
        )
    return found


def _check_vocabulary(place: Path, cls: Any) -> None:
    """Refuse a tokenizer's folder without a vocabulary, of which transformers makes an empty one.

    Raises:
        ArtefactError: neither the file of the fast form nor those of the slow one are there.
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
    """What `load` gives; whatever a library raises becomes one line."""
    try:
        with quiet_diffusers():
            return load()
    except ArtefactError:
        raise
    # A library raises whatever its parsers meet, bare Exception included.
    except Exception as err:
        raise ArtefactError(
            f"cannot load {place.name!r} from {place} as {cls.__name__}: {one_line(err)}"
        ) from err


def _load_module(place: Path, cls: Any) -> nn.Module:
    path = place / _CONFIG_NAME
    config = read_json(path)
    if path.read_bytes().startswith(b"\xef\xbb\xbf"):
        raise ArtefactError(
            f"{path} begins with a byte-order mark, which diffusers and transformers do not read; "
            "save it as UTF-8 without one"
        )
    check_config(path, config, cls)
    ours = _is_diffusers(cls)
    weights = find_weights(place, "diffusion_pytorch_model" if ours else "model")
    _check_layer_counts(path, config, weights)
    if weights.variant is not None:
        logger.warning("%s: reading the variant %r, the only one there", place, weights.variant)
    model = _meta_model(path, config, cls)
    _check_sizes(path, config, model, weights)
    _check_dtypes(place, model, weights.tensors)
    if ours and model is not None:
        _check_names(place, config, model, weights.tensors)
    options: dict[str, Any] = {
        "local_files_only": True,
        "use_safetensors": True,
        "dtype": torch.float32,
        "variant": weights.variant,
        "output_loading_info": True,
    }
    if not ours:
        # So that shapes are in the report, which is an error below; otherwise it is only printed.
        options["ignore_mismatched_sizes"] = True
    loaded, report = _guarded(place, cls, lambda: cls.from_pretrained(place, **options))
    _check_report(place, report, weights.tensors)
    module: nn.Module = loaded.float().eval()
    if meta := [name for name, tensor in module.state_dict().items() if tensor.is_meta]:
        raise ArtefactError(f"{place}: {len(meta)} tensors got no value: {_some(meta)}")
    check_finite(module, str(place))
    return module


def _is_diffusers(cls: Any) -> bool:
    """Whether diffusers' own loader loads a class; it holds some of transformers' kind, too."""
    from diffusers import ModelMixin

    return issubclass(cls, ModelMixin)


def check_finite(module: nn.Module, where: str) -> None:
    """Refuse a model whose weights are not all finite.

    Raises:
        NonFiniteError: a parameter holds NaN or infinity; the message names the first.
    """
    for name, parameter in module.named_parameters():
        if parameter.numel() and parameter.is_floating_point():
            low, high = torch.aminmax(parameter.detach())
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                layer, _, leaf = name.rpartition(".")
                raise NonFiniteError(f"{where}: layer {layer!r}: its {leaf} holds NaN or infinity")


def _leaves(value: Any) -> Iterator[Any]:
    """The entries of a list, and of lists in it; a value that is no list is its own entry."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _leaf_types(annotation: Any) -> set[Any] | None:
    """The scalar types in an annotation; None where it allows something else, too."""
    arguments = typing.get_args(annotation)
    if not arguments:
        known = (int, float, str, bool, type(None), Ellipsis)
        if annotation in known:
            return {annotation}
        return set() if annotation in (tuple, list) else None
    found: set[Any] = set()
    for argument in arguments:
        inner = _leaf_types(argument)
        if inner is None:
            return None
        found |= inner
    return found


def _fits(value: Any, allowed: set[Any]) -> bool:
    if value is None:
        return True
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, int):
        return bool(allowed & {int, float}) or (bool in allowed and value in (0, 1))
    if isinstance(value, float):
        return float in allowed or (int in allowed and value.is_integer())
    return type(value) in allowed


def check_config(path: Path, config: Mapping[str, Any], cls: Any) -> None:
    """Refuse a configuration that no model can be built of, by its file and key.

    Args:
        path: its file, for messages.
        config: what it holds.
        cls: the class that is to be built.

    Raises:
        ArtefactError: a value is of another type or out of range, or the weights are quantised already.
    """
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ArtefactError(
            f"{path} has a quantization_config ({method or 'of an unknown method'}): these weights "
            "are quantised already; give the float checkpoint they were made of"
        )
    named = config.get("_class_name")
    if isinstance(named, str) and named.removeprefix("Flax") != cls.__name__ and _is_model(cls):
        raise ArtefactError(f"{path} is of a {named}, and {INDEX_NAME} names a {cls.__name__}")
    for key, value in config.items():
        for leaf in _leaves(value):
            # Schedulers have infinite bounds.
            if isinstance(leaf, float) and not math.isfinite(leaf) and _is_model(cls):
                raise ArtefactError(f"{path}: {key} must be a finite number, got {leaf}")
            if isinstance(leaf, int) and not isinstance(leaf, bool):
                _check_integer(path, key, leaf)
    if _is_model(cls):
        _check_signature(path, config, cls)


def _is_model(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, nn.Module) and _is_diffusers(cls)


def _check_integer(path: Path, key: str, value: int) -> None:
    allowed = f"below {_LARGEST}"
    fits = abs(value) < _LARGEST
    if key == "num_train_timesteps":
        fits, allowed = 1 <= value <= MAX_TRAINED, f"1 .. {MAX_TRAINED}"
    elif key == "sample_size":
        fits, allowed = 1 <= value <= MAX_SIDE, f"1 .. {MAX_SIDE}"
    elif key in _POSITIVE and value < 1:
        fits, allowed = False, "at least 1"
    elif _COUNTS.search(key) and value < 0:
        fits, allowed = False, "at least 0"
    if not fits:
        raise ArtefactError(f"{path}: {key} must be {allowed}, got {value}")


def _check_signature(path: Path, config: Mapping[str, Any], cls: Any) -> None:
    """Types, empty lists and unknown keys, by the arguments of the class."""
    parameters = inspect.signature(cls.__init__).parameters
    hints: dict[str, Any] = {}
    try:
        hints = typing.get_type_hints(cls.__init__)
    except (NameError, TypeError):
        logger.debug("%s: the types of its settings are not known", cls.__name__)
    unknown = []
    for key, value in config.items():
        if key.startswith("_"):
            continue
        if key not in parameters:
            unknown.append(key)
            continue
        default = parameters[key].default
        if isinstance(value, list) and not value and isinstance(default, tuple | list) and default:
            raise ArtefactError(f"{path}: {key} must be a list of at least one entry, got []")
        allowed = _leaf_types(hints[key]) if key in hints else None
        if allowed is None:
            continue
        wrong = [leaf for leaf in _leaves(value) if not _fits(leaf, allowed)]
        if wrong:
            names = " or ".join(
                sorted(t.__name__ for t in allowed if t not in (type(None), Ellipsis))
            )
            raise ArtefactError(
                f"{path}: {key} must consist of {names}, got {one_line(repr(value))}"
            )
        if key == "sample_size" and isinstance(value, list) and len(value) != 2:
            raise ArtefactError(
                f"{path}: sample_size must be one number or two, got {one_line(repr(value))}"
            )
    if unknown:
        logger.warning("%s: %s has no setting %s; ignored", path, cls.__name__, _some(unknown))


def _check_layer_counts(path: Path, config: Mapping[str, Any], weights: Weights) -> None:
    """Refuse more layers than the weights have tensors, before anybody loops over their number."""
    for key, value in config.items():
        if not _LAYERS.search(key) or key in _NO_LAYERS:
            continue
        for leaf in _leaves(value):
            if isinstance(leaf, int) and leaf > len(weights.tensors):
                raise ArtefactError(
                    f"{path}: {key} is {leaf}, and the weights are only {len(weights.tensors)} "
                    "tensors"
                )


def _meta_model(path: Path, config: dict[str, Any], cls: Any) -> nn.Module | None:
    """A model with shapes and without memory; None for one that has to compute while it is built."""
    try:
        with quiet_diffusers(), torch.device("meta"):
            if _is_diffusers(cls):
                model: nn.Module = cls.from_config(dict(config))
            else:
                model = cls(cls.config_class.from_pretrained(path.parent, local_files_only=True))
    # As above: what a constructor raises of a wrong setting is anything.
    except Exception as err:
        if "meta" in str(err).lower():
            return None
        hints = _hints(config, cls)
        raise ArtefactError(
            f"{path} does not make a {cls.__name__}: {type(err).__name__}: {one_line(err)}{hints}"
        ) from err
    return model


def _hints(config: Mapping[str, Any], cls: Any) -> str:
    """Which settings are null or missing, for somebody who looks for the wrong one."""
    if not _is_diffusers(cls):
        return ""
    parameters = inspect.signature(cls.__init__).parameters
    absent = [key for key in parameters if key not in config and key not in ("self", "kwargs")]
    nulls = [
        key
        for key, value in config.items()
        if value is None and key in parameters and parameters[key].default is not None
    ]
    text = f"; null is {_some(nulls)}" if nulls else ""
    return text + (f"; it lacks {_some(absent)}, which take their defaults" if absent else "")


def _check_sizes(
    path: Path, config: Mapping[str, Any], model: nn.Module | None, weights: Weights
) -> None:
    """Refuse a configuration of another size than the weights before its memory is asked for."""
    if model is None:
        return
    expected = sum(parameter.numel() for parameter in model.parameters())
    held = sum(math.prod(tensor.shape) for tensor in weights.tensors.values())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    sizes = {
        key: max(found)
        for key, value in config.items()
        if (found := [leaf for leaf in _leaves(value) if type(leaf) is int])
    }
    largest = ", ".join(f"{key} {sizes[key]}" for key in sorted(sizes, key=sizes.__getitem__)[-2:])
    if expected > 2 * held + (1 << 20):
        raise ArtefactError(
            f"{path} describes {expected:,} parameters (its largest sizes: {largest}), but the "
            f"weights next to it hold {held:,} numbers; one of the two is of another model"
        )
    if buffers > 2 * weights.nbytes + _BUFFER_BYTES:
        raise ArtefactError(
            f"{path} asks for {buffers:,} bytes besides its weights, which are {weights.nbytes:,} "
            f"bytes (its largest sizes: {largest})"
        )


def _check_dtypes(place: Path, model: nn.Module | None, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse weights that are not floating-point numbers."""
    own = {} if model is None else model.state_dict()
    integers = {
        name.rpartition(".")[2] for name, tensor in own.items() if not tensor.is_floating_point()
    }
    wrong = {}
    for name, tensor in tensors.items():
        leaf = name.rpartition(".")[2]
        if tensor.dtype not in FLOATS and leaf not in integers and leaf != "position_ids":
            wrong[name] = tensor.dtype
    if wrong:
        first = min(wrong)
        raise ArtefactError(
            f"{place}: {len(wrong)} of {len(tensors)} weights are not floating-point numbers: "
            f"{_some(wrong)} ({first!r} is {wrong[first]}); they are quantised already or damaged, "
            "give a float checkpoint"
        )


def _strays(model: Any, names: Iterable[str]) -> list[str]:
    """Names that the model neither has nor knows as left over from older versions."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    return [
        name
        for name in names
        if not name.endswith(".position_ids") and not any(re.search(p, name) for p in patterns)
    ]


def _check_names(
    place: Path, config: Mapping[str, Any], model: Any, tensors: Mapping[str, TensorInfo]
) -> None:
    """Compare what diffusers' model expects with what the files hold."""
    held: dict[str, Any] = dict(tensors)
    if hasattr(model, "_fix_state_dict_keys_on_load"):
        model._fix_state_dict_keys_on_load(held)
    expected = model.state_dict()
    missing = [name for name in expected if name not in held]
    unexpected = _strays(model, (name for name in held if name not in expected))
    shapes = {
        name: (tuple(tensor.shape), held[name].shape)
        for name, tensor in expected.items()
        if name in held and tuple(tensor.shape) != held[name].shape
    }
    if missing or unexpected:
        raise ArtefactError(_of_names(place, missing, unexpected, list(tensors)))
    if shapes:
        name = min(shapes)
        wanted, given = shapes[name]
        raise ArtefactError(
            f"{place}: {len(shapes)} tensors are of another shape than {_CONFIG_NAME} says: "
            f"{_some(shapes)} ({name!r} is {given}, expected {wanted}){_hints(config, type(model))}"
        )


def _prefix(missing: list[str], unexpected: list[str]) -> str | None:
    """What all unexpected names begin with, if those without it are the missing ones."""
    first = min(unexpected, default="")
    for position in (place + 1 for place, letter in enumerate(first) if letter == "."):
        prefix = first[:position]
        if all(name.startswith(prefix) for name in unexpected) and (
            any(name.removeprefix(prefix) in missing for name in unexpected)
        ):
            return prefix
    return next(
        (
            p
            for p in _PREFIXES
            if missing and unexpected and all(n.startswith(p) for n in unexpected)
        ),
        None,
    )


def _of_names(
    place: Path, missing: Iterable[str], unexpected: Iterable[str], held: list[str]
) -> str:
    """One line about missing and unexpected tensors."""
    missing, unexpected = list(missing), list(unexpected)
    prefix = _prefix(missing, unexpected)
    if prefix is not None:
        advice = _PREFIXES.get(prefix, "saved as part of something larger")
        return (
            f"{place}: {len(unexpected)} tensors begin with {prefix!r} ({_some(unexpected)}), "
            f"{advice}, or take it off the names, in Python: from safetensors.torch import "
            f"load_file, save_file; save_file({{k.removeprefix({prefix!r}): v for k, v in "
            "load_file(F).items()}, F)"
        )
    if any(re.search(r"\.to_(added_)?q?kv\.", name) for name in unexpected) and not missing:
        return (
            f"{place}: it was saved with fused projections ({_some(unexpected)}); call "
            "pipe.unfuse_qkv_projections() before saving"
        )
    if any("lora_" in name for name in unexpected):
        return (
            f"{place}: its weights hold an adapter that is not fused ({_some(unexpected)}); fuse "
            "it before saving (pipe.fuse_lora(); pipe.unload_lora_weights()), or save it apart "
            "and give it with --lora"
        )
    if any("_ip." in name or "encoder_hid_proj" in name for name in unexpected):
        return (
            f"{place}: its weights hold an IP-Adapter ({_some(unexpected)}), which needs images "
            "that trtq does not pass yet; save the pipeline after pipe.unload_ip_adapter()"
        )
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    if unexpected:
        parts.append(f"{len(unexpected)} are not the model's: {_some(unexpected)}")
    return (
        f"{place}: of the {len(held)} tensors in its files {' and '.join(parts)}; the files are of "
        f"another model than {_CONFIG_NAME}, or not whole"
    )


def _check_report(place: Path, report: Any, tensors: Mapping[str, TensorInfo]) -> None:
    """What the loader itself says, as an error."""
    report = report if isinstance(report, dict) else {}
    missing = sorted(report.get("missing_keys") or ())
    unexpected = _strays(None, sorted(report.get("unexpected_keys") or ()))
    if missing or unexpected:
        raise ArtefactError(_of_names(place, missing, unexpected, list(tensors)))
    mismatched = [str(entry[0]) for entry in report.get("mismatched_keys") or ()]
    if mismatched:
        raise ArtefactError(
            f"{place}: {len(mismatched)} tensors are of another shape than {_CONFIG_NAME} says: "
            f"{_some(mismatched)}"
        )
    if errors := report.get("error_msgs"):
        raise ArtefactError(f"{place}: {one_line(errors[0])}")


def assemble(
    folder: Path, load: Callable[[str, Any], Any], denoiser: tuple[str, Any] | None = None
) -> Any:
    """A pipeline from the parts that a folder's index names.

    Args:
        folder: the pipeline's.
        load: `(name, class) -> part`.
        denoiser: a component's name and what to put there, which is not loaded.

    Raises:
        ArtefactError: the index or a part is not what it has to be, or they make no pipeline.
    """
    index = read_index(folder)
    cls = pipeline_class(folder, index)
    settings = inspect.signature(cls.__init__).parameters
    parts: dict[str, Any] = {}
    classes: dict[str, Any] = {}
    for name, entry in index.items():
        if denoiser is not None and name == denoiser[0]:
            parts[name] = denoiser[1]
        elif name not in settings:
            if _is_component(name, entry) and entry[0] is not None:
                raise ArtefactError(
                    f"{folder / INDEX_NAME}: {cls.__name__} has no component {name!r}"
                )
        elif _is_component(name, entry):
            classes[name] = part_class(folder, name, *entry)
        else:
            parts[name] = entry
    # As diffusers: what a pipeline can do without need not be named.
    for name in getattr(cls, "_optional_components", ()):
        if name in settings and name not in index and name not in parts:
            parts[name] = None
    # First every class, then the loading: what is missing is said before anything large is read.
    for name, part in classes.items():
        parts[name] = load(name, part)
    try:
        with quiet_diffusers():
            pipeline = cls(**parts)
    # As above.
    except Exception as err:
        raise ArtefactError(
            f"{folder}: cannot put {cls.__name__} together: {one_line(err)}"
        ) from err
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(folder: Path) -> Any:
    """The pipeline in a folder, in float32, from safetensors only, every tensor checked.

    Raises:
        ArtefactError: a part is missing, cannot be read, or does not fit.
        NonFiniteError: a weight holds NaN or infinity.
    """
    return assemble(folder, lambda name, cls: load_part(folder, name, cls))
