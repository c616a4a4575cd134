"""SNR of low-bit denoisers against the float ones inside the pipeline's own call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trtq.calls.form import result_tensors
from trtq.calls.user_call import UserCall, run_call
from trtq.snr import snr_db

__all__ = ["KeptCall", "calls_snr_db", "keep_calls"]


@dataclass(frozen=True)
class KeptCall:
    """One call of a denoiser.

    Attributes:
        denoiser: name of the component.
        args: positional arguments.
        kwargs: keyword arguments.
        result: tensors of the result.
    """

    denoiser: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Sequence[Tensor]


def keep_calls(pipeline: Any, names: Sequence[str], call: UserCall) -> list[KeptCall]:
    """Call a pipeline and keep all calls of its denoisers.

    Args:
        pipeline: diffusers pipeline.
        names: names of the denoisers.
        call: the user's call.

    Raises:
        ArtefactError: the pipeline cannot be called.
    """
    kept: list[KeptCall] = []

    def hook(name: str) -> Any:
        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            kept.append(KeptCall(name, args, kwargs, list(result_tensors(result))))

        return after

    with ExitStack() as stack:
        for name in names:
            module = getattr(pipeline, name)
            handle = module.register_forward_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        run_call(pipeline, call, 0, "requantize")
    return kept


@torch.no_grad()
def calls_snr_db(calls: Sequence[KeptCall], denoisers: Mapping[str, nn.Module]) -> float:
    """SNR in dB of denoisers against kept calls, over the results of all calls together.

    Args:
        calls: calls of the float denoisers.
        denoisers: low-bit denoisers by name.
    """
    expected, given = [], []
    for call in calls:
        result = denoisers[call.denoiser](*call.args, **call.kwargs)
        expected += [tensor.flatten().float() for tensor in call.result]
        given += [tensor.flatten().float() for tensor in result_tensors(result)]
    return snr_db(torch.cat(expected), torch.cat(given))
