"""Float-equivalent transforms of a layer's input and weight, in front of both quantisers.

Smoothing moves the range of a channel from the input to the weight (SmoothQuant, arXiv 2211.10438), and
a rotation spreads the range of one channel over all channels of its group (ConvRot, arXiv 2512.03673):

    x' = (x / c) H        W' = (W * c) H        x' W'^T = x W^T

`c` has one value per input channel. `1 / c` is stored, with 8 significant bits, so half precision and
bfloat16 hold it exactly; the transform multiplies by it. `H` is block-diagonal with the regular Hadamard
matrix of `hadamard`; it is symmetric and its own inverse. For a convolution, H acts on the input
channels, which commutes with the taps and with zero padding.

Letters: N, K out / in features or channels; G groups of M channels, K = G M.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from trtq.errors import ArtefactError, QuantizationError
from trtq.quant.stored_weight import change_weight, weight_shape

__all__ = [
    "ROTATIONS",
    "InputTransform",
    "TransformTensors",
    "apply_transform",
    "hadamard",
    "rotation_that_fits",
    "transform_entries",
    "transform_layer",
    "transform_obstacle",
]

ROTATIONS = (16, 64, 256)
"""Numbers of channels that one rotation can mix."""

_MAX_FACTOR = 1024.0
"""Largest factor by which a channel is scaled, up or down."""

_H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def hadamard(n: int) -> Tensor:
    """The regular Hadamard matrix of order n, `kron(H4, ...) / sqrt(n)`, float32 `[n, n]`.

    All row sums are equal (ConvRot, arXiv 2512.03673), so a common offset of all channels is spread over
    all channels too. The matrix is symmetric and orthogonal, so it is its own inverse. All entries are
    powers of two up to the sign.

    Args:
        n: a power of 4.

    Raises:
        QuantizationError: n is not a power of 4.
    """
    if n < 4 or 4 ** round(math.log(n, 4)) != n:
        raise QuantizationError(
            f"a regular Hadamard matrix of order {n} is not available; the order is a power of 4, "
            "e.g. 16, 64 or 256"
        )
    block = torch.tensor(_H4, dtype=torch.float32)
    matrix = block
    while len(matrix) < n:
        matrix = torch.kron(matrix, block)
    return matrix / math.sqrt(n)


def rotation_that_fits(channels: int, largest: int) -> int:
    """The largest order of a rotation that divides the channels; 0: none does.

    Args:
        channels: number K of input channels.
        largest: maximum order.
    """
    return max((n for n in ROTATIONS if n <= largest and channels % n == 0), default=0)


@dataclass(frozen=True, eq=False)
class TransformTensors:
    """The transform of one layer's input.

    Attributes:
        inv_channels: float32 `[K]`, the factors `1 / c` of the input's channels, with 8 significant
            bits; None: no smoothing.
        rotation: order of the rotation; 0: no rotation.
    """

    inv_channels: Tensor | None
    rotation: int = 0

    @classmethod
    def of_channels(cls, channels: Tensor | None, rotation: int = 0) -> TransformTensors:
        """The transform with the nearest possible values of `c`.

        Args:
            channels: positive factors `c`, `[K]`; None: no smoothing.
            rotation: order of the rotation; 0: no rotation.
        """
        if channels is None:
            return cls(None, rotation)
        inverse = channels.float().clamp(1 / _MAX_FACTOR, _MAX_FACTOR).reciprocal()
        return cls(inverse.bfloat16().float(), rotation)

    def __post_init__(self) -> None:
        """Raise QuantizationError unless the values are possible."""
        if self.rotation and self.rotation not in ROTATIONS:
            raise QuantizationError(
                f"a rotation mixes {', '.join(map(str, ROTATIONS))} channels, got {self.rotation}"
            )
        inverse = self.inv_channels
        if inverse is None:
            return
        inside = (inverse >= 1 / _MAX_FACTOR) & (inverse <= _MAX_FACTOR)
        if not bool(inside.all()) or not torch.equal(inverse, inverse.bfloat16().float()):
            raise QuantizationError(
                f"smoothing scales a channel by a factor in {1 / _MAX_FACTOR:g} .. {_MAX_FACTOR:g} with "
                f"8 significant bits, got factors in {float(inverse.min()):g} .. "
                f"{float(inverse.max()):g}"
            )

    def tensors(self) -> dict[str, Tensor]:
        """The entries in `quantized.safetensors`; `from_tensors` is the inverse."""
        named = {}
        if self.inv_channels is not None:
            named["transform.inv_channels"] = self.inv_channels.half()
        if self.rotation:
            named["transform.rotation"] = torch.tensor([self.rotation], dtype=torch.int16)
        return named

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> TransformTensors | None:
        """Inverse of `tensors`; None: the layer has no transform.

        Raises:
            ArtefactError: a tensor has the wrong shape or type, or impossible values.
        """
        inverse, rotation = named.get("transform.inv_channels"), named.get("transform.rotation")
        if inverse is None and rotation is None:
            return None
        if inverse is not None and (inverse.dtype != torch.float16 or inverse.ndim != 1):
            raise ArtefactError("the factors of the smoothing are float16 with one axis")
        if rotation is not None and (rotation.dtype != torch.int16 or rotation.numel() != 1):
            raise ArtefactError("the order of the rotation is one int16")
        try:
            factors = None if inverse is None else inverse.float()
            return cls(factors, 0 if rotation is None else int(rotation))
        except QuantizationError as err:
            raise ArtefactError(str(err)) from err

    @property
    def key(self) -> bytes:
        """Bytes that are equal for equal transforms."""
        factors = b"" if self.inv_channels is None else self.inv_channels.numpy().tobytes()
        return factors + self.rotation.to_bytes(2, "little")

    def obstacle(self, layer: nn.Module) -> str | None:
        """The reason why a layer cannot have this transform; None if it can.

        Args:
            layer: float layer.
        """
        channels = weight_shape(layer)[1]
        factors = self.inv_channels
        if factors is not None and len(factors) != channels:
            return f"{len(factors)} factors for {channels} input channels"
        return transform_obstacle(layer, self.rotation)

    def weight(self, weight: Tensor) -> Tensor:
        """The transformed weight `(W * c) H`.

        Args:
            weight: float weight, `[N, K, ...]`, of a layer with one group.
        """
        if self.inv_channels is not None:
            factors = self.inv_channels.to(weight).reciprocal()
            weight = weight * factors.reshape(1, -1, *(1,) * (weight.ndim - 2))
        return _rotated(weight, self.rotation, 1) if self.rotation else weight


def _rotated(x: Tensor, order: int, axis: int) -> Tensor:
    """Rotate groups of `order` channels along an axis, in the dtype of the input."""
    matrix = hadamard(order).to(x)
    axis %= x.ndim
    if axis == x.ndim - 1:
        return (x.reshape(*x.shape[:-1], -1, order) @ matrix).reshape(x.shape)
    taps = math.prod(x.shape[axis + 1 :])
    return (matrix @ x.reshape(*x.shape[:axis], -1, order, taps)).reshape(x.shape)


class InputTransform(nn.Module):
    """`x -> (x / c) H` on the channels of a layer's input.

    Args:
        tensors: smoothing and rotation.
        axis: axis of the channels: -1 for a linear layer, 1 for a convolution.

    Attributes:
        inv_channels: float32 `[K]`, the factors `1 / c`; None: no smoothing.
        rotation: order of the rotation; 0: no rotation.
        axis: axis of the channels.
    """

    inv_channels: Tensor | None

    def __init__(self, tensors: TransformTensors, axis: int) -> None:
        super().__init__()
        self.register_buffer("inv_channels", tensors.inv_channels)
        self.rotation = tensors.rotation
        self.axis = axis

    @property
    def tensors(self) -> TransformTensors:
        """Smoothing and rotation, on the CPU."""
        if self.inv_channels is None:
            return TransformTensors(None, self.rotation)
        # Half precision holds the factors exactly, so a cast model still has the same factors.
        return TransformTensors(self.inv_channels.detach().float().cpu().clone(), self.rotation)

    def forward(self, x: Tensor) -> Tensor:
        """x[..., K] or x[B, K, ...] -> the transformed input, with the same shape and dtype."""
        if self.inv_channels is not None:
            axes = (1,) * (0 if self.axis == -1 else x.ndim - 2)
            x = x * self.inv_channels.to(x.dtype).reshape(-1, *axes)
        return _rotated(x, self.rotation, self.axis) if self.rotation else x

    def extra_repr(self) -> str:
        """Whether the input is smoothed, and the order of the rotation."""
        return f"smooth={self.inv_channels is not None}, rotation={self.rotation}"


def transform_entries(transform: TransformTensors | None) -> dict[str, Tensor]:
    """The entries of a layer's transform in `quantized.safetensors`; empty without a transform."""
    return {} if transform is None else transform.tensors()


def apply_transform(layer: nn.Module, tensors: TransformTensors, axis: int) -> None:
    """Let a layer transform its input before each call; its weight does not change.

    The layer gets a module `input_transform`, which a hook calls, so hooks that are added later observe
    the transformed input.

    Args:
        layer: the layer; changed in place.
        tensors: smoothing and rotation.
        axis: axis of the channels: -1 for a linear layer, 1 for a convolution.
    """
    layer.add_module("input_transform", InputTransform(tensors, axis))
    layer.register_forward_pre_hook(_transform_first, with_kwargs=True)


def transform_obstacle(layer: nn.Module, order: int = 0) -> str | None:
    """The reason why a layer's input cannot be transformed; None if it can.

    Args:
        layer: float layer.
        order: order of the rotation; 0: smoothing only.
    """
    source = cast(Any, layer)
    if getattr(source, "groups", 1) != 1:
        return "a convolution in groups"
    channels = weight_shape(layer)[1]
    if order and channels % order:
        return f"{order} does not divide its {channels} input channels"
    return None


@torch.no_grad()
def transform_layer(layer: nn.Module, tensors: TransformTensors) -> None:
    """Transform the input and the weight of a float layer, in place; its function stays the same.

    See `apply_transform` for how the layer transforms its input.

    Args:
        layer: linear layer or convolution.
        tensors: smoothing and rotation.

    Raises:
        QuantizationError: the layer cannot be transformed.
    """
    obstacle = tensors.obstacle(layer)
    if obstacle is not None:
        raise QuantizationError(f"the input cannot be transformed: {obstacle}")
    change_weight(layer, tensors.weight)
    apply_transform(layer, tensors, -1 if isinstance(layer, nn.Linear) else 1)
    layer.input_transform.to(next(layer.parameters()).device)


def _transform_first(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Transform the first argument of a call; diffusers passes the input of some layers by name."""
    transform = cast(InputTransform, layer.input_transform)
    if args:
        return (transform(args[0]), *args[1:]), kwargs
    return args, kwargs | {"input": transform(kwargs["input"])}
