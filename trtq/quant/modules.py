"""Base class of layers on fake-quantised operands, with QALoRA adapters inside the weight.

QALoRA (EfficientDM, arXiv 2310.03270, eq. 6) adds its adapters to the weight *before* quantisation, so
training ends with a single low-bit weight:

    Wq = Q_w(W0 + B A)         base "fp", the paper's formula
    Wq = Q_w((q0 - z) d + B A) base "int", as released; q0 are the codes of W0

Letters: N, K out / in features or channels, R rank, B images.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from trtq.bits import symmetric_weights
from trtq.errors import NonFiniteError
from trtq.precision import Method, ScalePolicy
from trtq.quant.activation import ActivationQuantizer, ZeroPointMode
from trtq.quant.adaround import directed_codes, hard_direction, soft_direction
from trtq.quant.branch import DecayingBranch
from trtq.quant.dynamic_scale import RowAxis
from trtq.quant.fake_quant import fake_quant, quantize_codes
from trtq.quant.geometry import ConvGeometry, FloatLayer, set_sizes
from trtq.quant.input_transform import InputTransform
from trtq.quant.packing import PackedWeight
from trtq.quant.ranges import weight_qparams
from trtq.quant.stored_weight import has_stored_weight, share_weight
from trtq.quant.timestep import Step, TimestepTable, current_step

__all__ = ["Base", "QuantLayer"]

Base = Literal["fp", "int"]


class QuantLayer(nn.Module):
    """Base class of `QuantLinear` and `QuantConv`, see `trtq.quant.layers`.

    The frozen float weight stays in the layer: inside `float_scope` the layer computes as the teacher.

    Args:
        source: float layer; its parameters are shared, not copied.
        table: the calibrated timesteps.
        weight_bits: width of the weight codes; see `trtq.bits.symmetric_weights`.
        activation_bits: width of the activation codes.
        rank: rank R of the adapters; 0: no adapters.
        base: operand to which the adapters are added, see the module docstring.
        weight_method: method that determines the weight ranges.
        zero_point_mode: see `trtq.quant.activation.ZeroPointMode`.
        split_scale: whether, with base "int", the dequantiser's scale is a second parameter in the same
            memory, so that an optimiser updates it twice, as in the released code.
        split_step: former name of `split_scale`, accepted for one release.
        scales: origin of the activation's scale, see `trtq.quant.dynamic_scale`.
        generator: random generator for the initial `lora_A`; None: torch's default generator.

    Attributes:
        weight: float weight `W0`, `[N, K, ...]`, frozen and shared with the source layer.
        bias: frozen float bias, `[N]`, or None.
        lora_A: first adapter, `[R, K, ...]`; None if the rank is 0.
        lora_B: second adapter, `[N, R, ...]`; None if the rank is 0.
        weight_scale: parameter `[N, 1, ...]`, the scales `d`.
        weight_zero_point: buffer `[N, 1, ...]`, the zero points `z`, integers.
        tuned_weight: trained weight that replaces `W0`, see `tune`; None before `tune`.
        tuned_bias: trained bias that replaces `bias`; None before `tune` or without a bias.
        alpha: learned rounding, shaped like the weight, see `trtq.quant.adaround`; None: to nearest.
        soft_rounding: whether the rounding directions are soft.
        activation: quantiser of the input.
        branch: float branch that training adds to the quantised weight; None outside of training.
        input_transform: transform of the input before the quantiser, which `weight` contains already;
            None: the input is not transformed.

    Raises:
        NonFiniteError: the weight or bias holds NaN or infinity.
    """

    kind: ClassVar[Literal["linear", "conv1d", "conv2d", "conv3d"]]
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
    branch: DecayingBranch | None
    input_transform: InputTransform | None

    def __init__(
        self,
        source: FloatLayer,
        table: TimestepTable,
        *,
        weight_bits: int = 4,
        activation_bits: int = 4,
        rank: int = 0,
        base: Base = "fp",
        weight_method: Method = "minmax",
        zero_point_mode: ZeroPointMode = "frozen",
        split_scale: bool = False,
        split_step: bool = False,
        scales: ScalePolicy = "step",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        # A stored weight is read once.
        weight = source.weight
        for tensor in (weight, source.bias):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError("the weight or bias holds NaN or infinity")
        set_sizes(self, weight.shape, self._take_geometry(source))
        self.weight = cast(nn.Parameter, weight)
        self.bias = cast("nn.Parameter | None", source.bias)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        self.weight_bits = weight_bits
        self.weight_qmax = 2**weight_bits - 1
        self.base: Base = base
        self.rank = rank
        self._quantize_weight(weight_method, split_scale or split_step)
        self.scales: ScalePolicy = scales
        self.activation = self._make_activation(activation_bits, table, zero_point_mode)
        self.register_module("input_transform", getattr(source, "input_transform", None))
        self.register_module("branch", None)
        self.register_parameter("tuned_weight", None)
        self.register_parameter("tuned_bias", None)
        self.register_parameter("alpha", None)
        self.soft_rounding = False
        self._add_adapters(generator)
        if has_stored_weight(source):
            share_weight(source, self)

    def _make_activation(
        self, bits: int, table: TimestepTable, mode: ZeroPointMode
    ) -> ActivationQuantizer:
        """The quantiser of the input."""
        rows: RowAxis = "last" if self.kind == "linear" else "image"
        return ActivationQuantizer(bits, table, mode, policy=self.scales, row_axis=rows)

    def _weight_range(self, method: Method) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the weight."""
        return weight_qparams(
            self.weight,
            self.weight_bits,
            method,
            symmetric=symmetric_weights(self.weight_bits),
            contain_zero=True,
        )

    def weight_level(self) -> float:
        """Mean distance of neighbouring weight levels, the unit of learning rates."""
        return float(self.weight_scale.detach().mean())

    def spread(self, values: Tensor) -> Tensor:
        """Scales or zero points, shaped to broadcast over the weight; differentiable."""
        return values

    def _quantize_weight(self, method: Method, split_scale: bool) -> None:
        """Set the scale and zero point of the weight and, with base "int", its codes."""
        scale, zero_point = self._weight_range(method)
        self.weight_scale = nn.Parameter(scale)
        self.register_buffer("weight_zero_point", zero_point)
        codes, integer = None, self.base == "int"
        if integer:
            ranges = self.spread(scale), self.spread(zero_point)
            codes = quantize_codes(self.weight, *ranges, 0, self.weight_qmax)
        self.register_buffer("base_codes", None if codes is None else codes.to(torch.uint8))
        self.register_buffer("base_scale", scale.clone() if integer else None)
        self.weight_scale_dequant = (
            nn.Parameter(self.weight_scale.data) if split_scale and integer else None
        )

    def _add_adapters(self, generator: torch.Generator | None) -> None:
        """Create `lora_A` (uniform) and `lora_B` (zero) unless the rank is 0."""
        if not self.rank:
            self.register_parameter("lora_A", None)
            self.register_parameter("lora_B", None)
            return
        a, b = self._adapter_shapes(self.rank)
        bound = 1 / math.sqrt(math.prod(self.weight.shape[1:]))
        self.lora_A = nn.Parameter(torch.empty(a).uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(b))

    def _take_geometry(self, source: FloatLayer) -> ConvGeometry | None:
        """Keep and return the geometry that `_operate` needs; None: a linear layer, which has none."""
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale_dequant is not None:
            # Both parameters must share their memory, even after a move to another device.
            self.weight_scale_dequant.data = self.weight_scale.data
        return self

    @abstractmethod
    def _adapter_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of `lora_A` and `lora_B`."""

    @abstractmethod
    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the float operation to any weight and bias."""

    def lora_delta(self) -> Tensor | None:
        """The update `B A`, shaped like the weight; None without adapters."""
        if self.lora_A is None or self.lora_B is None:
            return None
        product = self.lora_B.flatten(1) @ self.lora_A.flatten(1)
        return product.reshape(self.weight.shape)

    def tune(self) -> None:
        """Add a trainable copy of weight and bias for the student (QuEST)."""
        self.tuned_weight = nn.Parameter(self.weight.detach().clone())
        if self.bias is not None:
            self.tuned_bias = nn.Parameter(self.bias.detach().clone())

    def updated_bias(self) -> Tensor | None:
        """The student's bias."""
        return self.bias if self.tuned_bias is None else self.tuned_bias

    def updated_weight(self) -> Tensor:
        """Input of the weight quantiser: the base plus the adapters' update."""
        base: Tensor = self.weight if self.tuned_weight is None else self.tuned_weight
        if self.base_codes is not None:
            scale = self.weight_scale
            if self.weight_scale_dequant is not None:
                scale = self.weight_scale_dequant
            base = (self.base_codes.float() - self.spread(self.weight_zero_point)) * self.spread(
                scale
            )
        delta = self.lora_delta()
        return base if delta is None else base + delta

    def quantized_weight(self) -> Tensor:
        """`Q_w` of the updated weight, float32[N, K, ...], differentiable."""
        scale, zero_point = self.spread(self.weight_scale), self.spread(self.weight_zero_point)
        if self.alpha is None:
            return fake_quant(self.updated_weight(), scale, zero_point, 0, self.weight_qmax)
        return (self._rounded_codes() - zero_point) * scale

    def _rounded_codes(self) -> Tensor:
        """Codes of the updated weight under learned rounding."""
        assert self.alpha is not None
        direction = soft_direction(self.alpha) if self.soft_rounding else hard_direction(self.alpha)
        return directed_codes(
            self.updated_weight(),
            self.spread(self.weight_scale),
            self.spread(self.weight_zero_point),
            self.weight_qmax,
            direction,
        )

    def forward(self, input: Tensor, step: Step | None = None) -> Tensor:
        """The layer on quantised operands; in float inside `float_scope`.

        Args:
            input: input, with the rows of `step` first; named as in `nn.Linear`.
            step: index of the denoising step, one for all rows or one per row; default: the step of the
                enclosing `step_scope`.
        """
        if self.input_transform is not None:
            input = self.input_transform(input)
        if step is None:
            step = current_step()
            if step is None:
                return self._operate(input, self.weight, self.bias)
        weight = self.quantized_weight()
        if self.branch is not None:
            weight = weight + self.branch()
        return self._operate(self.activation(input, step), weight, self.updated_bias())

    @torch.no_grad()
    def merge(self) -> PackedWeight:
        """The weight that `forward` uses, as integers, with the adapters merged.

        Raises:
            NonFiniteError: the updated weight holds NaN or infinity.
        """
        weight, scale = self.updated_weight(), self.spread(self.weight_scale)
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError("the fine-tuned weight holds NaN or infinity")
        if self.alpha is None:
            zero_point = self.spread(self.weight_zero_point)
            codes = quantize_codes(weight, scale, zero_point, 0, self.weight_qmax)
        else:
            codes = self._rounded_codes()
        return self._packed(codes.to(torch.uint8))

    def _packed(self, codes: Tensor) -> PackedWeight:
        """The weight with these codes, uint8 `[N, K, ...]`."""
        return PackedWeight.of(
            codes,
            self.weight_scale.detach().clone(),
            self.weight_zero_point.clone(),
            self.weight_bits,
        )

    def extra_repr(self) -> str:
        """Shape, bits and rank."""
        return f"{tuple(self.weight.shape)}, weight_bits={self.weight_bits}, rank={self.rank}"
