"""Scales and zero points of activation quantisers, from recorded inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from trtq.calib.calibrators import BY_OUTPUT, parse_calibrator
from trtq.calib.output_ranges import ranges_by_output
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
    denoiser: nn.Module | None = None,
    *,
    static: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Scales and zero points of every activation quantiser.

    Args:
        recordings: result of `record`.
        plans: layers and their bits.
        method: `minmax`, `search`, `output` or a calibrator, see `trtq.calib.histogram`; a calibrator
            clips the recorded range at its `amax`.
        denoiser: the float model, whose weights `output` needs.
        static: whether to use one entry for all steps instead of one per step.
        progress: callback with the completed and the total number of layers.

    Returns:
        `(scale[T], zero_point[T])` by path of the quantiser; T = 1 if static. Ranges contain zero, so
        float zero is a code. A layer that uses another layer's quantiser has no entry.
    """
    calibrator = parse_calibrator(method)
    # The range of a calibrator is used as it is.
    rule: Method = "search" if method in ("search", BY_OUTPUT) else "minmax"
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
                if recording.rows is not None and plan.scales == "step":
                    low, high = recording.extremes()
                    tables[path] = ranges_by_output(
                        recording.rows,
                        _weights_of_readers(plan, plans, denoiser),
                        (low.amin()[None], high.amax()[None]) if static else (low, high),
                        tables[path],
                        bits,
                        symmetric=symmetric,
                        linear=plan.kind == "linear",
                    )
    return tables


def _weights_of_readers(
    owner: LayerPlan, plans: Sequence[LayerPlan], denoiser: nn.Module | None
) -> list[Tensor]:
    """Weights of the layers that read the input of a layer."""
    assert denoiser is not None
    modules: list[Any] = [
        denoiser.get_submodule(plan.name)
        for plan in plans
        if plan.quantized and (plan.input_of or plan.name) == owner.name
    ]
    return [module.weight for module in modules]
