"""The pipeline as a model of Triton's Python backend; `trtq package triton` copies this file as it is.

The server's Python needs trtq (`pip install trtq`). Inputs are named in `config.pbtxt` beside it.
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
    """What the backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the parts of the pipeline that are no graphs."""
        self.utils: Any = importlib.import_module("triton_python_backend_utils")
        version = Path(args["model_repository"]) / args["model_version"]
        self.pipeline = PackagedPipeline(version / "parts", self.utils)
        if self.pipeline.source.prompts is not None:
            _check_strings(self.utils)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request; what a request does wrong is its own error."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            images = self.pipeline.draw(
                self._subjects(request),
                seed=int(self._one(request, "seed", 0)),
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

    def _subjects(self, request: Any) -> list[str] | list[int] | int | None:
        """What a request asks for; none: nothing, which the server lets pass."""
        prompts = self._values(request, "prompt")
        if prompts is not None:
            return [_decoded(value) for value in prompts]
        labels = self._values(request, "class_label")
        return self._one(request, "count", None) if labels is None else labels

    def _values(self, request: Any, name: str) -> list[Any] | None:
        tensor = self.utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            return None
        # Strings have no DLPack form.
        array = tensor.as_numpy() if name == "prompt" else array_of(tensor)
        found: list[Any] = array.ravel().tolist()
        return found

    def _one(self, request: Any, name: str, default: Any) -> Any:
        return (self._values(request, name) or [default])[0]

    def _optional(self, request: Any, name: str, kind: type) -> Any:
        found = self._one(request, name, None)
        return None if found is None else kind(found)


def _decoded(prompt: str | bytes) -> str:
    try:
        return prompt.decode() if isinstance(prompt, bytes) else prompt
    except UnicodeDecodeError as err:
        raise UsageError(f"a prompt is not UTF-8: {err}") from err


def _check_strings(backend_utils: Any) -> None:
    """Of a server whose arrays have wrong strides, the first prompt would end the process."""
    given = np.arange(2)
    if not np.array_equal(tensor_of(backend_utils, "probe", given).as_numpy(), given):
        raise ServerError(
            f"this server's Python backend cannot read prompts with NumPy {np.__version__}: "
            "pip install 'numpy<2' into the server's Python, or take a newer server"
        )
