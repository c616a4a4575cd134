"""Inputs and outputs of onnxruntime's sessions."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from trtq.engine.base import TensorSpec
from trtq.errors import ArtefactError

__all__ = ["input_specs", "output_specs"]

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def input_specs(session: Any) -> dict[str, TensorSpec]:
    """The inputs of a session by name.

    Raises:
        ArtefactError: an input has a type that trtq does not support.
    """
    return _specs(session.get_inputs())


def output_specs(session: Any) -> dict[str, TensorSpec]:
    """The outputs of a session by name.

    Raises:
        ArtefactError: an output has a type that trtq does not support.
    """
    return _specs(session.get_outputs())


def _specs(nodes: Any) -> dict[str, TensorSpec]:
    specs = {}
    for node in nodes:
        if node.type not in _DTYPES:
            raise ArtefactError(
                f"{node.name!r} of the graph is a {node.type}, which trtq does not support; "
                f"supported are {', '.join(_DTYPES)}"
            )
        # A free axis without a name gets a name, since a spec needs one.
        sizes = tuple("?" if size is None else size for size in node.shape)
        specs[node.name] = TensorSpec(np.dtype(_DTYPES[node.type]), sizes)
    return specs
