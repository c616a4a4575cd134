"""Single-file checkpoints in the original layout of their authors, as sharing sites give them.

A folder of the same architecture gives the classes, configurations, tokenizers and schedulers; the file
gives the weights. Components that the file lacks are read from the folder.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trtq.checkpoint.component_classes import is_component, is_diffusers, part_class
from trtq.checkpoint.configs import check_config, check_layer_counts
from trtq.checkpoint.layout import CONFIG_NAME, read_index, read_json
from trtq.checkpoint.pipeline_folder import align_tensors, assemble, load_part
from trtq.checkpoint.prepared import buffers_to_float
from trtq.checkpoint.quiet import quiet_diffusers
from trtq.checkpoint.single_file_layout import (
    Conversion,
    as_traced,
    model_conversion,
    origins_of,
    text_conversions,
)
from trtq.checkpoint.tensor_checks import (
    check_dtypes,
    check_finite,
    check_sizes,
    meta_model,
    unexpected_names,
)
from trtq.checkpoint.tensor_file import TensorFile, open_tensor_file
from trtq.checkpoint.weight_files import has_weights
from trtq.checkpoint.weights import TensorInfo, Weights
from trtq.checkpoint.wording import list_names, one_line
from trtq.errors import ArtefactError

__all__ = ["load_single_file"]

logger = logging.getLogger(__name__)

_FIRST = ("unet", "transformer", "decoder", "prior")
"""Components that the file must hold, if the pipeline has them."""
_AUTOENCODER = ("first_stage_model.", "vae.", "audio_vae.")
_UNUSED = re.compile(
    r"(^|\.)(position_ids|logit_scale|num_batches_tracked)$|^model_ema\.|\.loss\.|^(edm_|denoiser\.)|"
    r"(^|\.)(betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_\w+|posterior_\w+|lvlb_weights|logvar)$"
)
"""Tensors of training code that no component uses."""
_UNCHECKED = ("safety_checker",)
"""Components that diffusers leaves out when it reads a single file."""


@dataclass(frozen=True)
class _Part:
    """A component that the file holds.

    Attributes:
        model: model of the component, its parameters have no memory.
        convert: conversion of the file's tensors.
        state: traced result of the conversion, by name in the model.
        origins: names of the file's tensors that the component uses.
    """

    model: nn.Module
    convert: Conversion
    state: dict[str, Tensor]
    origins: frozenset[str]


def load_single_file(file: Path, folder: Path) -> Any:
    """Load the pipeline in a single-file checkpoint in float32, with all tensors checked.

    Args:
        file: safetensors file in the original layout; layers that ComfyUI quantised are decoded.
        folder: diffusers folder of the same architecture.

    Raises:
        ArtefactError: the file is damaged or of another architecture than the folder, a component is in
            neither of the two, or a tensor is missing, unexpected or of the wrong shape.
        NonFiniteError: a weight holds NaN or infinity.
    """
    stored = open_tensor_file(file)
    header = stored.header
    stored.warn_if_quantized()
    check_dtypes(
        file, None, {name: info for name, info in header.items() if not _UNUSED.search(name)}
    )
    parts = _plan(file, folder, header)
    _check_unused(file, folder, header, parts)

    def load(name: str, cls: Any) -> Any:
        if name in parts:
            return _load(stored, name, parts[name])
        if cls is None or name in _UNCHECKED:
            return None
        if issubclass(cls, nn.Module) and not has_weights(folder / name):
            raise ArtefactError(
                f"{file} holds no tensors of the component {name!r} ({cls.__name__}), and "
                f"{folder / name} holds no weights of it; give a whole pipeline of the same "
                f"architecture with --config (config=...), e.g. after: hf download OWNER/NAME "
                f"--include '{name}/*'"
            )
        return load_part(folder, name, cls)

    return assemble(folder, load)


def _plan(file: Path, folder: Path, header: dict[str, TensorInfo]) -> dict[str, _Part]:
    """The components that the file holds, by name; their tensors are complete and fit."""
    entries = {
        name: part_class(folder, name, *entry)
        for name, entry in read_index(folder).items()
        if is_component(name, entry)
    }
    checkpoint = as_traced(header)
    parts: dict[str, _Part] = {}
    # Denoisers come first, because other classes (a ControlNet) would accept their tensors, too.
    for name in sorted(entries, key=lambda name: (name not in _FIRST, name)):
        cls = entries[name]
        if cls is None or not issubclass(cls, nn.Module) or name in _UNCHECKED:
            continue
        if not (folder / name / CONFIG_NAME).is_file():
            continue
        used = frozenset().union(*(part.origins for part in parts.values()))
        part = _plan_part(file, folder / name, cls, Weights(header, None), checkpoint, used)
        if part is not None:
            _check_part(file, folder / name, part, header)
            parts[name] = part
        elif name in _FIRST:
            raise ArtefactError(
                f"{file} holds no tensors of a {cls.__name__}, the {name!r} of {folder}; give a "
                "folder of the file's architecture with --config (config=...)"
            )
    return parts


def _plan_part(
    file: Path,
    place: Path,
    cls: Any,
    weights: Weights,
    checkpoint: dict[str, Tensor],
    used: frozenset[str],
) -> _Part | None:
    """The part of a file that holds a component; None if the file does not hold it."""
    path = place / CONFIG_NAME
    config = read_json(path)
    check_config(path, config, cls)
    check_layer_counts(path, config, weights)
    check_sizes(path, config, meta_model(path, config, cls), weights)
    model = _empty_model(path, config, cls)
    best: _Part | None = None
    score = 0
    if is_diffusers(cls):
        conversion = model_conversion(model, config, checkpoint)
        conversions = [] if conversion is None else [conversion]
    else:
        conversions = text_conversions(model, checkpoint)
    expected = model.state_dict()
    free = {name: tensor for name, tensor in checkpoint.items() if name not in used}
    for convert in conversions:
        try:
            state = convert(checkpoint if place.name in _FIRST else free)
        # A mapping of diffusers may raise any exception for tensors of another layout.
        except Exception as err:
            if not _is_in_file(place.name, free):
                continue
            raise ArtefactError(
                f"the tensors of {file} are not those of a {cls.__name__}, the {place.name!r} of "
                f"{place.parent} ({type(err).__name__}: {one_line(err)}); give a folder of the file's "
                "architecture with --config (config=...)"
            ) from err
        # A mapping may return None for a tensor that the file lacks.
        state = {n: t for n, t in state.items() if n in expected and isinstance(t, Tensor)}
        fitting = sum(expected[name].shape == tensor.shape for name, tensor in state.items())
        origins = origins_of(state.values())
        if fitting > score and origins and not origins & used:
            best, score = _Part(model, convert, state, origins), fitting
    return best


def _is_in_file(name: str, tensors: dict[str, Tensor]) -> bool:
    """Whether the file must hold a component, by the component's name and the tensors' prefixes."""
    return name in _FIRST or ("vae" in name and any(n.startswith(_AUTOENCODER) for n in tensors))


def _empty_model(path: Path, config: dict[str, Any], cls: Any) -> nn.Module:
    """A model with computed buffers, but without memory for its parameters."""
    from accelerate import init_empty_weights

    try:
        with quiet_diffusers(), torch.random.fork_rng(devices=[]), init_empty_weights():
            if is_diffusers(cls):
                model: nn.Module = cls.from_config(dict(config))
            else:
                model = cls(cls.config_class.from_pretrained(path.parent, local_files_only=True))
    # A constructor may raise any exception for a wrong setting.
    except Exception as err:
        raise ArtefactError(
            f"cannot build a {cls.__name__} from {path}: {type(err).__name__}: {one_line(err)}"
        ) from err
    return model


def _check_part(file: Path, place: Path, part: _Part, header: dict[str, TensorInfo]) -> None:
    """Raise unless the file has all tensors of a component, with the shapes of its configuration."""
    expected = part.model.state_dict(keep_vars=True)
    # Tied parameters have several names and need one of them.
    given = {id(expected[name]) for name in part.state}
    missing = [n for n, t in expected.items() if n not in part.state and id(t) not in given]
    shapes = {
        name: (tuple(tensor.shape), tuple(expected[name].shape))
        for name, tensor in part.state.items()
        if tensor.shape != expected[name].shape
    }
    problems = []
    if missing:
        problems.append(f"{len(missing)} are missing: {list_names(missing)}")
    if shapes:
        name = min(shapes)
        problems.append(
            f"{len(shapes)} have another shape: {list_names(shapes)} ({name!r} is "
            f"{shapes[name][0]}, expected {shapes[name][1]})"
        )
    if problems:
        raise ArtefactError(
            f"{file}: its tensors do not fit {place / CONFIG_NAME}: {'; '.join(problems)}. The file is "
            "incomplete or of another architecture; download it again, or give a folder of its "
            "architecture with --config (config=...)"
        )


def _check_unused(
    file: Path, folder: Path, header: dict[str, TensorInfo], parts: dict[str, _Part]
) -> None:
    """Raise if a component has tensors in the file that its model does not; warn of other tensors."""
    from diffusers.loaders.single_file_utils import SD_2_TEXT_ENCODER_KEYS_TO_IGNORE

    used = frozenset().union(*(part.origins for part in parts.values()))
    unused = [
        name
        for name in header
        if name not in used
        and not _UNUSED.search(name)
        and name not in SD_2_TEXT_ENCODER_KEYS_TO_IGNORE
    ]
    for name, part in parts.items():
        prefix = _common_prefix(part.origins)
        others = unexpected_names(part.model, (n for n in unused if n.startswith(prefix)))
        if others:
            raise ArtefactError(
                f"{file}: {len(others)} tensors are unexpected: {list_names(others)}; the {name!r} of "
                f"{folder} has no place for them, so the folder is of another architecture or the "
                "file holds an adapter; give a folder of its architecture with --config (config=...)"
            )
    if unused:
        logger.warning("%s: %d tensors are ignored: %s", file, len(unused), list_names(unused))


def _common_prefix(names: frozenset[str]) -> str:
    """The levels that all names begin with, e.g. `model.diffusion_model.`."""
    low, high = min(names).split("."), max(names).split(".")
    common = []
    for left, right in zip(low[:-1], high[:-1], strict=False):
        if left != right:
            break
        common.append(f"{left}.")
    return "".join(common)


def _load(stored: TensorFile, name: str, part: _Part) -> nn.Module:
    """Read the tensors of a component into its model."""
    file = stored.path
    converted = part.convert(stored.read(part.origins))
    model = part.model
    expected = model.state_dict()
    state = {key: converted[key].to(expected[key].dtype).contiguous() for key in part.state}
    model.load_state_dict(state, strict=False, assign=True)
    tie_weights: Any = getattr(model, "tie_weights", None)
    if tie_weights is not None:
        tie_weights()
    buffers_to_float(model)
    tensors_left = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if meta := [key for key, tensor in tensors_left.items() if tensor.is_meta]:
        raise ArtefactError(
            f"{file}: {len(meta)} tensors of the {name!r} got no value: {list_names(meta)}"
        )
    check_finite(model, f"{file}: {name}")
    align_tensors(model)
    return model.eval()
