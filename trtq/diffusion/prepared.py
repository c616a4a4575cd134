"""A pipeline object as people prepare it -> a plain one of the same parts; the user's stays as it is.

Half precision, compilation, slicing, offloading, training mode and fused projections change how a model
is computed and not what it is: each model is built again from its configuration, and given the same
weights in float32. What changes the model itself (adapters that are not fused, layers or processors of
one's own, FreeU) cannot be seen in a configuration, so it is refused.
"""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import torch
from torch import Tensor, nn

from trtq.diffusion.checkpoint import check_finite, one_line
from trtq.diffusion.quiet import quiet_diffusers
from trtq.errors import QuantizationError, UsageError

__all__ = ["plain_pipeline"]

logger = logging.getLogger(__name__)

_LIBRARIES = ("diffusers", "transformers")
_SAME_ATTENTION = re.compile(r"(Sliced|XFormers|Fused)?(Joint|Flux)?AttnProcessor(NPU|2_0)?")
"""diffusers' processors that compute the same attention in other ways."""
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
_FREEU = ("s1", "s2", "b1", "b2")
_OFFLOADING = ("group_offloading", "lazy_prefetch_group_offloading", "layerwise_casting", "peft")


def plain_pipeline(pipeline: Any) -> Any:
    """A pipeline of the same class, whose models are float32, on the CPU and in evaluation mode.

    It shares float32 weights on the CPU with the user's pipeline, so they must not be written to.

    Args:
        pipeline: a diffusers pipeline; neither it nor its models are changed.

    Raises:
        UsageError: it is no pipeline, or was changed in a way that its configuration does not tell.
        QuantizationError: a model's weights are not there, or not finite floating-point numbers.
    """
    from diffusers import DiffusionPipeline

    if not isinstance(pipeline, DiffusionPipeline):
        what = type(pipeline).__name__
        if isinstance(pipeline, nn.Module):
            what = f"the model {what} alone"
        raise UsageError(
            f"a pipeline of diffusers is needed, got {what}; give the whole pipeline, a folder or "
            "a hub id"
        )
    cls = _own_class(type(pipeline), "the pipeline")
    _check_instance(pipeline, cls)
    plain = copy.copy(pipeline)
    if type(pipeline) is not cls and not type(pipeline).__module__.startswith("trtq."):
        plain.__class__ = cls
    # Offloading moves the user's own models at the end of a call.
    for name in ("_all_hooks", "hf_device_map", "_offload_device", "_offload_gpu_id"):
        vars(plain).pop(name, None)
    plain._all_hooks = []
    for name, part in pipeline.components.items():
        if part is None or isinstance(part, str | int | float | bool | tuple | list | dict):
            continue
        if isinstance(part, nn.Module):
            part = plain_model(part, name)
        elif _library(type(part)) is None:
            hint = "; to do without it, set it to None" if name == "safety_checker" else ""
            raise UsageError(
                f"{name!r} of the pipeline is a {type(part).__name__}, which is neither of "
                f"diffusers nor of transformers; a run could not be opened again with it{hint}"
            )
        setattr(plain, name, part)
    plain.set_progress_bar_config(disable=True)
    return plain


def _library(cls: type) -> str | None:
    library = cls.__module__.partition(".")[0]
    return library if library in _LIBRARIES else None


def _own_class(cls: type, what: str) -> type:
    """The nearest ancestor that diffusers, transformers or trtq itself defines.

    Raises:
        UsageError: there is none, or a subclass overrides what would then be lost.
    """
    overridden: list[str] = []
    for ancestor in cls.__mro__:
        if _library(ancestor) is not None or ancestor.__module__.startswith("trtq."):
            changed = sorted({name for name in overridden if hasattr(ancestor, name)})
            if changed:
                raise UsageError(
                    f"{what} is a {cls.__name__}, which overrides {', '.join(changed)} of "
                    f"{ancestor.__name__}; trtq would not run that. Give a {ancestor.__name__}"
                    + (
                        f", e.g. {ancestor.__name__}(**pipe.components)"
                        if ancestor.__name__.endswith("Pipeline")
                        else ""
                    )
                )
            return ancestor
        overridden += [
            name
            for name, value in vars(ancestor).items()
            if (callable(value) or isinstance(value, property)) and name != "__init__"
        ]
    raise UsageError(
        f"{what} is a {cls.__module__}.{cls.__name__}, which is neither of diffusers nor of "
        "transformers"
    )


def _check_instance(pipeline: Any, cls: type) -> None:
    """Refuse a pipeline whose methods were replaced on the object."""
    for name in vars(pipeline):
        if callable(getattr(cls, name, None)) and not isinstance(getattr(cls, name), type):
            raise UsageError(
                f"{name} of the pipeline was replaced by a function of yours, which trtq would not "
                f"run; give a pipeline as {cls.__name__} makes it"
            )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s and data-parallel wrappers."""
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def plain_model(model: nn.Module, name: str) -> nn.Module:
    """A fresh model of the same configuration with the same weights in float32, on the CPU.

    Args:
        model: of diffusers or transformers; it is not changed.
        name: its component's name, for messages.

    Raises:
        UsageError: it was changed in a way that its configuration does not tell.
        QuantizationError: its weights are not there, or not finite floating-point numbers.
    """
    model = _unwrapped(model)
    if type(model).__module__.startswith("peft."):
        raise UsageError(
            f"{name!r} is wrapped by peft ({type(model).__name__}); merge it first: "
            f"pipe.{name} = pipe.{name}.merge_and_unload()"
        )
    cls = _own_class(type(model), repr(name))
    _check_not_quantized(model, name)
    fresh = _fresh(model, cls, name)
    users = _users_modules(model)
    _check_modules(fresh, users, name)
    _check_freeu(users, name)
    state = _check_fused(_weights(model, name), name)
    own = fresh.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    for what, keys in (
        ("lacks", missing),
        ("has in addition", unexpected),
        ("has in another shape", shapes),
    ):
        if keys:
            raise UsageError(
                f"{name!r} was changed since it was loaded: it {what} {len(keys)} tensors of its "
                f"configuration, e.g. {sorted(keys)[0]!r}; give it as it is loaded, or with a "
                "configuration that fits"
            )
    fresh.load_state_dict(
        {key: _float(key, state[key], own[key], name) for key in own}, assign=True
    )
    _float_buffers(fresh)
    tie: Any = getattr(fresh, "tie_weights", None)
    if tie is not None:
        tie()
    if any(tensor.is_meta for tensor in [*fresh.parameters(), *fresh.buffers()]):
        raise QuantizationError(f"{name!r} has tensors without a value")
    check_finite(fresh, repr(name))
    _note_hooks(users, name)
    return fresh.eval()


def _check_not_quantized(model: Any, name: str) -> None:
    config = getattr(model, "config", None)
    quantization = getattr(config, "quantization_config", None)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantization is None and quantizer is None and not getattr(model, "is_quantized", False):
        return
    method = getattr(quantization, "quant_method", None)
    if isinstance(quantization, dict):
        method = quantization.get("quant_method")
    method = getattr(method, "value", method) or type(quantizer or quantization).__name__
    raise UsageError(
        f"{name!r} is quantised already ({method}); give the float pipeline it was made of"
    )


def _fresh(model: Any, cls: Any, name: str) -> nn.Module:
    """A model without memory for its parameters; its other tensors are computed."""
    from accelerate import init_empty_weights

    if getattr(model, "config", None) is None:
        raise UsageError(f"{name!r} is a {cls.__name__}, which has no configuration")
    try:
        with quiet_diffusers(), torch.random.fork_rng(devices=[]), init_empty_weights():
            if hasattr(cls, "from_config"):
                # Private keys, too, would say which settings to take the defaults of.
                config = {k: v for k, v in model.config.items() if not k.startswith("_")}
                fresh: nn.Module = cls.from_config(config)
            else:
                fresh = cls(copy.deepcopy(model.config))
    # A constructor raises anything of a configuration that was changed by hand.
    except Exception as err:
        raise UsageError(
            f"the configuration of {name!r} does not make a {cls.__name__}: {type(err).__name__}: "
            f"{one_line(err)}"
        ) from err
    return fresh


def _clean(name: str) -> str:
    """The name that a module or tensor has without the wrappers of `torch.compile` and peft."""
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "base_layer")]
    return ".".join(parts)


def _users_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by the name that a plain model has for them; of wrapped ones the one inside."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[_clean(name)] = module
    return found


def _check_modules(fresh: nn.Module, users: dict[str, nn.Module], name: str) -> None:
    """Refuse modules that are of another class, or set otherwise, than the configuration says."""
    for path, module in fresh.named_modules(remove_duplicate=False):
        own = users.get(path)
        where = f"{name}.{path}" if path else name
        if own is None:
            continue
        if path and type(own) is not type(module):
            raise UsageError(
                f"{where!r} is a {_full(own)}, but by its configuration a {_full(module)}; trtq "
                "would not keep the replacement, give the pipeline without it"
            )
        if own.extra_repr() != module.extra_repr():
            raise UsageError(
                f"{where!r} was changed: {type(own).__name__}({one_line(own.extra_repr())}), but by "
                f"its configuration ({one_line(module.extra_repr())})"
            )
        for method in _replaced_methods(own):
            raise UsageError(
                f"the {method} of {where!r} was replaced by a function of yours or of a patch "
                "(DeepCache, ToMe, ...), which trtq would not run; give the pipeline without it"
            )
        for hook in _registry(own):
            if not hook.startswith(_OFFLOADING):
                raise UsageError(
                    f"{where!r} has diffusers' hook {hook!r}, which changes what is computed; take "
                    "it off first (e.g. disable_cache())"
                )
        _check_processor(module, own, where)


def _full(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _replaced_methods(module: Any) -> list[str]:
    """Methods that were put on the object itself; those of offloading and compiling are passed over."""
    ours = {"to", "cuda", "xpu", "npu"}
    if hasattr(module, "_hf_hook") or _registry(module):
        ours.add("forward")
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and callable(getattr(type(module), name, None)) and name not in ours
    ]


def _registry(module: Any) -> list[str]:
    registry = getattr(module, "_diffusers_hook", None)
    return list(getattr(registry, "hooks", {}) or {})


def _check_processor(fresh: Any, own: Any, where: str) -> None:
    processor = getattr(own, "processor", None)
    expected = getattr(fresh, "processor", None)
    if processor is None or expected is None or type(processor) is type(expected):
        return
    cls = type(processor)
    if cls.__module__.startswith("diffusers.") and _SAME_ATTENTION.fullmatch(cls.__name__):
        return
    raise UsageError(
        f"{where!r} has the attention processor {cls.__name__}, which trtq does not keep; call "
        "set_default_attn_processor() of its model first (unload_ip_adapter() of the pipeline for "
        "an IP-Adapter)"
    )


def _check_freeu(users: dict[str, nn.Module], name: str) -> None:
    for path, module in users.items():
        if "up_blocks" in path and any(getattr(module, key, None) is not None for key in _FREEU):
            raise UsageError(
                f"FreeU is enabled on {name!r}, which trtq does not keep; call "
                "pipe.disable_freeu() first"
            )


def _weights(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Tensors by their plain names; those of fused or disabled adapters are left out.

    Raises:
        UsageError: adapters are loaded and not fused.
        QuantizationError: tensors have no memory.
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
                f"the LoRA {', '.join(sorted(active - merged))!r} is loaded into {name!r} and not "
                f"fused ({_clean(path)!r}); call pipe.fuse_lora() first, or "
                "pipe.unload_lora_weights() and give its file with --lora (loras=[...])"
            )
    found: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        owner = next((path for path in inside if key.startswith(path)), None)
        if owner is not None and not key.startswith(f"{owner}base_layer."):
            continue
        if tensor.is_meta:
            raise QuantizationError(
                f"{name!r} has no weights in memory ({_clean(key)!r} is on meta: sequential or "
                "disk offload, or a model that was only built); load the pipeline without "
                "offloading, or give its folder"
            )
        found[_clean(key)] = tensor
    return found


def _check_fused(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Leave fused projections out; the single ones are still there and must be the same.

    Raises:
        UsageError: they are not.
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
                "pipe.unfuse_qkv_projections() and make the change again"
            )
        del state[key]
    return state


def _float(key: str, tensor: Tensor, own: Tensor, name: str) -> Tensor:
    """One tensor as the fresh model wants it: float32 where it is a float, on the CPU."""
    if type(tensor) not in (Tensor, nn.Parameter):
        raise UsageError(
            f"{name}.{key} is a {type(tensor).__name__}: {name!r} is quantised or spread over "
            "devices; give the float pipeline it was made of"
        )
    if not own.is_floating_point():
        return tensor.detach().cpu()
    if not tensor.is_floating_point():
        raise QuantizationError(
            f"{name}.{key} is {tensor.dtype}, not a floating-point number; give the float pipeline"
        )
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _float_buffers(fresh: nn.Module) -> None:
    """Tensors that no file holds (positions, frequencies) stay the fresh model's own, in float32."""
    for module in fresh.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[key] = buffer.float()


def _note_hooks(users: dict[str, nn.Module], name: str) -> None:
    hooked = [
        path for path, module in users.items() if module._forward_hooks or module._forward_pre_hooks
    ]
    if hooked:
        logger.warning(
            "%d hooks on %r (e.g. on %r) are not run: trtq works on a copy of the model",
            len(hooked),
            name,
            hooked[0] or name,
        )
