"""The formats of ComfyUI's quantised weights, and the JSON entry that names a layer's format.

A file of ComfyUI (https://github.com/Comfy-Org/ComfyUI, `QUANTIZATION.md`, and the package
comfy-kitchen 0.2.40) holds, per quantised layer, its codes as `<layer>.weight`, its scales, and
`<layer>.comfy_quant`: JSON in UTF-8, as a tensor of bytes. N, K are the layer's outputs and inputs:

    format           weight             weight_scale                 weight_scale_2    weight is
    int8_tensorwise  int8[N, K]         float32[], [N] or [N, 1]                       q * s
    convrot_w4a4     int8[N, K / 2]     float32[N]                                     (q * s) H
    float8_e4m3fn    float8[N, K]       float32[]                                      q * s
    float8_e5m2      float8[N, K]       float32[]                                      q * s
    nvfp4            uint8[N, K / 2]    float8[N', K'], tiled        float32[]         q * s * s2
    mxfp8            float8[N, K]       E8M0[N', K'], tiled                            q * s
    awq_w4a16        int8[N, K / 2]     float[K / G, N]              weight_zeros      (q - 8) * s + z

`int8_tensorwise` with `"convrot": true` holds a rotated weight, as `convrot_w4a4` always does; the group
is `convrot_groupsize`. ComfyUI computes the scales of activations while it runs: one per row for
integers. With `"full_precision_matrix_mult": true`, and always for `awq_w4a16`, activations stay float.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trtq.documents import shown
from trtq.errors import ArtefactError

__all__ = [
    "E2M1",
    "ENTRY",
    "FORMATS",
    "INT4_GROUP",
    "LayerFormat",
    "StoredWeight",
    "parse_entry",
]

ENTRY = "comfy_quant"
"""Last level of the name of the tensor that describes a layer."""
FORMATS = (
    "int8_tensorwise",
    "convrot_w4a4",
    "float8_e4m3fn",
    "float8_e5m2",
    "nvfp4",
    "mxfp8",
    "awq_w4a16",
)
"""Formats that trtq decodes."""
INT4_GROUP = 64
"""The number of inputs of a `convrot_w4a4` layer is a multiple of this number."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the codes 0 .. 7 of a 4-bit float; the codes 8 .. 15 are their negatives."""
_DEFAULT_ROTATION, _DEFAULT_GROUP = 256, 64
_MAX_ENTRY_BYTES = 1 << 16


@dataclass(frozen=True)
class LayerFormat:
    """The content of a `comfy_quant` entry.

    Attributes:
        name: one of `FORMATS`.
        rotation: group size of the rotation; 0: the weight is not rotated.
        group: number of inputs that share a scale, of `awq_w4a16`; 0: other formats.
        float_input: whether activations stay float although the format quantises them.
    """

    name: str
    rotation: int = 0
    group: int = 0
    float_input: bool = False

    def entry(self) -> Tensor:
        """The format as a `comfy_quant` tensor, uint8; `parse_entry` is the inverse."""
        content: dict[str, Any] = {"format": self.name}
        if self.rotation:
            if self.name == "int8_tensorwise":
                content["convrot"] = True
            content["convrot_groupsize"] = self.rotation
        if self.group:
            content["group_size"] = self.group
        if self.float_input:
            content["full_precision_matrix_mult"] = True
        return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def parse_entry(content: Tensor | Mapping[str, Any]) -> LayerFormat:
    """The format that a `comfy_quant` entry names.

    Args:
        content: the tensor, or its JSON object from the file's metadata.

    Raises:
        ArtefactError: the entry is no JSON object, names a format that trtq does not decode, or gives no
            valid group size; the caller adds the layer.
    """
    values = _object(content) if isinstance(content, Tensor) else content
    name = values.get("format")
    if name not in FORMATS:
        raise ArtefactError(
            f"its format is {shown(name)}, which trtq does not read; it reads {', '.join(FORMATS)}"
        )
    # Some writers nest the settings.
    nested = values.get("params")
    settings = {**nested, **values} if isinstance(nested, dict) else dict(values)
    float_input = bool(settings.get("full_precision_matrix_mult"))
    if name == "awq_w4a16":
        group = settings.get("group_size", _DEFAULT_GROUP)
        if type(group) is not int or group < 1:
            raise ArtefactError(f"its group_size is {shown(group)}, which is no number of inputs")
        return LayerFormat(str(name), group=group)
    rotated = name == "convrot_w4a4" or (name == "int8_tensorwise" and settings.get("convrot"))
    if not rotated:
        return LayerFormat(str(name), float_input=float_input)
    group = settings.get("convrot_groupsize", _DEFAULT_ROTATION)
    if type(group) is not int or group < 4 or group & (group - 1) or group.bit_length() % 2 == 0:
        raise ArtefactError(f"its convrot_groupsize is {shown(group)}, which is no power of 4")
    return LayerFormat(str(name), group, float_input=float_input)


def _object(entry: Tensor) -> dict[str, Any]:
    """The JSON object in a `comfy_quant` tensor."""
    if entry.dtype != torch.uint8 or entry.ndim != 1 or entry.numel() > _MAX_ENTRY_BYTES:
        raise ArtefactError(
            f"its {ENTRY} entry is {entry.dtype} {tuple(entry.shape)}, not JSON as bytes"
        )
    try:
        values = json.loads(bytes(entry.tolist()).decode())
    except (ValueError, RecursionError) as err:
        raise ArtefactError(f"its {ENTRY} entry is not JSON: {err}") from err
    if not isinstance(values, dict):
        raise ArtefactError(f"its {ENTRY} entry is {shown(values)}, not a JSON object")
    return values


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A quantised weight as a file of ComfyUI holds it.

    Attributes:
        format: format of the codes.
        tensors: the tensors by the last level of their names: `weight`, `weight_scale`, and, by format,
            `weight_scale_2`, `weight_zeros` and `pre_quant_scale`; see the module docstring.
    """

    format: LayerFormat
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def entries(self, layer: str) -> dict[str, Tensor]:
        """The tensors of the file for a layer, by their whole names."""
        named = {f"{layer}.{leaf}": tensor for leaf, tensor in self.tensors.items()}
        return named | {f"{layer}.{ENTRY}": self.format.entry()}
