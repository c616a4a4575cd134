"""Calls of a denoiser's graph with numpy arrays, without torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trtq.engine.base import Engine, only_output

__all__ = ["GraphCall"]


class GraphCall:
    """Converts arrays to the types of a graph's inputs and runs its engine.

    Args:
        engine: engine of a graph with one output.

    Raises:
        ArtefactError: the graph does not have exactly one output.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._output = only_output(engine)
        self._dtypes = {name: spec.dtype for name, spec in engine.inputs.items()}

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Inputs by name, batch first -> the prediction in float32."""
        feeds = {
            name: inputs[name].astype(dtype, copy=False) for name, dtype in self._dtypes.items()
        }
        return self.engine.run(feeds)[self._output].astype(np.float32, copy=False)
