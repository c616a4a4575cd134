"""A tiny random pipeline with a user's call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["STEPS", "Case"]

STEPS = 2


@dataclass(frozen=True)
class Case:
    """A pipeline of a true class of diffusers, and how a user calls it.

    Attributes:
        title: name that people know.
        build: function that returns the pipeline with random weights.
        arguments: function that returns the arguments of the pipeline's call.
        refused: regular expression of the message with which the export refuses the pipeline, whose run
            works in torch; None for a pipeline that is exported.
        fast: whether `make test` runs the case; `make test-slow` runs the others.
    """

    title: str
    build: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    refused: str | None = None
    fast: bool = False

    def pipeline(self) -> Any:
        """The pipeline, always with the same weights."""
        with torch.random.fork_rng(devices=[]), _marked_memory():
            torch.manual_seed(0)
            pipeline = self.build()
            for component in pipeline.components.values():
                if isinstance(component, nn.Module):
                    _fill(component.eval())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def call(self) -> dict[str, Any]:
        """Arguments of the call with a number of steps and tensors as the result."""
        return {"num_inference_steps": STEPS, "output_type": "pt"} | self.arguments()


class _marked_memory:
    """Inside the block, `torch.empty` returns NaN, which `_fill` recognises."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before)


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    """Give random values to parameters that a model leaves without, or as zero matrices."""
    for parameter in module.parameters():
        matrix = parameter.ndim > 1
        if not bool(torch.isfinite(parameter).all()) or (matrix and not bool(parameter.any())):
            nn.init.normal_(parameter, std=0.1)
