"""Record the inputs of layers while a pipeline runs, step by step, at the timesteps that it passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trtq.calib.calibrators import EXTREMES, RangeData
from trtq.calib.record import LayerRecorder, Recorder, Recording
from trtq.calls.recorder import RecordedCall, call_until, observed, read_timestep
from trtq.calls.user_call import UserCall, run_call
from trtq.quant.hooks import input_hooks
from trtq.quant.plan import LayerPlan
from trtq.quant.timestep import TimestepTable

__all__ = ["CalledDenoiser", "observe_pipeline", "record_calls"]


@dataclass(frozen=True)
class CalledDenoiser:
    """A denoiser whose layers are recorded.

    Attributes:
        name: name of the component.
        module: the float model; it is not changed.
        layers: layers to record, see `trtq.calib.record.record`.
        table: the calibrated timesteps.
        argument: path of the timestep in the denoiser's call.
    """

    name: str
    module: nn.Module
    layers: Sequence[LayerPlan]
    table: TimestepTable
    argument: str


@torch.no_grad()
def record_calls(
    pipeline: Any,
    denoisers: Sequence[CalledDenoiser],
    calls: Sequence[UserCall],
    numbers: Sequence[int],
    *,
    samples_per_step: int,
    seed: int,
    data: RangeData = EXTREMES,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Recording]]:
    """Record the input of every layer during calls of the pipeline.

    Each call of the pipeline has other random numbers. A call ends after the last denoiser call.

    Args:
        pipeline: diffusers pipeline.
        denoisers: the denoisers to record.
        calls: arguments of the pipeline's calls.
        numbers: number of calls of all denoisers during the calls of the pipeline; `calls[i]` makes
            `numbers[i % len(numbers)]` calls.
        samples_per_step: number of sampled values per layer and step.
        seed: seed of the random numbers and of the random samples.
        data: what else is recorded of each input, see `LayerRecorder`.
        progress: callback with the completed and the total number of pipeline calls.

    Returns:
        Recordings by denoiser and by path of the input quantiser.

    Raises:
        ArtefactError: the pipeline cannot be called.
        NonFiniteError: an input is NaN or infinite; the message names the layer.
    """
    share = -(-samples_per_step // len(calls))
    recorders = {
        part.name: LayerRecorder(
            part.layers,
            part.table,
            len(calls),
            share,
            len(calls),
            seed,
            data,
        )
        for part in denoisers
    }
    observe_pipeline(pipeline, denoisers, recorders, calls, numbers, seed=seed, progress=progress)
    return {name: recorder.recordings for name, recorder in recorders.items()}


@torch.no_grad()
def observe_pipeline(
    pipeline: Any,
    denoisers: Sequence[CalledDenoiser],
    recorders: Mapping[str, Recorder],
    calls: Sequence[UserCall],
    numbers: Sequence[int],
    *,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Let recorders observe the layers' inputs during calls of the pipeline.

    Args:
        pipeline: diffusers pipeline.
        denoisers: the denoisers to observe.
        recorders: one recorder per denoiser, by name; each call of the pipeline is a batch.
        calls: arguments of the pipeline's calls.
        numbers: see `record_calls`.
        seed: seed of the random numbers.
        progress: callback with the completed and the total number of pipeline calls.
    """
    by_name = {part.name: part for part in denoisers}

    def locate(call: RecordedCall) -> None:
        part = by_name[call.denoiser]
        timestep = read_timestep(call, part.argument)
        recorders[call.denoiser].step = int(part.table.index(timestep)[0])

    modules = {part.name: part.module for part in denoisers}
    with ExitStack() as stack:
        stack.enter_context(observed(modules, locate))
        for part in denoisers:
            recorder = recorders[part.name]
            layers = {name: part.module.get_submodule(name) for name in recorder.layers}
            stack.enter_context(input_hooks(layers, recorder.observe))
        for index, call in enumerate(calls):
            for recorder in recorders.values():
                recorder.batch = index
            call_until(
                pipeline,
                modules,
                numbers[index % len(numbers)],
                lambda call=call, index=index: run_call(  # type: ignore[misc]
                    pipeline, call, seed, "calibration", index
                ),
            )
            if progress is not None:
                progress(index + 1, len(calls))
