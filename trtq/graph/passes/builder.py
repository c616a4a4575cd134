"""Builder of nodes and initialisers for an `onnx_ir` graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["GraphBuilder"]


class GraphBuilder:
    """Collects new nodes in order; the caller inserts them into the graph.

    Args:
        graph: the graph to which the initialisers are added.
        prefix: prefix of the names of all nodes and values.
        shared: prefix of the names of the initialisers; None: the same prefix.
    """

    def __init__(self, graph: ir.Graph, prefix: str, shared: str | None = None) -> None:
        self.graph = graph
        self.prefix = prefix
        self.shared = prefix if shared is None else shared
        self.nodes: list[ir.Node] = []

    def constant(self, name: str, tensor: np.ndarray | ir.TensorProtocol) -> ir.Value:
        """Add an initialiser, or reuse an existing initialiser with this name."""
        name = f"{self.shared}/{name}"
        existing = self.graph.initializers.get(name)
        if existing is not None:
            return existing
        data = ir.tensor(tensor, name=name) if isinstance(tensor, np.ndarray) else tensor
        value = ir.Value(
            name=name,
            shape=ir.Shape([int(size) for size in data.shape]),  # type: ignore[arg-type]
            type=ir.TensorType(data.dtype),
            const_value=data,
        )
        self.graph.register_initializer(value)
        return value

    def weight(
        self, name: str, compute: Callable[[], np.ndarray], shape: Sequence[int], dtype: ir.DataType
    ) -> ir.Value:
        """Add an initialiser that is computed each time it is read, or reuse one with this name.

        The graph of a large model so holds its weights as the run does, and writes one at a time.

        Args:
            name: name of the initialiser.
            compute: function that returns the tensor.
            shape: shape of the tensor.
            dtype: type of the tensor's elements.
        """

        def tensor() -> ir.TensorProtocol:
            return ir.tensor(compute(), dtype=dtype)

        full = f"{self.shared}/{name}"
        return self.constant(name, ir.LazyTensor(tensor, dtype, ir.Shape(shape), name=full))

    def op(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: dict[str, Any] | None = None,
        outputs: int = 1,
    ) -> Any:
        """Add a node of the ONNX domain, and return its output or a list of its outputs."""
        full = f"{self.prefix}/{name}"
        node = ir.node(operator, inputs, attributes or {}, num_outputs=outputs, name=full)
        for index, value in enumerate(node.outputs):
            value.name = f"{full}:{index}" if outputs > 1 else full
        self.nodes.append(node)
        return list(node.outputs) if outputs > 1 else node.outputs[0]
