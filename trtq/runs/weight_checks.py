"""Checks of `quantized.safetensors` against the manifest and the denoiser's class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trtq.errors import ArtefactError, NonFiniteError
from trtq.quant.input_transform import TransformTensors
from trtq.quant.packing import PackedWeight
from trtq.quant.plan import (
    LayerPlan,
    LowBitTensors,
    layer_kind,
    layer_obstacle,
    transform_key,
)

__all__ = ["check_plans", "check_shared", "check_tables", "check_transform", "check_weight"]

_LISTED_LATER = ("conv1d", "conv3d", "conv_transpose")


def check_plans(path: Path, plans: Sequence[LayerPlan], sources: Mapping[str, nn.Module]) -> None:
    """Raise unless the manifest lists exactly the layers of the model, with their kinds.

    Raises:
        ArtefactError: a layer is missing, surplus or of another kind.
    """
    for plan in plans:
        source = sources.get(plan.name)
        if source is None:
            raise ArtefactError(
                f"{path} and its manifest disagree about the layer {plan.name!r}: the denoiser has none "
                "of that name"
            )
        if layer_kind(source) != plan.kind:
            raise ArtefactError(
                f"{path} and its manifest disagree about the layer {plan.name!r}: the manifest says "
                f"{plan.kind!r}, in the denoiser it is {layer_kind(source)!r}"
            )
        obstacle = layer_obstacle(source)
        if plan.quantized and obstacle is not None:
            raise ArtefactError(
                f"{path} and its manifest list integers of the layer {plan.name!r}, which cannot be "
                f"low-bit: {obstacle}"
            )
    # Runs of earlier versions do not list these kinds, which were always float.
    listed = {name for name, source in sources.items() if layer_kind(source) not in _LISTED_LATER}
    missing = listed - {plan.name for plan in plans}
    if missing:
        raise ArtefactError(
            f"the manifest next to {path} has no row for the layer {min(missing)!r}"
        )


def check_tables(named: Mapping[str, Tensor], plan: LayerPlan, steps: int | None) -> None:
    """Raise unless every table has one entry per timestep, and codes of the manifest's bits.

    Raises:
        ArtefactError: a table does not fit the manifest, or holds invalid values.
    """
    for operand, bits in plan.operands.items():
        kinds = {"scale": torch.float32, "inv_scale": torch.float32}
        if plan.format == "int":
            kinds |= {"low": torch.int16, "high": torch.int16}
        tables = {leaf: _tensor(named, f"{operand}.{leaf}", kind) for leaf, kind in kinds.items()}
        entries = tables["scale"].numel() if steps is None else steps
        for leaf, table in tables.items():
            if table.shape != (entries,):
                raise ArtefactError(
                    f"the table {operand}.{leaf} has shape {tuple(table.shape)}, though the manifest "
                    f"lists {entries} timesteps"
                )
        scale = tables["scale"]
        if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
            raise ArtefactError(f"the table {operand}.scale must hold positive finite numbers")
        if not torch.allclose(tables["inv_scale"], scale.reciprocal(), rtol=1e-5, atol=0):
            raise ArtefactError(f"the table {operand}.inv_scale is not the reciprocal of the scale")
        if plan.format != "int":
            continue
        low, high = tables["low"].int(), tables["high"].int()
        if bool(((low > 0) | (high < 0) | (low < -128) | (high > 127)).any()):
            raise ArtefactError(f"the codes of {operand} are not a range around zero within int8")
        if bool((high - low != 2**bits - 1).any()):
            raise ArtefactError(
                f"the manifest says {bits} bits for {operand}, its codes span "
                f"{int((high - low).min()) + 1} .. {int((high - low).max()) + 1} values"
            )


def check_transform(named: Mapping[str, Tensor], plan: LayerPlan, source: Any) -> None:
    """Raise unless the transform of the input is the manifest's, and fits the layer of the model.

    Args:
        named: tensors of the layer.
        plan: plan of the layer, from the manifest.
        source: the model's layer; None: a product.

    Raises:
        ArtefactError: the transform does not fit the manifest or the layer, or has invalid values.
    """
    transform = TransformTensors.from_tensors(named)
    smooth = transform is not None and transform.inv_channels is not None
    rotate = 0 if transform is None else transform.rotation
    if (smooth, rotate) != (plan.smooth, plan.rotate):
        raise ArtefactError(
            f"the manifest says smooth={plan.smooth} and rotate={plan.rotate}, the file smooth={smooth} "
            f"and rotate={rotate}"
        )
    if transform is None or source is None:
        return
    obstacle = transform.obstacle(source)
    if obstacle is not None:
        raise ArtefactError(f"the transform of the input does not fit the layer: {obstacle}")


def check_weight(named: Mapping[str, Tensor], bits: int, source: Any) -> None:
    """Raise unless codes, scales, zero points and bias of a layer fit the layer of the model.

    Raises:
        ArtefactError: a tensor is missing, does not fit the layer, or holds invalid values.
        NonFiniteError: the bias holds NaN or infinity.
    """
    channels, *rest = source.weight.shape
    codes = _tensor(named, "weight.codes", torch.uint8)
    packed = (-(-channels * bits // 8), *rest)
    if codes.shape != packed:
        raise ArtefactError(
            f"the manifest says {bits} bits, for which the packed weight has shape {packed}; got "
            f"{tuple(codes.shape)}"
        )
    one_each = (channels, *(1,) * len(rest))
    scale = _tensor(named, "weight.scale", torch.float32)
    zero_point = _tensor(named, "weight.zero_point", torch.int16)
    if scale.shape != one_each or zero_point.shape != one_each:
        raise ArtefactError(
            f"the weight's scale and zero point have shape {one_each}, got {tuple(scale.shape)} and "
            f"{tuple(zero_point.shape)}"
        )
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise ArtefactError("the weight's scale must hold positive finite numbers")
    # Zero points in this range keep every possible difference in int8; others need the actual codes.
    if bool(((zero_point < 2**bits - 128) | (zero_point > 128)).any()):
        PackedWeight(codes, scale, zero_point.float(), bits, channels).integers()
    bias = named.get("bias")
    if (bias is None) != (source.bias is None) or (bias is not None and bias.shape != (channels,)):
        stored = "none" if bias is None else f"one of shape {tuple(bias.shape)}"
        needed = "none" if source.bias is None else f"one of shape {(channels,)}"
        raise ArtefactError(f"the denoiser's layer has {needed} as bias, the file {stored}")
    if bias is not None and not bool(torch.isfinite(bias).all()):
        raise NonFiniteError("the bias holds NaN or infinity")


def _tensor(named: Mapping[str, Tensor], leaf: str, dtype: torch.dtype) -> Tensor:
    if leaf not in named:
        raise ArtefactError(f"the tensor {leaf!r} is missing")
    if named[leaf].dtype != dtype:
        raise ArtefactError(
            f"the tensor {leaf!r} has type {named[leaf].dtype}; {dtype} is required"
        )
    return named[leaf]


def check_shared(layers: Mapping[str, LowBitTensors], name: str, owner: str) -> None:
    """Raise unless two layers that share a quantiser have the same tables.

    Raises:
        ArtefactError: the tables differ.
    """
    operands, shared = layers[name].operands, layers[owner].operands
    alike = operands.keys() == shared.keys() and all(
        torch.equal(getattr(tables, leaf), getattr(shared[operand], leaf))
        for operand, tables in operands.items()
        for leaf in ("scale", "low", "high")
    )
    if not alike or transform_key(layers[name]) != transform_key(layers[owner]):
        raise ArtefactError(
            f"layer {name!r}: the manifest says that it has the input of {owner!r}, but their tables "
            "or transforms differ"
        )
