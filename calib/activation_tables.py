"""Scales and zero points of activation quantisers, from recorded inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from trtq.calib.calibrators import parse_calibrator
from trtq.calib.record import Recording
from trtq.precision import Method
from trtq.quant.formats import format_range
from trtq.quant.plan import LayerPlan, named_errors
from trtq.quant.ranges import row_qparams

__all__ = ["activation_tables"]


def activation_tables(
    recordings: Mapping[str, Recording],
    plans: Sequence[LayerPlan],
    method: str,
    *,
    static: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Scales and zero points of every activation quantiser.

    Args:
        recordings: result of `record`.
        plans: layers and their bits.
        method: `minmax`, `search` or a calibrator, see `trtq.calib.histogram`; a calibrator clips the
            recorded range at its `amax`.
        static: whether to use one entry for all steps instead of one per step.
        progress: callback with the completed and the total number of layers.

    Returns:
        `(scale[T], zero_point[T])` by path of the quantiser; T = 1 if static. Ranges contain zero, so
        float zero is a code. A layer that uses another layer's quantiser has no entry.
    """
    calibrator = parse_calibrator(method)
    # The range of a calibrator is used as it is.
    rule: Method = "search" if method == "search" else "minmax"
    tables = {}
    quantized = [plan for plan in plans if plan.quantized and plan.input_of is None]
    for done, plan in enumerate(quantized):
        if progress is not None:
            progress(done + 1, len(quantized))
        for operand, bits in plan.operands.items():
            path = f"{plan.name}.{operand}"
            recording = recordings[path]
            if plan.format != "int":
                tables[path] = format_range(plan.format, *recording.extremes(), static=static)
                continue
            low, high, sample = recording.low, recording.high, recording.sample
            if method == "minmax":
                low, high = recording.extremes()
            if static:
                low, high, sample = low.amin()[None], high.amax()[None], sample.reshape(1, -1)
            if calibrator is not None:
                assert recording.histograms is not None
                amax = recording.histograms.amax(calibrator, bits)
                low, high = low.maximum(-amax), high.minimum(amax)
            symmetric = bits == 8 or plan.scales != "step"
            with named_errors(plan.name):
                tables[path] = row_qparams(
                    sample, low, high, bits, rule, symmetric=symmetric, contain_zero=True
                )
    return tables
