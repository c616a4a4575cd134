"""Detect changes to a pipeline object that its configurations do not record and trtq would lose.

Subclasses, patched methods, replaced layers, custom attention processors, FreeU and caches change what a
model computes. Rebuilding the model from its configuration drops such a change, so it is refused.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from torch import nn

from trtq.checkpoint.wording import one_line
from trtq.errors import UsageError

__all__ = [
    "check_freeu",
    "check_instance",
    "check_modules",
    "check_not_quantized",
    "library_class",
    "library_of",
    "modules_by_plain_name",
    "plain_name",
    "warn_of_hooks",
]

logger = logging.getLogger(__name__)

_LIBRARIES = ("diffusers", "transformers")
_SAME_ATTENTION = re.compile(r"(Sliced|XFormers|Fused)?(Joint|Flux)?AttnProcessor(NPU|2_0)?")
"""diffusers' processors that compute the same attention with different kernels."""
_FREEU = ("s1", "s2", "b1", "b2")
_OFFLOADING = ("group_offloading", "lazy_prefetch_group_offloading", "layerwise_casting", "peft")


def library_of(cls: type) -> str | None:
    """`diffusers` or `transformers` if that library defines the class, else None."""
    library = cls.__module__.partition(".")[0]
    return library if library in _LIBRARIES else None


def library_class(cls: type, what: str) -> type:
    """The nearest ancestor of a class that diffusers, transformers or trtq defines.

    Args:
        cls: class of a pipeline or a component.
        what: noun phrase that begins the message, e.g. the component's name.

    Raises:
        UsageError: there is no such ancestor, or a subclass overrides one of the ancestor's attributes.
    """
    overridden: list[str] = []
    for ancestor in cls.__mro__:
        if library_of(ancestor) is not None or ancestor.__module__.startswith("trtq."):
            changed = sorted({name for name in overridden if hasattr(ancestor, name)})
            if changed:
                is_pipeline = ancestor.__name__.endswith("Pipeline")
                example = f", e.g. {ancestor.__name__}(**pipe.components)" if is_pipeline else ""
                raise UsageError(
                    f"{what} is a {cls.__name__}, which overrides {', '.join(changed)} of "
                    f"{ancestor.__name__}; trtq would not run the override. Give a "
                    f"{ancestor.__name__}{example}"
                )
            return ancestor
        overridden += [
            name
            for name, value in vars(ancestor).items()
            if (callable(value) or isinstance(value, property)) and name != "__init__"
        ]
    raise UsageError(
        f"{what} is a {cls.__module__}.{cls.__name__}, which is defined neither by diffusers nor by "
        "transformers; use a class of one of these libraries"
    )


def check_instance(pipeline: Any, cls: type) -> None:
    """Raise if a method of a pipeline was replaced on the object.

    Args:
        pipeline: pipeline object.
        cls: class that defines the expected methods.

    Raises:
        UsageError: a method was replaced.
    """
    for name in vars(pipeline):
        if callable(getattr(cls, name, None)) and not isinstance(getattr(cls, name), type):
            raise UsageError(
                f"{name} of the pipeline was replaced on the object, and trtq would not run the "
                f"replacement; give an unmodified {cls.__name__}"
            )


def check_not_quantized(model: Any, name: str) -> None:
    """Raise if a component is already quantised.

    Args:
        model: component of the pipeline.
        name: name of the component, for messages.

    Raises:
        UsageError: the component is already quantised.
    """
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
        f"{name!r} is already quantised ({method}); give the float pipeline that it was made from"
    )


def plain_name(name: str) -> str:
    """Name of a module or tensor without the wrappers of `torch.compile` and peft."""
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "base_layer")]
    return ".".join(parts)


def modules_by_plain_name(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of a model by `plain_name`; for a wrapped module, the innermost one."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules[plain_name(name)] = module
    return modules


def check_modules(fresh: nn.Module, given: dict[str, nn.Module], name: str) -> None:
    """Raise if a module differs from the module that the configuration describes.

    Args:
        fresh: model that was built from the configuration.
        given: modules of the user's model, by plain name.
        name: name of the component, for messages.
    """
    for path, expected in fresh.named_modules(remove_duplicate=False):
        module = given.get(path)
        if module is not None:
            where = f"{name}.{path}" if path else name
            _check_module(expected, module, where, is_root=not path)


def _check_module(expected: nn.Module, module: nn.Module, where: str, *, is_root: bool) -> None:
    if not is_root and type(module) is not type(expected):
        raise UsageError(
            f"{where!r} is a {_full_name(module)}, but by its configuration a "
            f"{_full_name(expected)}; trtq would lose the replacement, give the pipeline without it"
        )
    if module.extra_repr() != expected.extra_repr():
        raise UsageError(
            f"{where!r} was changed: it is {type(module).__name__}({one_line(module.extra_repr())}), "
            f"but by its configuration ({one_line(expected.extra_repr())}); give the pipeline without "
            "this change"
        )
    for method in _replaced_methods(module):
        raise UsageError(
            f"the {method} of {where!r} was replaced on the object, e.g. by a patch (DeepCache, ToMe, "
            "...), and trtq would not run the replacement; give the pipeline without it"
        )
    for hook in _diffusers_hooks(module):
        if not hook.startswith(_OFFLOADING):
            raise UsageError(
                f"{where!r} has the diffusers hook {hook!r}, which changes the result; remove the hook "
                "first (e.g. disable_cache())"
            )
    _check_processor(expected, module, where)


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _replaced_methods(module: Any) -> list[str]:
    """Methods that were set on the object, except those that offloading and compilation set."""
    expected = {"to", "cuda", "xpu", "npu"}
    if hasattr(module, "_hf_hook") or _diffusers_hooks(module):
        expected.add("forward")
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and callable(getattr(type(module), name, None)) and name not in expected
    ]


def _diffusers_hooks(module: Any) -> list[str]:
    registry = getattr(module, "_diffusers_hook", None)
    return list(getattr(registry, "hooks", {}) or {})


def _check_processor(expected_module: Any, module: Any, where: str) -> None:
    processor = getattr(module, "processor", None)
    expected = getattr(expected_module, "processor", None)
    if processor is None or expected is None or type(processor) is type(expected):
        return
    cls = type(processor)
    if cls.__module__.startswith("diffusers.") and (
        _SAME_ATTENTION.fullmatch(cls.__name__)
        # The same attention with one product for query, key and value.
        or cls.__name__.replace("Fused", "") == type(expected).__name__
    ):
        return
    raise UsageError(
        f"{where!r} has the attention processor {cls.__name__}, which trtq would lose; call "
        "set_default_attn_processor() of its model first (for an IP-Adapter, unload_ip_adapter() of "
        "the pipeline)"
    )


def check_freeu(modules: dict[str, nn.Module], name: str) -> None:
    """Raise if FreeU is enabled on a component.

    Args:
        modules: modules of the component, by plain name.
        name: name of the component, for messages.

    Raises:
        UsageError: FreeU is enabled.
    """
    for path, module in modules.items():
        if "up_blocks" in path and any(getattr(module, key, None) is not None for key in _FREEU):
            raise UsageError(
                f"FreeU is enabled on {name!r}, and trtq would lose it; call pipe.disable_freeu() "
                "first"
            )


def warn_of_hooks(modules: dict[str, nn.Module], name: str) -> None:
    """Warn of forward hooks, which the rebuilt component does not have.

    Args:
        modules: modules of the component, by plain name.
        name: name of the component, for messages.
    """
    hooked = [
        path
        for path, module in modules.items()
        if module._forward_hooks or module._forward_pre_hooks
    ]
    if hooked:
        logger.warning(
            "%d hooks on %r (e.g. on %r) are not run: trtq works on a copy of the model",
            len(hooked),
            name,
            hooked[0] or name,
        )
