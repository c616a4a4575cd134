"""How much there is to compute, and how long that must take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trtq.bench.device import Peak

__all__ = ["count_operations", "roofline"]


def count_operations(call: Callable[[], object]) -> int | None:
    """Operations in the products and convolutions of a call in torch, two for each multiplication.

    Returns:
        None if there is an operator that cannot be run without values.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    try:
        with counter:
            call()
    except (NotImplementedError, RuntimeError):
        return None
    return int(counter.get_total_flops())


def roofline(operations: int, weight_bytes: int, seconds: float, peak: Peak) -> dict[str, Any]:
    """Where a call stands under the roof (Williams 2009): the device's peak, or what memory can feed.

    Args:
        operations: of the call.
        weight_bytes: read at least once in it; activations are not counted.
        seconds: it took.
        peak: of the device.

    Returns:
        `operations`, `operations_per_byte`, `operations_per_second`, `peak_operations_per_second`,
        `peak_bytes_per_second`, `peak_share` (of the device's operations), `bound` (`compute` or
        `memory`), `roof_share` (of what that bound allows), `peak_is`.
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
