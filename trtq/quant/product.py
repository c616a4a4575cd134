"""Product of two quantised activations."""

from __future__ import annotations

from torch import Tensor, nn

from trtq.precision import ScalePolicy
from trtq.quant.activation import ActivationQuantizer, ZeroPointMode
from trtq.quant.input_transform import TransformTensors
from trtq.quant.timestep import Step, TimestepTable, current_step

__all__ = ["QuantProduct"]


class QuantProduct(nn.Module):
    """`a @ b` of two quantised activations, e.g. queries and keys (QuEST, arXiv 2402.03666).

    Args:
        table: the calibrated timesteps.
        left_bits: width of the codes of `a`, 2 .. 8.
        right_bits: width of the codes of `b`, 2 .. 8.
        zero_point_mode: see `trtq.quant.activation.ZeroPointMode`.
        scales: origin of the scales, see `trtq.quant.dynamic_scale`.
        transform: factors of the operands' channels that the weights around the product contain, see
            `trtq.quant.attention_channels`; None: unchanged. The product does not use them.
    """

    def __init__(
        self,
        table: TimestepTable,
        left_bits: int,
        right_bits: int,
        zero_point_mode: ZeroPointMode = "frozen",
        scales: ScalePolicy = "step",
        transform: TransformTensors | None = None,
    ) -> None:
        super().__init__()
        self.transform = transform
        self.left = ActivationQuantizer(left_bits, table, zero_point_mode, policy=scales)
        self.right = ActivationQuantizer(
            right_bits, table, zero_point_mode, policy=scales, row_axis="second_last"
        )

    def forward(self, a: Tensor, b: Tensor, step: Step | None = None) -> Tensor:
        """a[B, ..., M, K], b[B, ..., K, N] -> [B, ..., M, N]; in float inside `float_scope`."""
        if step is None:
            step = current_step()
            if step is None:
                return a @ b
        product: Tensor = self.left(a, step) @ self.right(b, step)
        return product
