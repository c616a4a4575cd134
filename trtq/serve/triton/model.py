"""The pipeline as a model of Triton's Python backend.

Repositories import this class by its stable name in `trtq.serve.triton.v1`. The names of the inputs are
in the model's `config.pbtxt`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from trtq.errors import CancelledError, ServerError, TrtqError, UsageError
from trtq.serve.triton.engine import array_of, tensor_of
from trtq.serve.triton.pipeline import PackagedPipeline

__all__ = ["TritonPythonModel"]


class TritonPythonModel:
    """The class that Triton's Python backend instantiates."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the components of the pipeline that are not graphs.

        Args:
            args: arguments of the backend, among them the paths of the repository and the version.
        """
        self.utils: Any = importlib.import_module("triton_python_backend_utils")
        version = Path(args["model_repository"]) / args["model_version"]
        self.pipeline = PackagedPipeline(version / "parts", self.utils)
        if self.pipeline.source.prompts is not None:
            _check_strings(self.utils)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request; an invalid request gets its own error response."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            images = self.pipeline.draw(
                self._conditioning(request),
                seed=int(self._first(request, "seed", 0)),
                steps=self._optional(request, "steps", int),
                guidance=self._optional(request, "guidance", float),
                cancelled=request.is_cancelled,
            )
        except TrtqError as err:
            return self.utils.InferenceResponse(error=self._error(err))
        return self.utils.InferenceResponse([tensor_of(self.utils, "images", images)])

    def _error(self, err: TrtqError) -> Any:
        kind = self.utils.TritonError
        if isinstance(err, CancelledError):
            return kind(str(err), kind.CANCELLED)
        return kind(str(err), kind.INVALID_ARG if isinstance(err, UsageError) else kind.INTERNAL)

    def _conditioning(self, request: Any) -> list[str] | list[int] | int | None:
        """The prompts, classes or number of images; None if the request has no such input."""
        prompts = self._values(request, "prompt")
        if prompts is not None:
            return [_decoded(value) for value in prompts]
        labels = self._values(request, "class_label")
        return self._first(request, "count", None) if labels is None else labels

    def _values(self, request: Any, name: str) -> list[Any] | None:
        tensor = self.utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            return None
        # DLPack does not support strings.
        array = tensor.as_numpy() if name == "prompt" else array_of(tensor)
        values: list[Any] = array.ravel().tolist()
        return values

    def _first(self, request: Any, name: str, default: Any) -> Any:
        return (self._values(request, name) or [default])[0]

    def _optional(self, request: Any, name: str, kind: type) -> Any:
        value = self._first(request, name, None)
        return None if value is None else kind(value)


def _decoded(prompt: str | bytes) -> str:
    try:
        return prompt.decode() if isinstance(prompt, bytes) else prompt
    except UnicodeDecodeError as err:
        raise UsageError(f"a prompt is not UTF-8: {err}") from err


def _check_strings(backend_utils: Any) -> None:
    """Raise unless the server can read prompts; otherwise the first prompt would end the process.

    Raises:
        ServerError: arrays from the server have wrong strides.
    """
    probe = np.arange(2)
    if not np.array_equal(tensor_of(backend_utils, "probe", probe).as_numpy(), probe):
        raise ServerError(
            f"this server's Python backend cannot read prompts with NumPy {np.__version__}: "
            "pip install 'numpy<2' into the server's Python, or use a newer server"
        )
