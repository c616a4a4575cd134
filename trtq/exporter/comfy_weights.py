"""The weights of a run in the form and under the names that ComfyUI reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trtq.checkpoint.conversion_probe import ConversionError
from trtq.checkpoint.original_names import OriginalTensor, Source, original_tensors
from trtq.comfy.encode import IntegerWeight, encode_int8, store_awq, store_int4, store_int8
from trtq.comfy.formats import INT4_GROUP, StoredWeight
from trtq.comfy.rotation import rotate
from trtq.quant.attention_channels import ScaledWeight, scaled_weights
from trtq.quant.formats.fp8 import Fp8Tensors
from trtq.quant.formats.nvfp4 import Nvfp4Tensors
from trtq.quant.input_transform import TransformTensors
from trtq.quant.plan import LowBitTensors
from trtq.quant.tensors import ProductTensors

__all__ = ["ComfyWeights", "comfy_weights"]

_PRODUCT_BITS = 4
"""Bits of weight and activation at and below which a rotated layer is stored in 4 bits."""


@dataclass(frozen=True, eq=False)
class _Linear:
    """The weight of a low-bit linear layer.

    Attributes:
        weight: integers of the weight.
        packs: whether the layer's bits permit a 4-bit format.
        float_input: whether the layer's input stays float.
        requantized: whether the integers differ from the run's.
    """

    weight: IntegerWeight
    packs: bool
    float_input: bool = False
    requantized: bool = False

    @property
    def kind(self) -> tuple[int, int, bool]:
        """What joined layers have in common."""
        return self.weight.rotation, self.weight.group, self.float_input


_Value = Tensor | _Linear


@dataclass(frozen=True, eq=False)
class ComfyWeights:
    """The tensors of a file for ComfyUI.

    Attributes:
        layers: quantised weights by the name of their layer.
        floats: all other tensors by name, float32 unless they hold integers.
        is_original: whether the names are those of the model's authors.
        problem: reason why the names are those of diffusers; None for original names.
        convolutions: number of the run's low-bit convolutions, which the file holds in float.
        products: number of the run's low-bit products of activations, which the file lacks.
        joined: names of tensors in float that join low-bit layers with others.
        requantized: names of layers whose codes differ from the run's.
    """

    layers: dict[str, StoredWeight]
    floats: dict[str, Tensor]
    is_original: bool
    problem: str | None
    convolutions: int
    products: int
    joined: list[str]
    requantized: list[str]


def comfy_weights(
    model_class: str,
    config: Mapping[str, Any],
    layers: Mapping[str, LowBitTensors],
    floats: Mapping[str, Tensor],
    splits: Mapping[str, int],
) -> ComfyWeights:
    """The tensors of a denoiser as ComfyUI reads them.

    Linear layers keep their integers: `codes - zero_point` fits int8 for every width of the weights, and
    there is one scale per output, so nothing is rounded again. Convolutions, which ComfyUI runs in float
    only, have the values that their integers represent.

    Args:
        model_class: name of the denoiser's class in diffusers.
        config: configuration of the denoiser.
        layers: tensors of the run's low-bit layers, by name.
        floats: the denoiser's other tensors, by name.
        splits: number of input channels of the first part, by path of a split convolution.
    """
    values: dict[str, _Value] = dict(floats)
    for name, tensors in layers.items():
        if not isinstance(tensors, ProductTensors):
            values[f"{name}.weight"] = _value(tensors)
            if tensors.bias is not None:
                values[f"{name}.bias"] = tensors.bias
    _unscale_attention(values, layers)
    for path in splits:
        _join_split(values, path)
    problem = None
    try:
        originals = original_tensors(model_class, config, list(values))
    except ConversionError as err:
        problem = str(err)
        originals = {name: OriginalTensor((Source(name),)) for name in values}
    stored: dict[str, StoredWeight] = {}
    others: dict[str, Tensor] = {}
    joined, requantized = [], []
    for name, original in sorted(originals.items()):
        value = _assemble(original, values)
        if isinstance(value, Tensor):
            others[name] = value
            if any(isinstance(values[source.name], _Linear) for source in original.sources):
                joined.append(name)
        elif not name.endswith(".weight"):
            others[name] = value.weight.dequantize()
            joined.append(name)
        else:
            layer = name.removesuffix(".weight")
            stored[layer] = _store(value)
            if value.requantized:
                requantized.append(layer)
    kept = [tensors for tensors in layers.values() if not isinstance(tensors, ProductTensors)]
    return ComfyWeights(
        layers=stored,
        floats=others,
        is_original=problem is None,
        problem=problem,
        convolutions=sum(_is_convolution(tensors) for tensors in kept),
        products=sum(isinstance(tensors, ProductTensors) for tensors in layers.values()),
        joined=joined,
        requantized=requantized,
    )


def _is_convolution(tensors: Any) -> bool:
    codes = getattr(tensors.weight, "codes", None)
    return codes is not None and codes.ndim > 2


def _value(tensors: Any) -> _Value:
    """The weight of a low-bit layer: integers of a linear layer, floats of every other layer.

    Args:
        tensors: tensors of an integer layer, or of a layer in another format, which may have no
            integers or no activation.
    """
    packed = tensors.weight
    activation: Any = getattr(tensors, "activation", None)
    transform: TransformTensors | None = getattr(tensors, "transform", None)
    inverse = None if transform is None else transform.inv_channels
    rotation = 0 if transform is None else transform.rotation
    codes = getattr(packed, "codes", None)
    without_integers = isinstance(tensors, Fp8Tensors | Nvfp4Tensors)
    if codes is None or codes.ndim != 2 or without_integers:
        return _plain(packed.dequantize(), inverse, rotation)
    group = int(getattr(packed, "group", None) or 0)
    if group and packed.bits > _PRODUCT_BITS:
        # ComfyUI has groups in 4 bits only.
        return _plain(packed.dequantize(), inverse, rotation)
    bits = max(packed.bits, 0 if activation is None else activation.bits)
    scale = packed.scale.reshape(len(codes), -1).float()
    linear = _Linear(
        IntegerWeight(packed.integers(), scale, rotation, group),
        packs=bits <= _PRODUCT_BITS,
        float_input=activation is None,
    )
    if inverse is None:
        return linear
    # ComfyUI's integer layers have no scale per input channel, so the smoothing is undone.
    weight = linear.weight.dequantize() * inverse.float()
    return _Linear(encode_int8(weight, rotation), packs=False, requantized=True)


def _plain(weight: Tensor, inverse: Tensor | None, rotation: int) -> Tensor:
    """A float weight[N, K, ...] without rotation and smoothing of its input channels."""
    shape = (-1, *(1,) * (weight.ndim - 2))
    if rotation:
        last = weight.movedim(1, -1)
        weight = rotate(last.reshape(-1, last.shape[-1]), rotation).reshape(last.shape)
        weight = weight.movedim(-1, 1).contiguous()
    return weight if inverse is None else weight * inverse.float().reshape(shape)


def _unscale_attention(values: dict[str, _Value], layers: Mapping[str, LowBitTensors]) -> None:
    """Undo the scaling of attention's channels: users of ComfyUI add LoRAs to these weights."""
    for product, tensors in layers.items():
        transform = tensors.transform
        if not isinstance(tensors, ProductTensors) or transform is None:
            continue
        assert transform.inv_channels is not None
        for scaled in scaled_weights(product, transform.inv_channels):
            name, bias = f"{scaled.layer}.weight", values.get(f"{scaled.layer}.bias")
            values[name] = _unscaled(values[name], scaled)
            if scaled.rows is not None and isinstance(bias, Tensor):
                values[f"{scaled.layer}.bias"] = bias / scaled.rows


def _unscaled(value: _Value, scaled: ScaledWeight) -> _Value:
    """A weight without the factors of its rows and columns; only columns change the integers."""
    if isinstance(value, Tensor):
        value = value if scaled.rows is None else value / scaled.rows[:, None]
        return value if scaled.columns is None else value / scaled.columns
    weight = value.weight
    if scaled.rows is not None:
        weight = replace(weight, scale=weight.scale / scaled.rows[:, None])
    if scaled.columns is None:
        return replace(value, weight=weight)
    again = encode_int8(weight.dequantize() / scaled.columns, weight.rotation)
    return _Linear(again, packs=False, requantized=True)


def _join_split(values: dict[str, _Value], path: str) -> None:
    """Join the parts of a split convolution, see `trtq.quant.structure.SplitConv2d`."""
    parts = [values.pop(f"{path}.parts.{index}.weight") for index in (0, 1)]
    values[f"{path}.weight"] = torch.cat([part for part in parts if isinstance(part, Tensor)], 1)
    bias = values.pop(f"{path}.parts.0.bias", None)
    if bias is not None:
        values[f"{path}.bias"] = bias


def _assemble(original: OriginalTensor, values: Mapping[str, _Value]) -> _Value:
    """A tensor of the original layout: integers if all of its rows are integers of one kind."""
    parts = [(values[source.name], source) for source in original.sources]
    linears = [value for value, _ in parts if isinstance(value, _Linear)]
    kinds = {linear.kind for linear in linears}
    if len(linears) == len(parts) and len(kinds) == 1 and not original.flattened:
        rotation, group, float_input = kinds.pop()
        integers = _joined(lambda linear: linear.weight.integers, parts)
        scale = _joined(lambda linear: linear.weight.scale, parts)
        return _Linear(
            IntegerWeight(integers, scale, rotation, group),
            packs=all(linear.packs for linear in linears),
            float_input=float_input,
            requantized=any(linear.requantized for linear in linears),
        )
    tensor = _joined(_floats, parts)
    return tensor.reshape(-1) if original.flattened else tensor


def _floats(value: _Value) -> Tensor:
    return value.weight.dequantize() if isinstance(value, _Linear) else value


def _joined(rows_of: Callable[[Any], Tensor], parts: list[tuple[_Value, Source]]) -> Tensor:
    """Rows of the sources, one after the other."""
    pieces = []
    for value, source in parts:
        rows = rows_of(value)
        if source.count > 1:
            size = len(rows) // source.count
            rows = rows[source.index * size : (source.index + 1) * size]
        pieces.append(rows)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _store(linear: _Linear) -> StoredWeight:
    """The integers in 4 bits if a 4-bit format holds them, else in 8 bits."""
    weight = replace(linear.weight, integers=linear.weight.integers.contiguous())
    if weight.group:
        return store_awq(weight)
    codes = weight.integers
    fits = linear.packs and bool(weight.rotation) and codes.shape[1] % INT4_GROUP == 0
    if fits and int(codes.min()) >= -8 and int(codes.max()) <= 7:
        return store_int4(weight)
    return store_int8(weight, float_input=linear.float_input)
