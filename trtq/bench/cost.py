"""Operation counts and the roofline model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypedDict

from trtq.bench.device import Peak

__all__ = ["Roofline", "count_operations", "roofline"]


class Roofline(TypedDict):
    """Position of a call under the device's roofline.

    Attributes:
        operations: number of operations in the call.
        operations_per_byte: number of operations per byte of weights.
        operations_per_second: measured number of operations per second.
        peak_operations_per_second: maximum number of operations per second of the device.
        peak_bytes_per_second: peak memory bandwidth of the device, in bytes per second.
        peak_share: measured rate divided by the peak rate.
        bound: the limiting resource.
        roof_share: measured rate divided by the rate that the limiting resource allows.
        peak_is: source of the peak values.
    """

    operations: int
    operations_per_byte: float
    operations_per_second: float
    peak_operations_per_second: float
    peak_bytes_per_second: float
    peak_share: float
    bound: Literal["compute", "memory"]
    roof_share: float
    peak_is: str


def count_operations(call: Callable[[], object]) -> int | None:
    """Count the operations in matrix products and convolutions of a torch call, two per multiplication.

    Returns:
        The number of operations, or None if an operator cannot run without values.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    try:
        with counter:
            call()
    except (NotImplementedError, RuntimeError):
        return None
    return int(counter.get_total_flops())


def roofline(operations: int, weight_bytes: int, seconds: float, peak: Peak) -> Roofline:
    """Compare a call with the roofline (Williams 2009): the compute peak or the memory bandwidth.

    Args:
        operations: number of operations in the call.
        weight_bytes: size of the weights, which a call reads once, in bytes; activations are not
            counted.
        seconds: duration of the call, in seconds.
        peak: peak values of the device.
    """
    compute, memory = operations / peak.operations, weight_bytes / peak.bytes
    return {
        "operations": operations,
        "operations_per_byte": operations / max(weight_bytes, 1),
        "operations_per_second": operations / seconds,
        "peak_operations_per_second": peak.operations,
        "peak_bytes_per_second": peak.bytes,
        "peak_share": compute / seconds,
        "bound": "compute" if compute >= memory else "memory",
        "roof_share": max(compute, memory) / seconds,
        "peak_is": peak.what,
    }
