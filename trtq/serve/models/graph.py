"""Calls of a denoiser's graph with the samples of the server, without torch if they are arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trtq.engine.base import Engine, only_output
from trtq.serve.models.samples import Samples

__all__ = ["GraphCall"]


class GraphCall:
    """Converts samples to the types of a graph's inputs and runs its engine.

    Args:
        engine: engine of a graph with one output.

    Raises:
        ArtefactError: the graph does not have exactly one output.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._output = only_output(engine)
        self._dtypes = {name: spec.dtype for name, spec in engine.inputs.items()}

    def __call__(self, inputs: Mapping[str, Samples]) -> Samples:
        """Inputs by name, batch first -> the prediction in float32, of the kind of the inputs.

        Tensors are bound by their addresses, and the prediction is a tensor where the graph computes.
        """
        first = next(iter(inputs.values()))
        if not isinstance(first, np.ndarray):
            given = {name: inputs[name] for name in self._dtypes}
            return self.engine.run_tensors(given)[self._output].float()
        feeds = {
            name: inputs[name].astype(dtype, copy=False) for name, dtype in self._dtypes.items()
        }
        return self.engine.run(feeds)[self._output].astype(np.float32, copy=False)
