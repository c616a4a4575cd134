"""Make a plain copy of a pipeline object in any state; the object itself is not changed.

Half precision, compilation, slicing, offloading, training mode and fused projections change how a model
is computed but not its result. Each model is built again from its configuration, with the same weights
in float32. Other changes are refused, see `trtq.checkpoint.modifications`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trtq.checkpoint.components import unwrapped
from trtq.checkpoint.ip_adapter import adapter_names, add_ip_adapter, set_scales
from trtq.checkpoint.modifications import (
    check_freeu,
    check_instance,
    check_modules,
    check_not_quantized,
    library_class,
    library_of,
    modules_by_plain_name,
    plain_name,
    warn_of_hooks,
)
from trtq.checkpoint.quiet import quiet_diffusers
from trtq.checkpoint.tensor_checks import check_finite
from trtq.checkpoint.wording import one_line
from trtq.errors import QuantizationError, UsageError

__all__ = ["buffers_to_float", "plain_model", "plain_pipeline"]

_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def plain_pipeline(pipeline: Any) -> Any:
    """A pipeline of the same class with models in float32, on the CPU and in evaluation mode.

    The copy shares float32 weights on the CPU with the user's pipeline; do not write to them.

    Args:
        pipeline: diffusers pipeline; it and its models are not changed.

    Raises:
        UsageError: the object is not a pipeline, or has a change that its configuration does not record.
        QuantizationError: weights are missing, or are not finite floating-point numbers.
    """
    from diffusers import DiffusionPipeline

    if not isinstance(pipeline, DiffusionPipeline):
        what = type(pipeline).__name__
        if isinstance(pipeline, nn.Module):
            what = f"the model {what} alone"
        raise UsageError(
            f"a diffusers pipeline is required, got {what}; give the whole pipeline, a folder or a "
            "hub id"
        )
    cls = library_class(type(pipeline), "the pipeline")
    check_instance(pipeline, cls)
    plain = copy.copy(pipeline)
    if type(pipeline) is not cls and not type(pipeline).__module__.startswith("trtq."):
        plain.__class__ = cls
    # Offloading moves the user's models at the end of a call.
    for name in ("_all_hooks", "hf_device_map", "_offload_device", "_offload_gpu_id"):
        vars(plain).pop(name, None)
    plain._all_hooks = []
    for name, part in pipeline.components.items():
        if part is None or isinstance(part, str | int | float | bool | tuple | list | dict):
            continue
        if isinstance(part, nn.Module):
            part = plain_model(part, name)
        elif library_of(type(part)) is None:
            hint = (
                "; if the pipeline works without it, set it to None"
                if name == "safety_checker"
                else ""
            )
            raise UsageError(
                f"{name!r} of the pipeline is a {type(part).__name__}, which is defined neither by "
                f"diffusers nor by transformers; a run could not be opened again with it{hint}"
            )
        setattr(plain, name, part)
    plain.set_progress_bar_config(disable=True)
    return plain


def plain_model(model: nn.Module, name: str) -> nn.Module:
    """A fresh model with the same configuration and the same weights in float32, on the CPU.

    Args:
        model: model of diffusers or transformers; it is not changed.
        name: name of the component, for messages.

    Raises:
        UsageError: the model has a change that its configuration does not record.
        QuantizationError: weights are missing, or are not finite floating-point numbers.
    """
    model = unwrapped(model)
    if type(model).__module__.startswith("peft."):
        raise UsageError(
            f"{name!r} is wrapped by peft ({type(model).__name__}); merge the adapter first: "
            f"pipe.{name} = pipe.{name}.merge_and_unload()"
        )
    cls = library_class(type(model), repr(name))
    check_not_quantized(model, name)
    fresh = _empty_model(model, cls, name)
    modules = modules_by_plain_name(model)
    given = _without_fused(_weights(model, name), name)
    if adapter := adapter_names(given):
        add_ip_adapter(fresh, {key: given[key] for key in adapter})
        strengths: dict[str, Any] = {
            key: module.scale for key, module in modules.items() if hasattr(module, "to_k_ip")
        }
        set_scales(fresh, strengths)
    check_modules(fresh, modules, name)
    check_freeu(modules, name)
    expected = fresh.state_dict()
    _check_state(expected, given, name)
    fresh.load_state_dict(
        {key: _as_float(key, given[key], expected[key], name) for key in expected}, assign=True
    )
    buffers_to_float(fresh)
    tie_weights: Any = getattr(fresh, "tie_weights", None)
    if tie_weights is not None:
        tie_weights()
    if any(tensor.is_meta for tensor in [*fresh.parameters(), *fresh.buffers()]):
        raise QuantizationError(f"{name!r} has tensors without a value")
    check_finite(fresh, repr(name))
    warn_of_hooks(modules, name)
    return fresh.eval()


def _check_state(expected: dict[str, Tensor], given: dict[str, Tensor], name: str) -> None:
    """Raise unless a model has the tensors, with the shapes, that its configuration describes."""
    shapes = [
        key for key in expected.keys() & given.keys() if expected[key].shape != given[key].shape
    ]
    for problem, keys in (
        ("are missing", expected.keys() - given.keys()),
        ("are not part of its configuration", given.keys() - expected.keys()),
        ("have another shape than in its configuration", shapes),
    ):
        if keys:
            raise UsageError(
                f"{name!r} was changed after loading: {len(keys)} tensors {problem}, e.g. "
                f"{min(keys)!r}; give the component unchanged, or with a configuration that fits"
            )


def _empty_model(model: Any, cls: Any, name: str) -> nn.Module:
    """A model of the same configuration, with computed buffers but no memory for its parameters."""
    from accelerate import init_empty_weights

    if getattr(model, "config", None) is None:
        raise UsageError(
            f"{name!r} is a {cls.__name__}, which has no configuration; trtq cannot rebuild it"
        )
    try:
        with quiet_diffusers(), torch.random.fork_rng(devices=[]), init_empty_weights():
            if hasattr(cls, "from_config"):
                # A private key lists the settings that would be replaced with defaults.
                config = {k: v for k, v in model.config.items() if not k.startswith("_")}
                fresh: nn.Module = cls.from_config(config)
            else:
                fresh = cls(copy.deepcopy(model.config))
    # A constructor may raise any exception for an edited configuration.
    except Exception as err:
        raise UsageError(
            f"cannot build a {cls.__name__} from the configuration of {name!r}: {type(err).__name__}: "
            f"{one_line(err)}"
        ) from err
    return fresh


def _weights(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Tensors by plain name, without those of fused or disabled adapters.

    Raises:
        UsageError: an active adapter is not fused.
        QuantizationError: a tensor has no memory.
    """
    inside: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        layer: Any = module
        if not hasattr(layer, "base_layer") or not hasattr(layer, "lora_A"):
            continue
        inside.append(f"{path}.")
        merged = set(getattr(layer, "merged_adapters", ()))
        active = set(getattr(layer, "active_adapters", ())) & set(layer.lora_A)
        if getattr(layer, "disable_adapters", False):
            active = set()
        if active - merged:
            raise UsageError(
                f"the LoRA {', '.join(sorted(active - merged))!r} is loaded into {name!r} but not "
                f"fused ({plain_name(path)!r}); call pipe.fuse_lora() first, or "
                "pipe.unload_lora_weights() and give the file of the LoRA with --lora (loras=[...])"
            )
    tensors: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        owner = next((path for path in inside if key.startswith(path)), None)
        if owner is not None and not key.startswith(f"{owner}base_layer."):
            continue
        if tensor.is_meta:
            raise QuantizationError(
                f"{name!r} has no weights in memory ({plain_name(key)!r} is on the meta device: "
                "sequential or disk offload, or a model without weights); load the pipeline without "
                "offloading, or give its folder"
            )
        tensors[plain_name(key)] = tensor
    return tensors


def _without_fused(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Drop fused projections from a state; the single projections must still have the same values.

    Raises:
        UsageError: the values differ.
    """
    for key in list(state):
        parent, _, leaf = key.rpartition(".")
        owner, _, fused = parent.rpartition(".")
        if fused not in _FUSED:
            continue
        parts = [f"{owner}.{single}.{leaf}" for single in _FUSED[fused]]
        if not all(part in state for part in parts):
            continue
        if not torch.equal(torch.cat([state[part] for part in parts]), state[key]):
            raise UsageError(
                f"{name}.{key} was changed after the projections were fused; call "
                "pipe.unfuse_qkv_projections() and repeat the change"
            )
        del state[key]
    return state


def _as_float(key: str, tensor: Tensor, expected: Tensor, name: str) -> Tensor:
    """A tensor for the fresh model, on the CPU; float32 unless the model expects integers."""
    if type(tensor) not in (Tensor, nn.Parameter):
        raise UsageError(
            f"{name}.{key} is a {type(tensor).__name__}: {name!r} is quantised or distributed over "
            "devices; give the float pipeline that it was made from"
        )
    if not expected.is_floating_point():
        return tensor.detach().cpu()
    if not tensor.is_floating_point():
        raise QuantizationError(
            f"{name}.{key} is {tensor.dtype}, not a floating-point number; give the float pipeline"
        )
    return tensor.detach().to("cpu", torch.float32).contiguous()


def buffers_to_float(model: nn.Module) -> None:
    """Convert a model's computed buffers (positions, frequencies) to float32, in place."""
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[key] = buffer.float()
