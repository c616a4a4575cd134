"""IP-Adapters inside a UNet: modules that its configuration does not describe, but its weights do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trtq.checkpoint.quiet import quiet_diffusers
from trtq.errors import UsageError

__all__ = ["adapter_names", "adapter_scales", "add_ip_adapter", "set_scales"]

_ATTENTION = re.compile(r"\.processor\.to_[kv]_ip\.\d+\.weight$")
_PROJECTION = re.compile(
    r"^encoder_hid_proj\.image_projection_layers\.(\d+)\.(image_embeds|norm)\.(weight|bias)$"
)
_ORIGINAL = {"image_embeds": "proj", "norm": "norm"}
"""Names of an adapter's projection in the adapter's own file."""


def adapter_names(names: Iterable[str]) -> list[str]:
    """The names of the tensors that belong to IP-Adapters of the common kind, with one projection.

    Args:
        names: names of a UNet's tensors.

    Returns:
        The names; empty if there is no adapter, or an adapter of another kind (Plus, Face ID).
    """
    listed = list(names)
    attention = [name for name in listed if _ATTENTION.search(name)]
    projection = [name for name in listed if _PROJECTION.match(name)]
    others = any(n.startswith("encoder_hid_proj.") and n not in projection for n in listed)
    return [] if others or not attention or not projection else [*attention, *projection]


def add_ip_adapter(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give a UNet the modules of its IP-Adapters, in place, as diffusers does for an adapter's file.

    Args:
        model: UNet without adapters; its parameters may have no memory.
        tensors: tensors of the adapters by name in the UNet, see `adapter_names`.

    Raises:
        KeyError: the adapters lack a tensor.
    """
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    if on_meta:
        tensors = {name: tensor.to("meta") for name, tensor in tensors.items()}
    count = 1 + max(int(match[1]) for name in tensors if (match := _PROJECTION.match(name)))
    adapters: list[dict[str, dict[str, Tensor]]] = []
    names = [name for name in model.attn_processors if not name.endswith("attn1.processor")]
    for number in range(count):
        layer = f"encoder_hid_proj.image_projection_layers.{number}"
        projection = {
            f"{original}.{leaf}": tensors[f"{layer}.{layer_name}.{leaf}"]
            for layer_name, original in _ORIGINAL.items()
            for leaf in ("weight", "bias")
        }
        # The adapter's file counts self-attention, too.
        attention = {
            f"{2 * place + 1}.{key}.weight": tensors[f"{name}.{key}.{number}.weight"]
            for place, name in enumerate(names)
            for key in ("to_k_ip", "to_v_ip")
        }
        adapters.append({"image_proj": projection, "ip_adapter": attention})
    with quiet_diffusers(), torch.device("meta" if on_meta else "cpu"):
        model._load_ip_adapter_weights(adapters, low_cpu_mem_usage=not on_meta)


def adapter_scales(model: Any, place: str) -> dict[str, list[float]]:
    """The strengths of a UNet's IP-Adapters, by path of the attention processor.

    Args:
        model: UNet with adapters.
        place: the UNet, for messages.

    Raises:
        UsageError: a strength is not a number, e.g. one number per mask.
    """
    scales: dict[str, list[float]] = {}
    for name, processor in model.attn_processors.items():
        if not hasattr(processor, "to_k_ip"):
            continue
        if not all(isinstance(scale, int | float) for scale in processor.scale):
            raise UsageError(
                f"{place} has IP-Adapters of the strengths {processor.scale!r} at {name}; trtq takes "
                "one number per adapter: pipe.set_ip_adapter_scale(0.6)"
            )
        scales[name] = [float(scale) for scale in processor.scale]
    return scales


def set_scales(model: Any, scales: Mapping[str, Sequence[float]]) -> None:
    """Set the strengths of a UNet's IP-Adapters, in place.

    Args:
        model: UNet with adapters.
        scales: strengths by path of the attention processor; those of other paths are ignored.
    """
    for name, processor in model.attn_processors.items():
        if name in scales and hasattr(processor, "to_k_ip"):
            processor.scale = list(scales[name])
