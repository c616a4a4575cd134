"""Where the inputs and outputs of an onnxruntime session lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["HOST", "Place", "place_of"]


@dataclass(frozen=True)
class Place:
    """The memory in which a session's inputs and outputs lie.

    Attributes:
        device: torch's name of the memory.
        name: onnxruntime's name of the memory, e.g. `cpu` or `cuda`.
        index: number of the device.
        uploads: whether the session computes on a device that torch cannot reach: onnxruntime then
            copies an input at the moment when it is bound, and an output after each run.
    """

    device: torch.device
    name: str = "cpu"
    index: int = 0
    uploads: bool = False

    def wait(self) -> None:
        """Wait until torch has written the inputs: onnxruntime computes on a stream of its own.

        onnxruntime itself waits for its stream at the end of each run.
        """
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


HOST = Place(torch.device("cpu"))
"""The host's memory, for sessions that compute on the CPU."""


def place_of(on_gpu: bool) -> Place:
    """The memory for a session's tensors: the GPU's if the session and torch both use it.

    Args:
        on_gpu: whether the session computes on an NVIDIA GPU.
    """
    if not on_gpu:
        return HOST
    if torch.cuda.is_available():
        return Place(torch.device("cuda", 0), "cuda")
    return Place(torch.device("cpu"), uploads=True)
