"""Scaling of channels inside attention, which the weights around a product absorb.

A product of two activations has one scale for all channels of an operand, and no weight of its own that
could absorb the range of an outlier channel. In decomposed attention (`trtq.quant.structure`) the linear
layers before and after the products can (SmoothQuant's migration, arXiv 2211.10438, one product later):

    softmax(q k^T) v W^T = softmax(q k^T) (v / c) (W * c)^T        c: one value per channel of v
    q k^T = (q / c) (k * c)^T                                      c: one value per channel of q

`v / c` is a change of the rows and the bias of `to_v`, and `W * c` of the columns of `to_out.0`; `q / c`
and `k * c` change the rows and biases of `to_q` and `to_k`. The model's function stays the same, and
nothing remains to be computed at inference. `1 / c` is stored with the product's tensors, so that new
weights, e.g. with other LoRAs, can be scaled the same way.

Letters: N, K out / in features; C channels of all heads, C = H D.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from trtq.errors import QuantizationError
from trtq.quant.input_transform import TransformTensors
from trtq.quant.structure import DecomposedAttention, Product

__all__ = [
    "AttentionProduct",
    "ScaledWeight",
    "attention_products",
    "scale_channels",
    "scaled_weights",
    "transforms_of",
    "unscaled_outputs",
]

_PROCESSOR = ".processor."
_NAMES = (f"{_PROCESSOR}scores", f"{_PROCESSOR}mix")


@dataclass(frozen=True)
class ScaledWeight:
    """Factors of one layer's weight `[N, K]`.

    Attributes:
        layer: path of the layer.
        rows: factors of the outputs, and of the bias, float32 `[N]`; None: unchanged.
        columns: factors of the inputs, float32 `[K]`; None: unchanged.
    """

    layer: str
    rows: Tensor | None = None
    columns: Tensor | None = None


@dataclass(frozen=True)
class AttentionProduct:
    """A product of a decomposed attention.

    Attributes:
        name: path of the product.
        attention: path of the attention module.
        is_mix: whether the product is that of probabilities and values; else of queries and keys.
    """

    name: str
    attention: str
    is_mix: bool

    @property
    def before(self) -> tuple[str, ...]:
        """Paths of the layers whose outputs are multiplied, without the probabilities."""
        names = ("to_v",) if self.is_mix else ("to_q", "to_k")
        return tuple(f"{self.attention}.{name}" for name in names)

    @property
    def after(self) -> str | None:
        """Path of the layer that reads the product; None: no linear layer reads it."""
        return f"{self.attention}.to_out.0" if self.is_mix else None

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of all layers that absorb the factors."""
        return self.before if self.after is None else (*self.before, self.after)

    def obstacle(self, denoiser: nn.Module) -> str | None:
        """The reason why the channels cannot be scaled in a float denoiser; None if they can."""
        attention: Any = denoiser.get_submodule(self.attention)
        if not self.is_mix:
            for name in ("norm_q", "norm_k"):
                if getattr(attention, name, None) is not None:
                    return f"{name} stands between the projections and their product"
        owners = _owners(denoiser)
        sizes = []
        for path in self.layers:
            layer = _module(denoiser, path)
            leaf = path.removeprefix(f"{self.attention}.")
            if not _is_plain(layer):
                return f"{leaf} is no plain linear layer"
            tensors = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
            if any(len(owners[id(tensor)]) > 1 for tensor in tensors):
                return f"{leaf} shares its weight with another layer"
            sizes.append(layer.in_features if path == self.after else layer.out_features)
        if len(set(sizes)) > 1:
            # Heads of keys or values that several heads of queries share.
            return f"{' and '.join(map(str, sizes))} channels do not correspond one to one"
        return None


def _module(denoiser: nn.Module, path: str) -> Any:
    """The module at a path; None: there is no such module."""
    try:
        return denoiser.get_submodule(path)
    except AttributeError:
        return None


def _is_plain(layer: Any) -> bool:
    """Whether a layer's output is `x W^T + b` of its parameters, which nothing changes afterwards."""
    return (
        isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward
        and "weight" in layer._parameters
        and not layer._forward_hooks
    )


def _owners(denoiser: nn.Module) -> dict[int, set[str]]:
    """Paths of all places of each parameter, by the parameter's id."""
    owners: dict[int, set[str]] = {}
    for path, module in denoiser.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(f"{path}.{leaf}")
    return owners


def attention_products(denoiser: nn.Module) -> Iterator[AttentionProduct]:
    """The products of every decomposed attention, in module order."""
    for path, module in denoiser.named_modules():
        if isinstance(module, DecomposedAttention) and path.endswith(_PROCESSOR[:-1]):
            attention = path.removesuffix(_PROCESSOR[:-1])
            yield AttentionProduct(f"{path}.scores", attention, is_mix=False)
            yield AttentionProduct(f"{path}.mix", attention, is_mix=True)


def scaled_weights(product: str, inv_channels: Tensor) -> list[ScaledWeight]:
    """The factors of the weights around a product.

    Args:
        product: path of the product.
        inv_channels: the factors `1 / c`, float32 `[C]`.

    Raises:
        QuantizationError: the path is not that of a product of decomposed attention.
    """
    attention, _, kind = product.rpartition(_PROCESSOR)
    if not attention or not product.endswith(_NAMES):
        raise QuantizationError(f"{product!r} is no product of a decomposed attention")
    inverse, factors = inv_channels.float(), inv_channels.float().reciprocal()
    if kind == "mix":
        return [
            ScaledWeight(f"{attention}.to_v", rows=inverse),
            ScaledWeight(f"{attention}.to_out.0", columns=factors),
        ]
    return [
        ScaledWeight(f"{attention}.to_q", rows=inverse),
        ScaledWeight(f"{attention}.to_k", rows=factors),
    ]


@torch.no_grad()
def scale_channels(denoiser: nn.Module, product: str, tensors: TransformTensors) -> None:
    """Scale the channels of a product's operands in the weights around the product, in place.

    The function of the denoiser stays the same up to rounding. The product keeps the factors, for the
    tensors of its low-bit form.

    Args:
        denoiser: float denoiser with decomposed attention.
        product: path of the product.
        tensors: the factors; without a rotation.

    Raises:
        QuantizationError: the product is none of decomposed attention, the channels cannot be scaled, or
            their number is another one.
    """
    known = {each.name: each for each in attention_products(denoiser)}.get(product)
    inverse = tensors.inv_channels
    if known is None or inverse is None or tensors.rotation:
        raise QuantizationError(f"the channels of {product!r} cannot be scaled: no such product")
    obstacle = known.obstacle(denoiser)
    channels = 0 if obstacle else denoiser.get_submodule(known.before[0]).out_features
    if obstacle is None and channels != len(inverse):
        obstacle = f"{len(inverse)} factors for {channels} channels"
    if obstacle is not None:
        raise QuantizationError(f"the channels of {product!r} cannot be scaled: {obstacle}")
    for scaled in scaled_weights(product, inverse):
        _scale(cast(nn.Linear, denoiser.get_submodule(scaled.layer)), scaled)
    cast(Product, denoiser.get_submodule(product)).transform = tensors


def _scale(layer: nn.Linear, scaled: ScaledWeight) -> None:
    """Multiply the rows, bias or columns of a layer."""
    weight, bias = layer.weight, layer.bias
    # Factors are rounded to float32 only, also for weights in half precision.
    precise = torch.promote_types(weight.dtype, torch.float32)
    changed = weight.to(precise)
    if scaled.rows is not None:
        rows = scaled.rows.to(changed)
        changed = changed * rows[:, None]
        if bias is not None:
            new = (bias.to(precise) * rows).to(bias.dtype)
            layer.bias = nn.Parameter(new, requires_grad=bias.requires_grad)
    if scaled.columns is not None:
        changed = changed * scaled.columns.to(changed)
    layer.weight = nn.Parameter(changed.to(weight.dtype), requires_grad=weight.requires_grad)


def transforms_of(denoiser: nn.Module) -> dict[str, TransformTensors]:
    """The factors that the weights of a denoiser contain, by path of the product.

    Args:
        denoiser: float, quantised or deployed denoiser.
    """
    return {
        path: module.transform
        for path, module in denoiser.named_modules()
        if path.endswith(_NAMES) and isinstance(module.transform, TransformTensors)
    }


def unscaled_outputs(denoiser: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of a denoiser's linear layers as if no channels were scaled.

    Args:
        denoiser: float, quantised or deployed denoiser.
        outputs: outputs `[..., N]` by path of the layer.
    """
    result = dict(outputs)
    for product, tensors in transforms_of(denoiser).items():
        assert tensors.inv_channels is not None
        for scaled in scaled_weights(product, tensors.inv_channels):
            if scaled.rows is not None and scaled.layer in result:
                output = result[scaled.layer]
                result[scaled.layer] = output / scaled.rows.to(output)
    return result
