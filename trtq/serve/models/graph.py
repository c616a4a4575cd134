"""A denoiser's graph, called with numpy arrays and without torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trtq.engine.base import Engine, only_output

__all__ = ["GraphCall"]


class GraphCall:
    """Feeds an engine arrays of the types that its graph takes.

    Args:
        engine: of a graph with one output.

    Raises:
        ArtefactError: it has another number of them.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._output = only_output(engine)
        self._dtypes = {name: spec.dtype for name, spec in engine.inputs.items()}

    def __call__(self, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """Inputs by name, batch first -> the prediction in float32."""
        feeds = {
            name: given[name].astype(dtype, copy=False) for name, dtype in self._dtypes.items()
        }
        return self.engine.run(feeds)[self._output].astype(np.float32, copy=False)
