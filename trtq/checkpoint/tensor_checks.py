"""Checks of a component's tensors against its configuration, before any weight is read."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trtq.checkpoint.component_classes import is_diffusers
from trtq.checkpoint.configs import config_leaves
from trtq.checkpoint.layout import CONFIG_NAME
from trtq.checkpoint.quiet import quiet_diffusers
from trtq.checkpoint.weights import FLOATS, TensorInfo, Weights
from trtq.checkpoint.wording import list_names, one_line
from trtq.errors import ArtefactError, NonFiniteError

__all__ = [
    "check_dtypes",
    "check_finite",
    "check_finite_tensors",
    "check_loading_report",
    "check_names",
    "check_sizes",
    "meta_model",
    "unexpected_names",
]

_BUFFER_BYTES = 1 << 30
_PARAMETER_SLACK = 1 << 20
_PREFIXES = {
    "_orig_mod.": "saved from a compiled module: save `model._orig_mod` instead",
    "module.": "saved from DataParallel: save `model.module` instead",
    "model.": "saved from a wrapper: save the model inside it instead",
}


def check_finite(module: nn.Module, where: str) -> None:
    """Raise unless all floating-point parameters of a model are finite.

    Args:
        module: model to check.
        where: name of the model, used in messages.

    Raises:
        NonFiniteError: a parameter holds NaN or infinity; the message names the first one.
    """
    check_finite_tensors(module.named_parameters(), where)


def check_finite_tensors(named: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Raise unless all floating-point tensors are finite; see `check_finite`.

    Args:
        named: tensors of a model, by path.
        where: name of the model, used in messages.
    """
    for name, tensor in named:
        if tensor.numel() and tensor.is_floating_point():
            low, high = torch.aminmax(tensor.detach())
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                layer, _, leaf = name.rpartition(".")
                raise NonFiniteError(f"{where}: layer {layer!r}: its {leaf} holds NaN or infinity")


def meta_model(path: Path, config: dict[str, Any], cls: Any) -> nn.Module | None:
    """Build a model with shapes but without memory; None if its constructor needs tensor values.

    Args:
        path: file of the configuration.
        config: content of the file.
        cls: class of the component.

    Raises:
        ArtefactError: the constructor rejects the configuration.
    """
    try:
        with quiet_diffusers(), torch.device("meta"):
            if is_diffusers(cls):
                model: nn.Module = cls.from_config(dict(config))
            else:
                model = cls(cls.config_class.from_pretrained(path.parent, local_files_only=True))
    # A constructor may raise any exception for a wrong setting.
    except Exception as err:
        if "meta" in str(err).lower():
            return None
        raise ArtefactError(
            f"cannot build a {cls.__name__} from {path}: {type(err).__name__}: {one_line(err)}"
            f"{_missing_settings(config, cls)}"
        ) from err
    return model


def _missing_settings(config: Mapping[str, Any], cls: Any) -> str:
    """End of a message: the null or missing settings, which are often the cause."""
    if not is_diffusers(cls):
        return ""
    parameters = inspect.signature(cls.__init__).parameters
    absent = [key for key in parameters if key not in config and key not in ("self", "kwargs")]
    nulls = [
        key
        for key, value in config.items()
        if value is None and key in parameters and parameters[key].default is not None
    ]
    text = f"; null settings: {list_names(nulls)}" if nulls else ""
    return text + (f"; missing settings (default used): {list_names(absent)}" if absent else "")


def check_sizes(
    path: Path, config: Mapping[str, Any], model: nn.Module | None, weights: Weights
) -> None:
    """Raise if a configuration describes a larger model than the weights, before allocating memory.

    Args:
        path: file of the configuration.
        config: content of the file.
        model: result of `meta_model`; None skips the check.
        weights: headers of the component's files.

    Raises:
        ArtefactError: the configuration describes a larger model.
    """
    if model is None:
        return
    expected = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(math.prod(tensor.shape) for tensor in weights.tensors.values())
    buffer_bytes = sum(buffer.nbytes for buffer in model.buffers())
    sizes = {
        key: max(integers)
        for key, value in config.items()
        if (integers := [leaf for leaf in config_leaves(value) if type(leaf) is int])
    }
    largest = ", ".join(f"{key} {sizes[key]}" for key in sorted(sizes, key=sizes.__getitem__)[-2:])
    if expected > 2 * stored + _PARAMETER_SLACK:
        raise ArtefactError(
            f"{path} describes {expected:,} parameters (its largest sizes: {largest}), but the "
            f"weights next to it hold {stored:,} numbers; one of the two is from another model"
        )
    if buffer_bytes > 2 * weights.nbytes + _BUFFER_BYTES:
        raise ArtefactError(
            f"{path} requires buffers of {buffer_bytes:,} bytes (its largest sizes: {largest}), but "
            f"the weights have {weights.nbytes:,} bytes; one of the two is from another model"
        )


def check_dtypes(folder: Path, model: nn.Module | None, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise unless all weights are floating-point numbers.

    Args:
        folder: folder of the component.
        model: result of `meta_model`; its integer buffers are allowed.
        tensors: headers of the tensors, by name.

    Raises:
        ArtefactError: a weight is not a floating-point number.
    """
    state = {} if model is None else model.state_dict()
    integers = {
        name.rpartition(".")[2] for name, tensor in state.items() if not tensor.is_floating_point()
    }
    wrong = {}
    for name, tensor in tensors.items():
        leaf = name.rpartition(".")[2]
        if tensor.dtype not in FLOATS and leaf not in integers and leaf != "position_ids":
            wrong[name] = tensor.dtype
    if wrong:
        first = min(wrong)
        raise ArtefactError(
            f"{folder}: {len(wrong)} of {len(tensors)} weights are not floating-point numbers: "
            f"{list_names(wrong)} ({first!r} is {wrong[first]}); the weights are already quantised "
            "or damaged, give a float checkpoint"
        )


def unexpected_names(model: Any, names: Iterable[str]) -> list[str]:
    """The unexpected names, without those that the model ignores for older versions.

    Args:
        model: model of diffusers or transformers; None: only the names that every model ignores.
        names: names of tensors that are not part of the model.
    """
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    return [
        name
        for name in names
        if not name.endswith(".position_ids") and not any(re.search(p, name) for p in patterns)
    ]


def check_names(
    folder: Path, config: Mapping[str, Any], model: Any, tensors: Mapping[str, TensorInfo]
) -> None:
    """Raise unless the files hold the tensors that a diffusers model expects, with their shapes.

    Args:
        folder: folder of the component.
        config: configuration of the component.
        model: result of `meta_model`.
        tensors: headers of the tensors, by name.

    Raises:
        ArtefactError: a tensor is missing, unexpected or of the wrong shape.
    """
    stored: dict[str, Any] = dict(tensors)
    if hasattr(model, "_fix_state_dict_keys_on_load"):
        model._fix_state_dict_keys_on_load(stored)
    expected = model.state_dict()
    missing = [name for name in expected if name not in stored]
    unexpected = unexpected_names(model, (name for name in stored if name not in expected))
    shapes = {
        name: (tuple(tensor.shape), stored[name].shape)
        for name, tensor in expected.items()
        if name in stored and tuple(tensor.shape) != stored[name].shape
    }
    if missing or unexpected:
        raise ArtefactError(_mismatch_message(folder, missing, unexpected, len(tensors)))
    if shapes:
        name = min(shapes)
        wanted, given = shapes[name]
        raise ArtefactError(
            f"{folder}: {len(shapes)} tensors do not have the shape that {CONFIG_NAME} implies: "
            f"{list_names(shapes)} ({name!r} is {given}, expected {wanted})"
            f"{_missing_settings(config, type(model))}"
        )


def _common_prefix(missing: list[str], unexpected: list[str]) -> str | None:
    """The prefix of all unexpected names, if some of them without it are missing; None otherwise."""
    first = min(unexpected, default="")
    for end in (place + 1 for place, letter in enumerate(first) if letter == "."):
        prefix = first[:end]
        if all(name.startswith(prefix) for name in unexpected) and (
            any(name.removeprefix(prefix) in missing for name in unexpected)
        ):
            return prefix
    if not missing or not unexpected:
        return None
    return next((p for p in _PREFIXES if all(name.startswith(p) for name in unexpected)), None)


def _mismatch_message(
    folder: Path, missing: list[str], unexpected: list[str], tensor_count: int
) -> str:
    """One line about missing and unexpected tensors, with the probable cause and a remedy."""
    prefix = _common_prefix(missing, unexpected)
    if prefix is not None:
        cause = _PREFIXES.get(prefix, "saved as part of a larger model: save the component alone")
        return (
            f"{folder}: {len(unexpected)} tensor names begin with {prefix!r} "
            f"({list_names(unexpected)}), {cause}, or remove the prefix in Python: from "
            "safetensors.torch import load_file, save_file; "
            f"save_file({{k.removeprefix({prefix!r}): v for k, v in load_file(F).items()}}, F)"
        )
    if any(re.search(r"\.to_(added_)?q?kv\.", name) for name in unexpected) and not missing:
        return (
            f"{folder}: the model was saved with fused projections ({list_names(unexpected)}); call "
            "pipe.unfuse_qkv_projections() before saving"
        )
    if any("lora_" in name for name in unexpected):
        return (
            f"{folder}: the weights hold an adapter that is not fused ({list_names(unexpected)}); "
            "fuse it before saving (pipe.fuse_lora(); pipe.unload_lora_weights()), or save it "
            "separately and give it with --lora"
        )
    if any("_ip." in name or "encoder_hid_proj" in name for name in unexpected):
        return (
            f"{folder}: the weights hold an IP-Adapter ({list_names(unexpected)}) of a kind that trtq "
            "cannot rebuild; save the pipeline after pipe.unload_ip_adapter()"
        )
    parts = []
    if missing:
        parts.append(f"{len(missing)} are missing: {list_names(missing)}")
    if unexpected:
        parts.append(f"{len(unexpected)} are unexpected: {list_names(unexpected)}")
    return (
        f"{folder}: its {tensor_count} tensors do not fit {CONFIG_NAME}: {'; '.join(parts)}. The "
        "files are incomplete or from another model; download the whole folder"
    )


def check_loading_report(folder: Path, report: Any, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise if the library that loaded a component reports a problem.

    Args:
        folder: folder of the component.
        report: loading info of diffusers or transformers.
        tensors: headers of the tensors, by name.

    Raises:
        ArtefactError: a tensor is missing, unexpected or of the wrong shape.
    """
    report = report if isinstance(report, dict) else {}
    missing = sorted(report.get("missing_keys") or ())
    unexpected = unexpected_names(None, sorted(report.get("unexpected_keys") or ()))
    if missing or unexpected:
        raise ArtefactError(_mismatch_message(folder, missing, unexpected, len(tensors)))
    mismatched = [str(entry[0]) for entry in report.get("mismatched_keys") or ()]
    if mismatched:
        raise ArtefactError(
            f"{folder}: {len(mismatched)} tensors do not have the shape that {CONFIG_NAME} implies: "
            f"{list_names(mismatched)}"
        )
    if errors := report.get("error_msgs"):
        raise ArtefactError(f"{folder}: {one_line(errors[0])}")
