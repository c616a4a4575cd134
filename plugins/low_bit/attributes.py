"""Names and attributes of a layer's graph node and TensorRT plugin."""

from __future__ import annotations

from trtq.errors import UsageError
from trtq.plugins.spec import Geometry, LayerSpec

__all__ = ["FIELDS", "INPUTS", "NAMESPACE", "PLUGINS", "VERSION", "fields_of", "spec_of"]

NAMESPACE, VERSION = "trtq", "1"
PLUGINS = ("LowBitLinear", "LowBitConv2d")
INPUTS = ("x", "weight", "terms", "tables", "step")
"""Inputs of a node, in order."""
FIELDS = {
    "channels": 1,
    "out_channels": 1,
    "steps": 1,
    "weight_bits": 1,
    "activation_bits": 1,
    "kernel_shape": 2,
    "strides": 2,
    "pads": 2,
    "dilations": 2,
    "group": 1,
}
"""Number of integers of each attribute of a node, by name."""


def fields_of(layer: LayerSpec) -> dict[str, list[int]]:
    """The attributes of a layer's node and plugin; `spec_of` is the inverse."""
    g = layer.geometry or Geometry()
    fields = {name: [int(getattr(layer, name))] for name in list(FIELDS)[:5]}
    fields |= {"kernel_shape": list(g.kernel), "strides": list(g.stride), "pads": list(g.padding)}
    return fields | {"dilations": list(g.dilation), "group": [g.groups]}


def spec_of(name: str, fields: dict[str, list[int]]) -> LayerSpec:
    """The layer described by a plugin's attributes.

    Args:
        name: name of the plugin, one of `PLUGINS`.
        fields: attributes, see `fields_of`.

    Raises:
        UsageError: an attribute is missing or has the wrong length.
    """
    for field, count in FIELDS.items():
        if len(fields.get(field, [])) != count:
            raise UsageError(
                f"the plugin {name} takes {field} as {count} integers, got {fields.get(field)}; export "
                "the model again with this version"
            )
    kernel, stride, padding, dilation = (
        (fields[field][0], fields[field][1])
        for field in ("kernel_shape", "strides", "pads", "dilations")
    )
    geometry = Geometry(kernel, stride, padding, dilation, fields["group"][0])
    channels, out_channels, steps, weight_bits, activation_bits = (
        fields[field][0] for field in list(FIELDS)[:5]
    )
    return LayerSpec(
        channels,
        out_channels,
        steps,
        weight_bits,
        activation_bits,
        geometry if name == "LowBitConv2d" else None,
    )
