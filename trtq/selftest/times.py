"""Stage 6: what the machine can do at best, and the times of the benchmark's layers, part by part."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch

from trtq.bench.device import Nvml
from trtq.bench.kernel_operands import FORMS, SHAPES, Shape, draw_operands, expected
from trtq.bench.kernels import (
    half_precision_call,
    layer_plan,
    planned_launches,
    round_seconds,
    starts,
)
from trtq.plugins.device import current_device
from trtq.plugins.tile_choice import Plan
from trtq.plugins.variants import TILES, fits
from trtq.selftest.machine import gpu_row
from trtq.selftest.predicted import predict_row
from trtq.selftest.record import TimeRow
from trtq.selftest.torch_gpu import require_torch
from trtq.selftest.trials import Options, Outcome, SkippedError, Trial

__all__ = ["measure_layer", "trials"]

_COPIED_BYTES, _SIDE = 1 << 29, 8192
"""Bytes of the copy, and side of the matrices of the products."""


def trials(options: Options) -> Iterator[Trial]:
    """The limits of the machine, then one trial per layer and form."""
    try:
        require_torch()
    except SkippedError:
        yield Trial("torch", lambda: require_torch() and None)
        return
    yield Trial("bandwidth", _bandwidth)
    yield Trial("half-precision product", partial(_product, integers=False))
    yield Trial("int8 product of cuBLAS", partial(_product, integers=True))
    for shape in SHAPES:
        for form in FORMS:
            yield Trial(f"{form} at {shape.text}", partial(measure_layer, shape, form))


def _median(calls: list[Callable[[], object]]) -> list[float]:
    """Median seconds of each call, in interleaved rounds."""
    return [statistics.median(row) for row in round_seconds(calls)]


def _bandwidth() -> Outcome:
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    (seconds,) = _median([lambda: target.copy_(source)])
    return Outcome({"gigabytes_per_second": round(2 * _COPIED_BYTES / seconds / 1e9, 1)})


def _product(*, integers: bool) -> Outcome:
    size = (_SIDE, _SIDE)
    if integers:
        left = torch.randint(-128, 128, size, dtype=torch.int8, device="cuda")
        call = lambda: torch._int_mm(left, left.t())  # noqa: E731
    else:
        left = torch.randn(size, dtype=torch.float16, device="cuda")
        call = lambda: torch.mm(left, left.t())  # noqa: E731
    (seconds,) = _median([call])
    return Outcome({"tera_operations_per_second": round(2 * _SIDE**3 / seconds / 1e12, 1)})


@cache
def _nvml() -> Nvml:
    return Nvml()


def measure_layer(shape: Shape, form: str) -> Outcome:
    """Check a layer value by value, then time its parts, each tile, and the layer in half precision."""
    index = torch.cuda.current_device()
    gpu = current_device(index)
    operands = draw_operands(shape, form, torch.device("cuda"))
    wrong = int((operands.call() != expected(operands)).sum())
    plan = layer_plan(operands, gpu)
    launches, memory = planned_launches(operands, gpu, plan)
    calls: list[Callable[[], object]] = [operands.call, half_precision_call(operands)]
    calls += starts(launches, gpu)
    tiles = [tile for tile in TILES if fits(tile, gpu.architecture)]
    for tile in tiles:
        tiled, kept = planned_launches(operands, gpu, Plan(tile))
        memory += kept
        calls += starts(tiled[-1:], gpu)
    both, half, quantise, product, *others = (1e6 * seconds for seconds in _median(calls))
    row = gpu_row(0)
    predicted = predict_row(row, shape.text, form)
    state: dict[str, Any] = dict(_nvml().state)
    times = TimeRow(
        model=shape.model,
        shape=shape.text,
        form=form,
        tile=f"{plan.tile.m}x{plan.tile.n}",
        splits=plan.splits,
        wrong_values=wrong,
        both=round(both, 2),
        quantise=round(quantise, 2),
        product=round(product, 2),
        half=round(half, 2),
        tiles={
            f"{tile.m}x{tile.n}": round(value, 2) for tile, value in zip(tiles, others, strict=True)
        },
        predicted_quantise=predicted and round(predicted.quantise_microseconds, 2),
        predicted_product=predicted and round(predicted.product_microseconds, 2),
        predicted_half=predicted and round(predicted.fp16_microseconds, 2),
        state=state,
    )
    fault = f"{wrong} values differ from the layer's definition" if wrong else None
    return Outcome(fault=fault, sections={"rows": [times.model_dump()]})
