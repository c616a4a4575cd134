"""The pipeline as a model of Triton's Python backend; `trtq package triton` copies this file as it is.

The server's Python needs trtq (`pip install trtq`). Inputs are named in `config.pbtxt` beside it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from trtq.errors import TrtqError
from trtq.stages.triton_pipeline import PackagedPipeline

__all__ = ["TritonPythonModel"]


class TritonPythonModel:
    """What the backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the parts of the pipeline that are no graphs."""
        self.utils: Any = importlib.import_module("triton_python_backend_utils")
        version = Path(args["model_repository"]) / args["model_version"]
        self.pipeline = PackagedPipeline(version / "parts", self.utils)

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
            )
        except TrtqError as err:
            return self.utils.InferenceResponse(error=self.utils.TritonError(str(err)))
        return self.utils.InferenceResponse([self.utils.Tensor("images", images)])

    def _subjects(self, request: Any) -> list[str] | list[int] | int:
        prompts = self._values(request, "prompt")
        if prompts is not None:
            return [value.decode() if isinstance(value, bytes) else value for value in prompts]
        labels = self._values(request, "class_label")
        return int(self._one(request, "count", 1)) if labels is None else labels

    def _values(self, request: Any, name: str) -> list[Any] | None:
        tensor = self.utils.get_input_tensor_by_name(request, name)
        found: list[Any] | None = None if tensor is None else tensor.as_numpy().ravel().tolist()
        return found

    def _one(self, request: Any, name: str, default: Any) -> Any:
        return (self._values(request, name) or [default])[0]

    def _optional(self, request: Any, name: str, kind: type) -> Any:
        found = self._one(request, name, None)
        return None if found is None else kind(found)
