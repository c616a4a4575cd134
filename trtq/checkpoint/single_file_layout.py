"""Conversion of original tensor names to those of diffusers and transformers, by diffusers' own rules.

The conversion first runs on tensors without memory that remember which tensors of the file they are made
of. Names and shapes are therefore checked before any weight is read, and unused tensors are known.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trtq.checkpoint.conversion_probe import ConversionError
from trtq.checkpoint.quiet import quiet_diffusers
from trtq.checkpoint.split_tensors import split_originals
from trtq.checkpoint.weights import TensorInfo

__all__ = ["Conversion", "as_traced", "model_conversion", "origins_of", "text_conversions"]

Conversion = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Function from the tensors of a file, by original name, to the tensors of a component."""

_CLIP = (
    "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_g.transformer.",
    "text_encoders.t5xxl.transformer.",
)
"""Prefixes of text encoders that are stored under the names of transformers."""
_OPEN_CLIP = (
    "cond_stage_model.model.",
    "conditioner.embedders.1.model.",
    "conditioner.embedders.0.model.",
)
"""Prefixes of text encoders that are stored under the names of OpenCLIP."""
_WITHOUT_PROJECTION = "text_encoders.clip_l.transformer."
"""Text encoder whose projection files leave out, because it is the identity."""
_PROJECTION = "text_projection.weight"
_WRAPPER = "text_model."


class _Traced(Tensor):
    """A tensor without memory that knows the names of the tensors it is made of."""

    origins: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        base: Any = super()
        result = base.__torch_function__(func, types, args, kwargs or {})
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, _Traced)]
        if made:
            origins = origins_of(pytree.tree_leaves((args, kwargs)))
            for leaf in made:
                leaf.origins = origins
        return result


def as_traced(tensors: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Float tensors without memory, of the shapes in a file's header, that trace a conversion."""
    traced: dict[str, Tensor] = {}
    for name, info in tensors.items():
        tensor = torch.empty(info.shape, device="meta").as_subclass(_Traced)
        tensor.origins = frozenset((name,))
        traced[name] = tensor
    return traced


def origins_of(values: Iterable[Any]) -> frozenset[str]:
    """Original names of all tensors that traced tensors are made of."""
    return frozenset().union(*(v.origins for v in values if isinstance(v, _Traced)))


def model_conversion(
    model: nn.Module, config: Mapping[str, Any], names: Collection[str]
) -> Conversion | None:
    """The conversion of a diffusers model; None if diffusers has none for its class.

    Args:
        model: component, its parameters may have no memory.
        config: its configuration, which decides how many layers are converted.
        names: names of the file's tensors.
    """
    from diffusers.loaders import single_file_model

    if all(name in names for name in model.state_dict()):
        return dict
    name = single_file_model._get_single_file_loadable_mapping_class(type(model))
    if name is None:
        return None
    mapping = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]

    def convert(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            with quiet_diffusers():
                # Some mappings take tensors out of their argument.
                converted: dict[str, Tensor] = mapping(
                    checkpoint=dict(checkpoint), config=dict(config)
                )
        # A mapping may raise any exception for tensors of other sizes than the released model's.
        except Exception:
            with suppress(ConversionError):
                return split_originals(model, config, checkpoint)
            raise
        return converted

    return convert


def text_conversions(model: nn.Module, names: Collection[str]) -> list[Conversion]:
    """The conversions that may give a text encoder, one for each prefix of original names.

    Args:
        model: text encoder of transformers, its parameters may have no memory.
        names: names of the file's tensors.
    """
    return [
        _text_conversion(model, prefix)
        for prefix in (*_CLIP, *_OPEN_CLIP)
        if any(name.startswith(prefix) for name in names)
    ]


def _text_conversion(model: nn.Module, prefix: str) -> Conversion:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    expected = model.state_dict()
    wrapped = any(name.startswith(_WRAPPER) for name in expected)

    def convert(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
        if prefix in _OPEN_CLIP:
            state: dict[str, Tensor] = convert_open_clip_checkpoint(
                model, checkpoint, prefix=prefix
            )
        else:
            state = {
                name.removeprefix(prefix): tensor
                for name, tensor in checkpoint.items()
                if name.startswith(prefix)
            }
        if (
            prefix == _WITHOUT_PROJECTION
            and (entry := expected.get("text_projection.weight")) is not None
        ):
            state["text_projection.weight"] = torch.eye(*entry.shape)
        if not wrapped:
            # transformers 5 removed this level of names from some of its text encoders.
            state = {name.removeprefix(_WRAPPER): tensor for name, tensor in state.items()}
        return state

    return convert
