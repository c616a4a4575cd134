"""Attention processors: how a denoiser of diffusers computes attention, which pipelines may change.

Some pipelines set processors during their call, e.g. those of perturbed-attention guidance, and users
set the strength of an IP-Adapter. A graph holds what the processors computed when it was traced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from trtq.quant.stand_in import StandIn

__all__ = [
    "AttentionProcessor",
    "attention_processors",
    "changed_processors",
    "described_processors",
    "kept_processors",
    "processed_modules",
    "with_processors",
]

_SUFFIX = ".processor"


class AttentionProcessor(Protocol):
    """A function of an attention module and its inputs; diffusers calls it in place of the module."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The attention of the hidden states, `[B,S,C]`."""


def attention_processors(model: nn.Module) -> dict[str, AttentionProcessor]:
    """The attention processors of a model of diffusers by path; empty for a model without them."""
    return dict(getattr(model, "attn_processors", None) or {})


def changed_processors(
    model: nn.Module, before: Mapping[str, AttentionProcessor]
) -> dict[str, AttentionProcessor]:
    """The attention processors of a model that are other objects than earlier ones, by path."""
    now = attention_processors(model)
    return {name: new for name, new in now.items() if new is not before.get(name)}


def described_processors(processors: Mapping[str, Any]) -> dict[str, str]:
    """Class and settings of attention processors, e.g. `IPAdapterAttnProcessor2_0(scale=[0.5])`."""
    return {name: _description(processor) for name, processor in processors.items()}


def _description(processor: Any) -> str:
    settings = [
        f"{name}={value!r}"
        for name, value in sorted(vars(processor).items())
        if not name.startswith("_") and name != "training" and _is_plain(value)
    ]
    return f"{type(processor).__name__}({', '.join(settings)})"


def _is_plain(value: Any) -> bool:
    """Whether a setting is a number, a text, or a list of these."""
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, bool | int | float | str)


@contextmanager
def kept_processors(models: Iterable[nn.Module]) -> Iterator[None]:
    """After the block, models have their attention processors back.

    A pipeline that sets processors does not restore them if its call ends early.

    Args:
        models: models of diffusers, or modules that replace them.
    """
    initial = [(model, attention_processors(model)) for model in models]
    try:
        yield
    finally:
        for model, before in initial:
            changed = changed_processors(model, before)
            for name, module in processed_modules(model, changed):
                _set(module, before[name])


@contextmanager
def with_processors(model: nn.Module, processors: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block, modules of a model have other attention processors.

    Processors that are modules hold weights of their model, so only their settings are taken over.

    Args:
        model: model of diffusers, or a module that replaces one.
        processors: processors by path, as in `attention_processors`; those of other modules stay.
    """
    if not processors:
        yield
        return
    before = attention_processors(model)
    changed = {name: new for name, new in processors.items() if before.get(name) is not new}
    settings: list[tuple[Any, dict[str, Any]]] = []
    replaced: list[tuple[Any, Any]] = []
    for name, module in processed_modules(model, changed):
        old, new = before[name], changed[name]
        if isinstance(new, nn.Module):
            shared = [k for k, value in vars(new).items() if k in vars(old) and _is_plain(value)]
            settings.append((old, {key: vars(old)[key] for key in shared}))
            vars(old).update({key: vars(new)[key] for key in shared})
        else:
            replaced.append((module, old))
            _set(module, new)
    try:
        yield
    finally:
        for module, old in replaced:
            _set(module, old)
        for old, values in settings:
            vars(old).update(values)


def processed_modules(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The attention modules of a model that have processors of these paths, with the paths.

    Args:
        model: model of diffusers, or a module that replaces one.
        names: paths of processors, as in `attention_processors`; those of no module are left out.
    """
    inner = model.model_inside() if isinstance(model, StandIn) else model
    known = attention_processors(model)
    modules = {} if inner is None else dict(inner.named_modules())
    for name in names:
        module = modules.get(name.removesuffix(_SUFFIX))
        if module is not None and name in known:
            yield name, module


def _set(module: Any, processor: Any) -> None:
    # A module in `processor` has to be removed before anything else takes its place.
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor
