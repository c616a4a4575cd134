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
from trtq.quant.activation import ZeroPointMode
from trtq.quant.deployed import DeployedGroupNorm, DeployedLayer, LayerTensors
from trtq.quant.modules import Base, ConvGeometry, QuantConv2d, QuantLayer, QuantLinear
from trtq.quant.ranges import Method
from trtq.quant.timestep import TimestepTable, float_scope, step_scope

__all__ = [
    "LayerPlan",
    "QuantizedDenoiser",
    "convert",
    "deploy",
    "merge",
    "named_errors",
    "quantizable_layers",
    "replace_module",
]

Kind = Literal["linear", "conv2d"]


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one linear or convolution.

    Attributes:
        name: its module path in the denoiser.
        kind: `linear` or `conv2d`.
        weight_bits: width of its weight codes; None: the layer stays float.
        activation_bits: width of its input's codes; None: the layer stays float.
        reason: why it is treated so, in a few words.
        adapters: whether fine-tuning gives it QALoRA adapters.
    """

    name: str
    kind: Kind
    weight_bits: int | None
    activation_bits: int | None
    reason: str
    adapters: bool = True

    @property
    def quantized(self) -> bool:
        """Whether the layer becomes low-bit."""
        return self.weight_bits is not None


def quantizable_layers(denoiser: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every `nn.Linear` and `nn.Conv2d` by its module path, in module order."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module path `name` points."""
    parent, _, leaf = name.rpartition(".")
    owner = root.get_submodule(parent)
    if isinstance(owner, nn.Sequential | nn.ModuleList):
        owner[int(leaf)] = new
    else:
        setattr(owner, leaf, new)


@contextmanager
def named_errors(layer: str) -> Iterator[None]:
    """Put the layer's name in front of an error raised inside the block."""
    try:
        yield
    except TrtqError as err:
        raise type(err)(f"layer {layer!r}: {err}") from err


class QuantizedDenoiser(nn.Module):
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
        return next(self.denoiser.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the wrapped model's parameters."""
        return next(self.denoiser.parameters()).device

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
        """The quantised layers by their path in the wrapped model."""
        for name, module in self.denoiser.named_modules():
            if isinstance(module, QuantLayer):
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
    split_step: bool = False,
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
        split_step: the release's double update of the weight step.
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
        if plan.weight_bits is None or plan.activation_bits is None:
            continue
        source = sources.get(plan.name)
        if source is None:
            raise QuantizationError(f"the plan names {plan.name!r}, which this denoiser has not")
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
                split_step=split_step,
                generator=generator,
            )
        replace_module(denoiser, plan.name, layer)
    return QuantizedDenoiser(denoiser, table)


def merge(quantized: QuantizedDenoiser) -> dict[str, LayerTensors]:
    """The integers of every quantised layer, by its path; the adapters vanish into them.

    Raises:
        QuantizationError: a layer cannot be deployed; the message names it.
    """
    merged = {}
    for name, layer in quantized.layers():
        with named_errors(name):
            merged[name] = LayerTensors.merge(layer)
    return merged


def deploy(
    denoiser: nn.Module, merged: Mapping[str, LayerTensors], table: TimestepTable
) -> QuantizedDenoiser:
    """Replace layers by `DeployedLayer` and group norms by `DeployedGroupNorm`, in place.

    Args:
        denoiser: a diffusers model, float or already converted.
        merged: the numbers of the layers, by their path.
        table: the calibrated timesteps.
    """
    for name, tensors in merged.items():
        source = denoiser.get_submodule(name)
        geometry = None
        if isinstance(source, nn.Conv2d):
            geometry = ConvGeometry.of(source)
        elif isinstance(source, QuantConv2d):
            geometry = source.geometry
        replace_module(denoiser, name, DeployedLayer(tensors, geometry))
    norms = [(n, m) for n, m in denoiser.named_modules() if isinstance(m, nn.GroupNorm)]
    for name, norm in norms:
        if norm.affine:
            replace_module(denoiser, name, DeployedGroupNorm(norm))
    return QuantizedDenoiser(denoiser, table)
