"""From a float denoiser to a quantised one, layer by layer, in place."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trtq.errors import QuantizationError, StepError, TrtqError
from trtq.quant.activation import ActivationQuantizer, ZeroPointMode
from trtq.quant.deployed import (
    DeployedLayer,
    DeployedProduct,
    LayerTensors,
    ProductTensors,
)
from trtq.quant.exact import (
    DeployedGroupNorm,
    DeployedLayerNorm,
    DeployedSilu,
    DeployedTimesteps,
)
from trtq.quant.kernel_form import KernelLayer
from trtq.quant.modules import (
    Base,
    ConvGeometry,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    QuantProduct,
)
from trtq.quant.ranges import Method
from trtq.quant.stand_in import StandIn
from trtq.quant.structure import Product, replace_module
from trtq.quant.timestep import TimestepTable, float_scope, step_scope

__all__ = [
    "LayerPlan",
    "LowBitTensors",
    "QuantizedDenoiser",
    "convert",
    "deploy",
    "deploy_timesteps",
    "layer_kind",
    "merge",
    "named_errors",
    "precision_text",
    "quantizable_layers",
]

LowBitTensors = LayerTensors | ProductTensors

Kind = Literal["linear", "conv2d", "product"]


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one linear, convolution or product of activations.

    Attributes:
        name: its module path in the denoiser.
        kind: `linear`, `conv2d` or `product`.
        weight_bits: width of its weight codes; None: there is no weight, or the layer stays float.
        activation_bits: width of its (first) input's codes; None: the layer stays float.
        reason: why it is treated so, in a few words.
        adapters: whether fine-tuning gives it QALoRA adapters.
        right_bits: width of the codes of a product's second input.
        input_of: an earlier layer that gets the same input; both use that one's quantiser.
    """

    name: str
    kind: Kind
    weight_bits: int | None
    activation_bits: int | None
    reason: str
    adapters: bool = True
    right_bits: int | None = None
    input_of: str | None = None

    @property
    def quantized(self) -> bool:
        """Whether the layer becomes low-bit."""
        return self.activation_bits is not None

    @property
    def precision(self) -> str:
        """Its bits as text: `w4a4`, for a product `a8a4`, or `float`."""
        return precision_text(self.weight_bits, self.activation_bits, self.right_bits)

    @property
    def operands(self) -> dict[str, int]:
        """Bits of every quantised input, by the name of its quantiser within the layer."""
        if self.activation_bits is None:
            return {}
        if self.right_bits is None:
            return {"activation": self.activation_bits}
        return {"left": self.activation_bits, "right": self.right_bits}


def precision_text(weight: int | None, activation: int | None, right: int | None = None) -> str:
    """Bits as text: `w4a4`, for a product `a8a4`, or `float`."""
    if activation is None:
        return "float"
    return f"a{activation}a{right}" if weight is None else f"w{weight}a{activation}"


def layer_kind(module: nn.Module) -> Kind | None:
    """What kind of layer a float module is; None for one that cannot be low-bit."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    return "product" if isinstance(module, Product) else None


def quantizable_layers(denoiser: nn.Module) -> dict[str, Any]:
    """Every `nn.Linear`, `nn.Conv2d` and `Product` by its module path, in module order."""
    return {
        name: module for name, module in denoiser.named_modules() if layer_kind(module) is not None
    }


@contextmanager
def named_errors(layer: str) -> Iterator[None]:
    """Put the layer's name in front of an error raised inside the block."""
    try:
        yield
    except TrtqError as err:
        raise type(err)(f"layer {layer!r}: {err}") from err


class QuantizedDenoiser(StandIn):
    """A denoiser that finds its own step: it looks the timestep up and hands the index to its layers.

    It is called exactly as the diffusers model it wraps.

    Args:
        denoiser: a diffusers model with quantised or deployed layers inside.
        table: the calibrated timesteps.
    """

    def __init__(self, denoiser: nn.Module, table: TimestepTable) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.table = table
        self._signature = inspect.signature(denoiser.forward)
        if "timestep" not in self._signature.parameters:
            raise QuantizationError(
                f"{type(denoiser).__name__}.forward has no argument 'timestep', so its scales "
                "cannot follow the denoising step"
            )

    @property
    def config(self) -> Any:
        """The configuration of the wrapped model."""
        return self.denoiser.config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the wrapped model's parameters."""
        return next(self._tensors()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the wrapped model's parameters."""
        return next(self._tensors()).device

    def _tensors(self) -> Iterator[Tensor]:
        """All tensors, once everything is low-bit there may be no parameters left."""
        buffers = list(self.denoiser.buffers())
        yield from self.denoiser.parameters()
        yield from (buffer for buffer in buffers if buffer.is_floating_point())

    def _timestep(self, *args: Any, **kwargs: Any) -> Tensor | float:
        try:
            timestep: Tensor | float = self._signature.bind(*args, **kwargs).arguments["timestep"]
        except (TypeError, KeyError) as err:
            raise StepError(f"the denoiser was called without its timestep: {err}") from err
        return timestep

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The low-bit prediction; arguments and result are those of the wrapped model."""
        with step_scope(self.table.index(self._timestep(*args, **kwargs))):
            return self.denoiser(*args, **kwargs)

    @torch.no_grad()
    def teacher(self, *args: Any, **kwargs: Any) -> Any:
        """The float prediction, computed on the same copy of the weights, without gradients."""
        with float_scope():
            return self.denoiser(*args, **kwargs)

    def layers(self) -> Iterator[tuple[str, QuantLayer]]:
        """The quantised linears and convolutions by their path in the wrapped model."""
        for name, module in self.denoiser.named_modules():
            if isinstance(module, QuantLayer):
                yield name, module

    def products(self) -> Iterator[tuple[str, QuantProduct]]:
        """The quantised products by their path in the wrapped model."""
        for name, module in self.denoiser.named_modules():
            if isinstance(module, QuantProduct):
                yield name, module

    def activations(self) -> Iterator[tuple[str, ActivationQuantizer]]:
        """Every activation quantiser by its path in the wrapped model; shared ones by their first."""
        for name, module in self.denoiser.named_modules():
            if isinstance(module, ActivationQuantizer):
                yield name, module


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
    generator: torch.Generator | None = None,
) -> QuantizedDenoiser:
    """Replace the planned layers by `QuantLinear` and `QuantConv2d`, in place.

    The float parameters are kept and shared, so the result is teacher and student at once.

    Args:
        denoiser: a float diffusers model; changed in place.
        plans: one per layer, see `calib.policy`.
        table: the calibrated timesteps.
        rank: rank of the QALoRA adapters of layers whose plan wants them; 0 for none.
        base: what the adapters are added to.
        weight_method: how weight ranges are found.
        zero_point_mode: how activation zero points behave.
        split_scale: the release's double update of the weight step.
        generator: draws the first values of the adapters.

    Raises:
        QuantizationError: the plan quantises no layer, or names one that is not there.
        NonFiniteError: a weight holds NaN or infinity; the message names the layer.
    """
    if not any(plan.quantized for plan in plans):
        raise QuantizationError(
            "zero layers would be quantised; the policy matches nothing in this denoiser. Name its "
            "layers in a policy, or use the generic one"
        )
    denoiser.requires_grad_(False)
    sources = quantizable_layers(denoiser)
    for plan in plans:
        if plan.activation_bits is None:
            continue
        source = sources.get(plan.name)
        if source is None:
            raise QuantizationError(f"the plan names {plan.name!r}, which this denoiser has not")
        if plan.right_bits is not None:
            product = QuantProduct(table, plan.activation_bits, plan.right_bits, zero_point_mode)
            replace_module(denoiser, plan.name, product)
            continue
        assert plan.weight_bits is not None
        kind = QuantLinear if isinstance(source, nn.Linear) else QuantConv2d
        with named_errors(plan.name):
            layer = kind(
                source,
                table,
                weight_bits=plan.weight_bits,
                activation_bits=plan.activation_bits,
                rank=rank if plan.adapters else 0,
                base=base,
                weight_method=weight_method,
                zero_point_mode=zero_point_mode,
                split_scale=split_scale,
                generator=generator,
            )
        replace_module(denoiser, plan.name, layer)
        if plan.input_of is not None:
            owner = denoiser.get_submodule(plan.input_of)
            assert isinstance(owner, QuantLayer)
            layer.activation = owner.activation
    return QuantizedDenoiser(denoiser, table)


def merge(quantized: QuantizedDenoiser, *, release: bool = False) -> dict[str, LowBitTensors]:
    """The integers of every quantised layer, by its path; the adapters vanish into them.

    Args:
        quantized: a converted denoiser.
        release: give the memory of each float weight back once it is merged. The denoiser can only be
            saved after that.

    Raises:
        QuantizationError: a layer cannot be deployed; the message names it.
    """
    merged: dict[str, LowBitTensors] = {}
    for name, layer in quantized.layers():
        with named_errors(name):
            merged[name] = LayerTensors.merge(layer)
        if release:
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
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
) -> QuantizedDenoiser:
    """Replace layers, norms, SiLUs and time projections by their deployed forms, in place.

    Args:
        denoiser: a diffusers model, float or already converted.
        merged: the numbers of the layers, by their path.
        table: the calibrated timesteps.
        kernels: layers become `KernelLayer`, and group norms and SiLUs stay torch's own: for speed on a
            GPU, where no exported graph is compared bit by bit.
    """
    for name, tensors in merged.items():
        if isinstance(tensors, ProductTensors):
            replace_module(denoiser, name, DeployedProduct(tensors))
            continue
        source = denoiser.get_submodule(name)
        geometry = None
        if isinstance(source, nn.Conv2d):
            geometry = ConvGeometry.of(source)
        elif isinstance(source, QuantConv2d):
            geometry = source.geometry
        layer = KernelLayer if kernels else DeployedLayer
        replace_module(denoiser, name, layer(tensors, geometry))
    deploy_timesteps(denoiser)
    if kernels:
        return QuantizedDenoiser(denoiser, table)
    for name, module in list(denoiser.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.GroupNorm) and module.affine:
            replace_module(denoiser, name, DeployedGroupNorm(module))
        elif isinstance(module, nn.LayerNorm):
            replace_module(denoiser, name, DeployedLayerNorm(module))
        elif isinstance(module, nn.SiLU):
            replace_module(denoiser, name, DeployedSilu())
    return QuantizedDenoiser(denoiser, table)


def deploy_timesteps(denoiser: nn.Module) -> None:
    """Replace time projections by their deployed form, in place."""
    for name, module in list(denoiser.named_modules(remove_duplicate=False)):
        if type(module).__name__ == "Timesteps":
            replace_module(denoiser, name, DeployedTimesteps(module))
