"""The tensors of a single-file checkpoint as floats, whether the file holds floats or quantised layers.

Layers that ComfyUI quantised (see `trtq.comfy.formats`) are described by an entry each, by the file's
metadata, or, in older files of float8, by one marker for the whole file. The header shows their weights
as float32 in the shape that they decode to, so all later checks and conversions see an ordinary file.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trtq.checkpoint.weights import TensorInfo, read_header
from trtq.checkpoint.wording import list_names, one_line
from trtq.comfy.decode import decode, logical_shape, required_tensors
from trtq.comfy.formats import ENTRY, LayerFormat, StoredWeight, parse_entry
from trtq.errors import ArtefactError

__all__ = ["TensorFile", "open_tensor_file"]

logger = logging.getLogger(__name__)

_METADATA = "_quantization_metadata"
_MARKER = "scaled_fp8"
_OLD_SCALE, _OLD_INPUT_SCALE = "scale_weight", "scale_input"
_LEAVES = ("weight_scale", "weight_scale_2", "weight_zeros", "pre_quant_scale")
"""Scales that decoding uses, by the last level of their names."""
_IGNORED = ("input_scale", _OLD_INPUT_SCALE, ENTRY)
"""Tensors of a quantised layer that do not change its weight."""
_ATTENTION = ".comfy_attention.config"


@dataclass(frozen=True)
class _Layer:
    """A quantised layer.

    Attributes:
        format: format of its codes.
        tensors: names of its tensors in the file, by what `StoredWeight.tensors` calls them.
    """

    format: LayerFormat
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose tensors are read as float32.

    Attributes:
        path: path of the file.
        header: entries of the tensors by name; a quantised weight's entry is that of the decoded weight.
        formats: name of the format by the name of each quantised layer.
    """

    path: Path
    header: dict[str, TensorInfo]
    formats: dict[str, str] = field(default_factory=dict)
    _layers: dict[str, _Layer] = field(default_factory=dict, repr=False)

    def warn_if_quantized(self) -> None:
        """Log a warning if layers are quantised, with their number by format."""
        if self.formats:
            counts = Counter(self.formats.values()).most_common()
            logger.warning(
                "%s: %d layers are quantised (%s) and are decoded to float32; a run is at most as exact",
                self.path,
                len(self.formats),
                ", ".join(f"{count} in {name}" for name, count in counts),
            )

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors as float32, by name; quantised weights are decoded.

        Raises:
            ArtefactError: the file cannot be read, or the scales of a layer do not fit.
        """
        return _read(self.path, {name: self._layers.get(name) for name in names})


def open_tensor_file(path: Path) -> TensorFile:
    """Read the header of a safetensors file and the entries of its quantised layers.

    Raises:
        ArtefactError: the file cannot be read, a layer has an unknown format, or its tensors are missing
            or of the wrong shape.
    """
    header = read_header(path)
    layers: dict[str, _Layer] = {}
    formats: dict[str, str] = {}
    ignored = {n for n in header if n.endswith(_ATTENTION) or n.rpartition(".")[2] == _MARKER}
    shown = dict(header)
    for name, content in _described(path, header).items():
        try:
            layer, info = _layer(path, header, name, content)
        except ArtefactError as err:
            raise ArtefactError(f"{path}: the quantised layer {name!r}: {err}") from err
        weight = f"{name}.weight"
        layers[weight], formats[name] = layer, layer.format.name
        shown[weight] = info
        ignored |= {layer.tensors[leaf] for leaf in layer.tensors if leaf != "weight"}
        ignored |= {f"{name}.{leaf}" for leaf in _IGNORED}
    for name in ignored:
        shown.pop(name, None)
    return TensorFile(path, shown, formats, layers)


def _described(path: Path, header: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """What the file says about each quantised layer, by the layer's name: an entry or a JSON object."""
    described: dict[str, Any] = {}
    if any(name.rpartition(".")[2] == _MARKER for name in header):
        for name in header:
            layer, _, leaf = name.rpartition(".")
            if leaf == _OLD_SCALE:
                info = header.get(f"{layer}.weight")
                e5m2 = info is not None and info.dtype == "F8_E5M2"
                described[layer] = {"format": "float8_e5m2" if e5m2 else "float8_e4m3fn"}
    described |= _in_metadata(path)
    entries = [name for name in header if name.endswith(f".{ENTRY}")]
    tensors = _raw(path, entries) if entries else {}
    return described | {name.removesuffix(f".{ENTRY}"): tensors[name] for name in entries}


def _in_metadata(path: Path) -> dict[str, Any]:
    """The layers that the file's metadata describes, by name.

    Raises:
        ArtefactError: the description is damaged.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
    # safetensors raises an exception class of its own.
    except Exception as err:
        raise ArtefactError(f"cannot read {path}: {one_line(err)}") from err
    if text is None:
        return {}
    try:
        layers = json.loads(text)["layers"]
        if not all(isinstance(content, dict) for content in layers.values()):
            raise ValueError("a layer is not a JSON object")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as err:
        raise ArtefactError(
            f"{path}: its {_METADATA} does not describe layers ({one_line(err)}); download it again"
        ) from err
    return dict(layers)


def _layer(
    path: Path, header: Mapping[str, TensorInfo], name: str, content: Any
) -> tuple[_Layer, TensorInfo]:
    """A quantised layer, and the header entry of the weight that it decodes to."""
    layer_format = parse_entry(content)
    tensors = {
        leaf: f"{name}.{leaf}" for leaf in ("weight", *_LEAVES) if f"{name}.{leaf}" in header
    }
    if "weight_scale" not in tensors and f"{name}.{_OLD_SCALE}" in header:
        tensors["weight_scale"] = f"{name}.{_OLD_SCALE}"
    missing = [leaf for leaf in required_tensors(layer_format.name) if leaf not in tensors]
    if missing:
        raise ArtefactError(
            f"its format {layer_format.name} needs {list_names(missing)}, which the file lacks; "
            "download the file again, or give the float model"
        )
    codes = header[tensors["weight"]]
    shape = logical_shape(layer_format.name, codes.dtype, codes.shape)
    return _Layer(layer_format, tensors), TensorInfo("F32", shape, path)


def _raw(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors as the file stores them, by name."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    # safetensors raises an exception class of its own.
    except Exception as err:
        raise ArtefactError(f"cannot read {path}: {one_line(err)}") from err


def _read(path: Path, layers: Mapping[str, _Layer | None]) -> dict[str, Tensor]:
    """Tensors as float32 by name; the codes of one layer at a time are in memory."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if layer is None:
            tensors[name] = _raw(path, [name])[name].float()
            continue
        stored = _raw(path, layer.tensors.values())
        leaves = {leaf: stored[tensor] for leaf, tensor in layer.tensors.items()}
        try:
            tensors[name] = decode(StoredWeight(layer.format, leaves))
        except ArtefactError as err:
            where = name.removesuffix(".weight")
            raise ArtefactError(f"{path}: the quantised layer {where!r}: {err}") from err
    return tensors
