"""Convert a denoiser layer by layer, in place: float to quantised, quantised to deployed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, cast

import torch
from torch import nn

from trtq.errors import QuantizationError
from trtq.precision import Method
from trtq.quant.activation import ZeroPointMode
from trtq.quant.denoiser import QuantizedDenoiser
from trtq.quant.deployed import DeployedLayer, DeployedProduct
from trtq.quant.exact import (
    DeployedGroupNorm,
    DeployedLayerNorm,
    DeployedSilu,
    DeployedTimesteps,
    replaces_layer_norm,
)
from trtq.quant.formats import (
    DEPLOYED_FORMS,
    FormatTensors,
    deployed_form,
    layer_class,
    merged_tensors,
)
from trtq.quant.formats.registry import DeployedFormat
from trtq.quant.geometry import CONVOLUTIONS, ConvGeometry
from trtq.quant.kernel_form import KernelLayer, kernel_runs
from trtq.quant.layers import QuantConv
from trtq.quant.modules import Base, QuantLayer
from trtq.quant.plan import (
    LayerPlan,
    LowBitTensors,
    layer_kind,
    layer_obstacle,
    named_errors,
    quantizable_layers,
)
from trtq.quant.product import QuantProduct
from trtq.quant.stored_weight import release_weight
from trtq.quant.structure import Product, replace_module
from trtq.quant.tensors import LayerTensors, ProductTensors
from trtq.quant.timestep import TimestepTable

__all__ = ["DeployOptions", "convert", "deploy", "deploy_timesteps", "merge"]


class _LayerOptions(NamedTuple):
    """Options that all layers of one denoiser share; see `convert`."""

    base: Base
    weight_method: Method
    zero_point_mode: ZeroPointMode
    split_scale: bool
    generator: torch.Generator | None


class DeployOptions(TypedDict, total=False):
    """Optional keyword arguments of `deploy`."""

    kernels: bool
    packed: bool
    timestep: str
    per_item: bool


def convert(
    denoiser: nn.Module,
    plans: Sequence[LayerPlan],
    table: TimestepTable,
    *,
    rank: int = 0,
    base: Base = "fp",
    weight_method: Method = "minmax",
    zero_point_mode: ZeroPointMode = "frozen",
    split_scale: bool = False,
    split_step: bool = False,
    generator: torch.Generator | None = None,
    timestep: str = "timestep",
    per_item: bool = True,
) -> QuantizedDenoiser:
    """Replace the planned layers with their quantised forms, in place.

    The float parameters are kept and shared, so the result is both teacher and student.

    Args:
        denoiser: float diffusers model; changed in place.
        plans: one plan per layer, see `calib.policy`.
        table: the calibrated timesteps.
        rank: rank of the QALoRA adapters in the layers whose plan has adapters; 0: no adapters.
        base: operand to which the adapters are added.
        weight_method: method that determines the weight ranges.
        zero_point_mode: behaviour of activation zero points, see `ZeroPointMode`.
        split_scale: whether to update the weight scale twice per iteration, as in the release.
        split_step: former name of `split_scale`, accepted for one release.
        generator: random generator for the initial adapters; None: torch's default generator.
        timestep: name of the denoiser's argument with the timestep, see `QuantizedDenoiser`.
        per_item: whether each batch item has its own step, see `QuantizedDenoiser`.

    Raises:
        QuantizationError: the plan quantises no layer, or names a layer that does not exist or cannot be
            low-bit.
        NonFiniteError: a weight holds NaN or infinity; the message names the layer.
    """
    if not any(plan.quantized for plan in plans):
        raise QuantizationError(
            "zero layers would be quantised; the policy matches nothing in this denoiser. Name its "
            "layers in a policy, or use the generic one"
        )
    denoiser.requires_grad_(False)
    sources = quantizable_layers(denoiser)
    split_scale = split_scale or split_step
    options = _LayerOptions(base, weight_method, zero_point_mode, split_scale, generator)
    for plan in plans:
        if not plan.quantized:
            continue
        source = sources.get(plan.name)
        if source is None:
            raise QuantizationError(
                f"the plan names layer {plan.name!r}, but this denoiser has no such layer"
            )
        with named_errors(plan.name):
            layer = _quantized_layer(source, plan, table, options, rank if plan.adapters else 0)
        replace_module(denoiser, plan.name, layer)
        if plan.input_of is not None:
            owner = denoiser.get_submodule(plan.input_of)
            assert isinstance(owner, QuantLayer)
            assert isinstance(layer, QuantLayer)
            layer.activation = owner.activation
    return QuantizedDenoiser(denoiser, table, timestep, per_item)


def _quantized_layer(
    source: nn.Module, plan: LayerPlan, table: TimestepTable, options: _LayerOptions, rank: int
) -> QuantLayer | QuantProduct:
    """The quantised form of a float layer."""
    assert plan.activation_bits is not None
    zero_points = options.zero_point_mode
    if plan.right_bits is not None:
        bits = plan.activation_bits, plan.right_bits
        transform = cast(Product, source).transform
        return QuantProduct(table, *bits, zero_points, plan.scales, transform)
    assert plan.weight_bits is not None
    obstacle = layer_obstacle(source)
    if obstacle is not None:
        raise QuantizationError(
            f"the layer cannot be low-bit: {obstacle}; leave the layer in float"
        )
    layer: Any = source
    made: QuantLayer = layer_class(layer_kind(source) or "", plan.format, plan.group)(
        layer,
        table,
        weight_bits=plan.weight_bits,
        activation_bits=plan.activation_bits,
        rank=rank,
        base=options.base,
        weight_method=options.weight_method,
        zero_point_mode=zero_points,
        split_scale=options.split_scale,
        scales=plan.scales,
        generator=options.generator,
    )
    return made


def merge(quantized: QuantizedDenoiser, *, release: bool = False) -> dict[str, LowBitTensors]:
    """The integers of every quantised layer, by path, with the adapters merged.

    Args:
        quantized: converted denoiser.
        release: whether to free each float weight after merging it; the denoiser can then be saved, but
            no longer called.

    Raises:
        QuantizationError: a layer cannot be deployed; the message names it.
    """
    merged: dict[str, LowBitTensors] = {}
    for name, layer in quantized.layers():
        with named_errors(name):
            merged[name] = merged_tensors(layer)
        if release:
            release_weight(layer)
    for name, product in quantized.products():
        with named_errors(name):
            merged[name] = ProductTensors.merge(product)
    return merged


def deploy(
    denoiser: nn.Module,
    merged: Mapping[str, LowBitTensors],
    table: TimestepTable,
    *,
    kernels: bool = False,
    packed: bool = False,
    timestep: str = "timestep",
    per_item: bool = True,
) -> QuantizedDenoiser:
    """Replace layers, norms, SiLUs and time projections with their deployed forms, in place.

    Norms and SiLUs with a forward of their own stay as they are, except `FP32LayerNorm` of diffusers.

    Args:
        denoiser: diffusers model, float or converted.
        merged: tensors of the layers, by path.
        table: the calibrated timesteps.
        kernels: whether to replace layers with `KernelLayer` and keep torch's norms and SiLUs, for
            speed on a GPU, where the result need not equal an exported graph's bit for bit. Layers that
            the kernels do not support become `DeployedLayer`s.
        packed: whether other layers unpack their codes in each call, see `trtq.quant.packed_codes`.
        timestep: name of the denoiser's argument with the timestep, see `QuantizedDenoiser`.
        per_item: whether each batch item has its own step, see `QuantizedDenoiser`.
    """
    for name, tensors in merged.items():
        if isinstance(tensors, ProductTensors):
            replace_module(denoiser, name, DeployedProduct(tensors))
        else:
            source = denoiser.get_submodule(name)
            layer = _deployed_layer(source, tensors, kernels=kernels, packed=packed)
            replace_module(denoiser, name, layer)
    deploy_timesteps(denoiser)
    if not kernels:
        _deploy_norms(denoiser)
    return QuantizedDenoiser(denoiser, table, timestep, per_item)


def _deployed_layer(
    source: nn.Module, tensors: LayerTensors | FormatTensors, *, kernels: bool, packed: bool
) -> DeployedLayer | KernelLayer | DeployedFormat:
    """The deployed form of a float or quantised layer."""
    geometry: Any = None
    if isinstance(source, CONVOLUTIONS):
        geometry = ConvGeometry.of(source)
    elif isinstance(source, (QuantConv, *DEPLOYED_FORMS)):
        geometry = cast("ConvGeometry | None", source.geometry)
    layer: DeployedLayer | KernelLayer | DeployedFormat
    if not isinstance(tensors, LayerTensors):
        layer = deployed_form(tensors, geometry, packed=packed)
    elif kernels and kernel_runs(geometry) and tensors.activation.policy == "step":
        layer = KernelLayer(tensors, geometry)
    else:
        layer = DeployedLayer(tensors, geometry, packed=packed)
    weight: Any = source.weight
    layer.take_dtype(weight.dtype)
    return layer


def _deploy_norms(denoiser: nn.Module) -> None:
    """Replace norms and SiLUs with their deployed forms, in place.

    A subclass with a forward of its own computes something else, so it stays.
    """
    for name, module in list(denoiser.named_modules(remove_duplicate=False)):
        forward = type(module).forward
        if isinstance(module, nn.GroupNorm) and forward is nn.GroupNorm.forward and module.affine:
            replace_module(denoiser, name, DeployedGroupNorm(module))
        elif isinstance(module, nn.LayerNorm) and replaces_layer_norm(module):
            replace_module(denoiser, name, DeployedLayerNorm(module))
        elif isinstance(module, nn.SiLU) and forward is nn.SiLU.forward:
            replace_module(denoiser, name, DeployedSilu())


def deploy_timesteps(denoiser: nn.Module) -> None:
    """Replace time projections with their deployed form, in place."""
    for name, module in list(denoiser.named_modules(remove_duplicate=False)):
        if type(module).__name__ == "Timesteps":
            replace_module(denoiser, name, DeployedTimesteps(module))
