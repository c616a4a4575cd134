"""Linear and convolution with fake-quantised weights and activations, and QALoRA inside the weight.

The adapters of QALoRA (EfficientDM, arXiv 2310.03270, eq. 6) are added to the weight *before* it is
quantised, so that after training one low-bit weight is left:

    Wq = Q_w(W0 + B A)         base "fp", the paper's formula
    Wq = Q_w((q0 - z) d + B A) base "int", as released; q0 are the codes of W0

Letters: N, K out / in features or channels, R rank, B images.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trtq.errors import NonFiniteError, QuantizationError
from trtq.quant.activation import ActivationQuantizer, ZeroPointMode
from trtq.quant.adaround import directed_codes, hard_direction, soft_direction
from trtq.quant.fake_quant import fake_quant, quantize_codes
from trtq.quant.packing import PackedWeight
from trtq.quant.ranges import Method, symmetric_weights, weight_qparams
from trtq.quant.timestep import Step, TimestepTable, current_step

__all__ = ["Base", "ConvGeometry", "QuantConv2d", "QuantLayer", "QuantLinear", "QuantProduct"]

Base = Literal["fp", "int"]


@dataclass(frozen=True)
class ConvGeometry:
    """Everything about a 2-D convolution but its weights; pairs are (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> ConvGeometry:
        """Read it off a layer.

        Raises:
            QuantizationError: the layer pads with something other than zeros.
        """
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise QuantizationError(
                f"a convolution with padding={conv.padding!r}, padding_mode={conv.padding_mode!r} "
                "cannot be quantised; only explicit zero padding is exact in integers"
            )
        height_width = (conv.stride, conv.padding, conv.dilation)
        stride, padding, dilation = ((int(pair[0]), int(pair[1])) for pair in height_width)
        return cls(stride, padding, dilation, conv.groups)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x[B,K,H,W] -> [B,N,H',W']."""
        return functional.conv2d(
            x, weight, bias, self.stride, self.padding, self.dilation, self.groups
        )


class QuantLayer(nn.Module):
    """What `QuantLinear` and `QuantConv2d` share; not used by itself.

    The float weight stays where it was, frozen: in `float_scope` the layer is the teacher's.

    Attributes:
        weight: the float weight `W0`, `[N, K, ...]`, frozen and shared with the source layer.
        bias: float, frozen, or None.
        lora_A: `[R, K, ...]`, or None when the rank is 0.
        lora_B: `[N, R, ...]`, or None when the rank is 0.
        weight_scale: parameter `[N, 1, ...]`, the step `d`.
        weight_zero_point: buffer `[N, 1, ...]`, whole numbers.
        tuned_weight: a trained weight that stands for `W0`, see `tune`; None: there is none.
        tuned_bias: the same of the bias.
        alpha: learned rounding like the weight, see `trtq.quant.adaround`; None: to nearest.
        soft_rounding: whether `alpha` still rounds softly.
        activation: the quantiser of the input.
    """

    kind: ClassVar[Literal["linear", "conv2d"]]
    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_zero_point: Tensor
    base_codes: Tensor | None
    base_scale: Tensor | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    tuned_weight: nn.Parameter | None
    tuned_bias: nn.Parameter | None
    alpha: nn.Parameter | None

    def __init__(
        self,
        source: nn.Linear | nn.Conv2d,
        table: TimestepTable,
        *,
        weight_bits: int = 4,
        activation_bits: int = 4,
        rank: int = 0,
        base: Base = "fp",
        weight_method: Method = "minmax",
        zero_point_mode: ZeroPointMode = "frozen",
        split_scale: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """Wrap a float layer.

        Args:
            source: the layer; its parameters are shared, not copied.
            table: the calibrated timesteps.
            weight_bits: width of the weight codes. 8 bits are symmetric so that they fit int8.
            activation_bits: width of the activation codes.
            rank: rank R of the adapters; 0 for none.
            base: what the adapters are added to, see the module docstring.
            weight_method: how the weight range is found.
            zero_point_mode: see `trtq.quant.activation.ZeroPointMode`.
            split_scale: with base "int", keep the step of the dequantiser as a second parameter on
                the same memory, so that an optimiser moves it twice, as the release does.
            generator: draws the first values of `lora_A`.

        Raises:
            NonFiniteError: the weight or bias holds NaN or infinity.
        """
        super().__init__()
        for tensor in (source.weight, source.bias):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError("the weight or bias holds NaN or infinity")
        self._take_geometry(source)
        self.weight = cast(nn.Parameter, source.weight)
        self.bias = cast("nn.Parameter | None", source.bias)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        self.weight_bits = weight_bits
        self.weight_qmax = 2**weight_bits - 1
        self.base: Base = base
        self.rank = rank
        scale, zero_point = weight_qparams(
            self.weight,
            weight_bits,
            weight_method,
            symmetric=symmetric_weights(weight_bits),
            contain_zero=True,
        )
        self.weight_scale = nn.Parameter(scale)
        self.register_buffer("weight_zero_point", zero_point)
        self.register_buffer(
            "base_codes",
            quantize_codes(self.weight, scale, zero_point, 0, self.weight_qmax).to(torch.uint8)
            if base == "int"
            else None,
        )
        self.register_buffer("base_scale", scale.clone() if base == "int" else None)
        self.weight_scale_dequant = (
            nn.Parameter(self.weight_scale.data) if split_scale and base == "int" else None
        )
        self.activation = ActivationQuantizer(activation_bits, table, zero_point_mode)
        self.register_parameter("tuned_weight", None)
        self.register_parameter("tuned_bias", None)
        self.register_parameter("alpha", None)
        self.soft_rounding = False
        if rank:
            a, b = self._adapter_shapes(rank)
            bound = 1 / math.sqrt(math.prod(self.weight.shape[1:]))
            self.lora_A = nn.Parameter(torch.empty(a).uniform_(-bound, bound, generator=generator))
            self.lora_B = nn.Parameter(torch.zeros(b))
        else:
            self.register_parameter("lora_A", None)
            self.register_parameter("lora_B", None)

    def _take_geometry(self, source: nn.Linear | nn.Conv2d) -> None:
        """Keep what `_operate` needs beside the weight; a linear layer needs nothing."""

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale_dequant is not None:
            # Both parameters are one memory, also after a move to another device.
            self.weight_scale_dequant.data = self.weight_scale.data
        return self

    @abstractmethod
    def _adapter_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of `lora_A` and `lora_B`."""

    @abstractmethod
    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float operation."""

    def lora_delta(self) -> Tensor | None:
        """The update `B A`, shaped like the weight; None without adapters."""
        if self.lora_A is None or self.lora_B is None:
            return None
        product = self.lora_B.flatten(1) @ self.lora_A.flatten(1)
        return product.reshape(self.weight.shape)

    def tune(self) -> None:
        """Give the student a weight and bias of its own to train, starting at the float ones (QuEST)."""
        self.tuned_weight = nn.Parameter(self.weight.detach().clone())
        if self.bias is not None:
            self.tuned_bias = nn.Parameter(self.bias.detach().clone())

    def updated_bias(self) -> Tensor | None:
        """The student's bias."""
        return self.bias if self.tuned_bias is None else self.tuned_bias

    def updated_weight(self) -> Tensor:
        """What the weight quantiser sees: the base plus the adapters' update."""
        base: Tensor = self.weight if self.tuned_weight is None else self.tuned_weight
        if self.base_codes is not None:
            scale = self.weight_scale
            if self.weight_scale_dequant is not None:
                scale = self.weight_scale_dequant
            base = (self.base_codes.float() - self.weight_zero_point) * scale
        delta = self.lora_delta()
        return base if delta is None else base + delta

    def quantized_weight(self) -> Tensor:
        """`Q_w` of the updated weight, float32[N, K, ...], differentiable."""
        step, zero_point = self.weight_scale, self.weight_zero_point
        if self.alpha is None:
            return fake_quant(self.updated_weight(), step, zero_point, 0, self.weight_qmax)
        return (self._rounded_codes() - zero_point) * step

    def _rounded_codes(self) -> Tensor:
        """Codes of the updated weight under learned rounding."""
        assert self.alpha is not None
        direction = soft_direction(self.alpha) if self.soft_rounding else hard_direction(self.alpha)
        return directed_codes(
            self.updated_weight(),
            self.weight_scale,
            self.weight_zero_point,
            self.weight_qmax,
            direction,
        )

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        """The layer on quantised operands; in float inside `float_scope`.

        Args:
            x: input, batch first.
            step: index of the denoising step; by default that of the enclosing `step_scope`.
        """
        if step is None:
            step = current_step()
            if step is None:
                return self._operate(x, self.weight, self.bias)
        return self._operate(self.activation(x, step), self.quantized_weight(), self.updated_bias())

    @torch.no_grad()
    def merge(self) -> PackedWeight:
        """Fold the adapters into integer weights; what `forward` uses, as codes.

        Raises:
            NonFiniteError: the updated weight holds NaN or infinity.
        """
        weight, step = self.updated_weight(), self.weight_scale
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError("the fine-tuned weight holds NaN or infinity")
        if self.alpha is None:
            codes = quantize_codes(weight, step, self.weight_zero_point, 0, self.weight_qmax)
        else:
            codes = self._rounded_codes()
        return PackedWeight(
            codes.to(torch.uint8),
            self.weight_scale.detach().clone(),
            self.weight_zero_point.clone(),
            self.weight_bits,
        )

    def extra_repr(self) -> str:
        """Shape, bits and rank."""
        return f"{tuple(self.weight.shape)}, weight_bits={self.weight_bits}, rank={self.rank}"


class QuantLinear(QuantLayer):
    """`nn.Linear` on quantised operands; `lora_A[R, K]`, `lora_B[N, R]`."""

    kind = "linear"

    def _adapter_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_features, in_features = self.weight.shape
        return (rank, in_features), (out_features, rank)

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)


class QuantConv2d(QuantLayer):
    """`nn.Conv2d` on quantised operands; `lora_A[R, K/groups, kh, kw]`, `lora_B[N, R, 1, 1]`."""

    kind = "conv2d"

    def _take_geometry(self, source: nn.Linear | nn.Conv2d) -> None:
        assert isinstance(source, nn.Conv2d)
        self.geometry = ConvGeometry.of(source)

    def _adapter_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_channels, *rest = self.weight.shape
        return (rank, *rest), (out_channels, rank, 1, 1)

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.geometry.convolve(x, weight, bias)


class QuantProduct(nn.Module):
    """`a @ b` of two quantised activations, e.g. queries and keys (QuEST, arXiv 2402.03666).

    Args:
        table: the calibrated timesteps.
        left_bits: width of the codes of `a`.
        right_bits: width of the codes of `b`.
        zero_point_mode: see `trtq.quant.activation.ZeroPointMode`.
    """

    def __init__(
        self,
        table: TimestepTable,
        left_bits: int,
        right_bits: int,
        zero_point_mode: ZeroPointMode = "frozen",
    ) -> None:
        super().__init__()
        self.left = ActivationQuantizer(left_bits, table, zero_point_mode)
        self.right = ActivationQuantizer(right_bits, table, zero_point_mode)

    def forward(self, a: Tensor, b: Tensor, step: Step | None = None) -> Tensor:
        """a[B, ..., M, K], b[B, ..., K, N] -> [B, ..., M, N]; in float inside `float_scope`."""
        if step is None:
            step = current_step()
            if step is None:
                return a @ b
        product: Tensor = self.left(a, step) @ self.right(b, step)
        return product
