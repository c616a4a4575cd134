"""A denoiser's forward that is replaced for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["replaced_forward"]


@contextmanager
def replaced_forward(
    module: nn.Module, replacement: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Inside the block, a module computes another function, with the signature of its forward.

    Args:
        module: the module; hooks and replacements that it has already stay in place.
        replacement: function that receives the module's forward and returns the new one.
    """
    patched = module.__dict__.get("forward")
    computed = replacement(module.forward)

    # Pipelines inspect the signature of their denoiser's forward.
    @functools.wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return computed(*args, **kwargs)

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if patched is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = patched
