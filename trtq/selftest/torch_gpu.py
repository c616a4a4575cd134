"""torch on the GPU, for the stages that need it."""

from __future__ import annotations

from typing import Any

from trtq.selftest.trials import SkippedError

__all__ = ["require_torch"]


def require_torch() -> Any:
    """The module torch, which sees the GPU.

    Raises:
        SkippedError: torch was built without CUDA, or it finds no GPU.
    """
    import torch

    if torch.version.cuda is None:
        raise SkippedError(
            f"torch {torch.__version__} was built without CUDA; install torch with CUDA, on Linux: "
            "pip install --force-reinstall torch"
        )
    if not torch.cuda.is_available():
        raise SkippedError(
            f"torch {torch.__version__} with CUDA {torch.version.cuda} finds no GPU; install the torch "
            "that fits the driver"
        )
    return torch
