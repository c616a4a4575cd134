"""The settings of torch and numpy for all of trtq, regardless of the caller's settings.

Applications change the settings for their own models: `autocast`, a default dtype or device,
`inference_mode`. Under such settings loading, calibration or tracing fails or gives a different model.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import numpy as np
import torch

__all__ = ["own_settings", "with_own_settings"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_ALONE = threading.RLock()
_DEVICES = ("cpu", "cuda")


@contextmanager
def own_settings() -> Iterator[None]:
    """Inside the block, torch and numpy have the settings of a fresh process.

    The caller's stream of random numbers is as before after the block: torch draws first weights for
    each layer that is made, also where these are replaced at once.

    Only one thread at a time is inside the block, because diffusers and accelerate replace functions of
    torch while they load a model, which would affect every thread.
    """
    with _ALONE, ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for name in _DEVICES:
            if torch.is_autocast_enabled(name):
                stack.enter_context(torch.autocast(name, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        default = torch.get_default_dtype()
        if default != torch.float32:
            stack.callback(torch.set_default_dtype, default)
            torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        yield


def with_own_settings(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function to run under `own_settings`."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with own_settings():
            return function(*args, **kwargs)

    return call
