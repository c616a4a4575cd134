"""Prepared graphs, and the rewriting that makes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trtq.engine.base import TensorSpec, graph_specs, specs_from_json, specs_to_json
from trtq.errors import ArtefactError

__all__ = ["OnCpu", "PreparedGraph", "prepare_in_process"]

OnCpu = Literal["onnxruntime", "openvino"]


@dataclass(frozen=True)
class PreparedGraph:
    """The input of a session; external data stay in the folder of the exported graph.

    Attributes:
        model: the serialised graph. For OpenVINO every axis of an input has the name `INPUT.AXIS`, so
            that a session can set its size, and no other value has a shape.
        inputs: inputs of the exported graph by name.
        outputs: outputs of the exported graph by name.
        metadata: metadata of the graph's file.
    """

    model: bytes
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]

    def record(self) -> dict[str, Any]:
        """Everything except the graph, and the graph's SHA-256, as JSON."""
        return {
            "sha256": hashlib.sha256(self.model).hexdigest(),
            "inputs": specs_to_json(self.inputs),
            "outputs": specs_to_json(self.outputs),
            "metadata": dict(self.metadata),
        }

    @classmethod
    def of_record(cls, model: bytes, record: Mapping[str, Any]) -> PreparedGraph | None:
        """Restore a graph from a `record`; None if it is damaged or belongs to another graph."""
        try:
            if hashlib.sha256(model).hexdigest() != record["sha256"]:
                return None
            inputs, outputs = (specs_from_json(record[key]) for key in ("inputs", "outputs"))
            return cls(model, inputs, outputs, record["metadata"])
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


def prepare_in_process(path: Path, runtime: OnCpu) -> PreparedGraph:
    """Rewrite a graph for a runtime in this process; imports onnx_ir and torch.

    Args:
        path: file of the exported graph, in one folder with its external data.
        runtime: runtime that is to run the graph.

    Returns:
        The rewritten graph.

    Raises:
        ArtefactError: the graph cannot be read or rewritten.
    """
    import onnx_ir as ir

    from trtq.graph.runtimes.prepare import load_graph, prepare

    model = prepare(load_graph(path), runtime)
    graph = model.graph
    inputs, outputs = graph_specs(graph.inputs), graph_specs(graph.outputs)
    if runtime == "openvino":
        # Shapes of the general graph would contradict the sizes that a session sets.
        for value in [*graph.outputs, *(value for node in graph for value in node.outputs)]:
            value.shape = None
        for value in graph.inputs:
            axes = range(len(inputs[value.name or ""].shape))
            value.shape = ir.Shape([f"{value.name}.{axis}" for axis in axes])
    try:
        serialized = ir.to_proto(model).SerializeToString()
    except Exception as err:  # protobuf's EncodeError has no public base.
        reason = " ".join(str(err).split()) or type(err).__name__
        raise ArtefactError(f"cannot rewrite {path} for {runtime}: {reason}") from err
    return PreparedGraph(serialized, inputs, outputs, dict(model.metadata_props))
