"""Write `config.pbtxt`, the configuration of a model in Triton's text format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from trtq.artefact.manifest import Manifest
from trtq.artefact.options import EngineOptions
from trtq.engine.base import TensorSpec
from trtq.graph.file import MODEL_FILE
from trtq.serve.triton.engine import ServedGraph

__all__ = ["PLAN_NAME", "write_graph_config", "write_pipeline_config"]

PLAN_NAME = "model.plan"
"""File name of an engine in a repository."""
_INSTANCES = 4
"""Number of instances of the pipeline. While the denoiser call of one instance runs, the calls of the
others wait and are batched; with two instances, one would always wait alone."""
_QUEUE_MICROSECONDS = 500
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "bool": "TYPE_BOOL",
}


def write_graph_config(
    folder: Path, graph: ServedGraph, manifest: Manifest, *, max_items: int, dynamic_batching: bool
) -> None:
    """Write the configuration of a graph's model.

    Args:
        folder: folder of the model.
        graph: the graph.
        manifest: manifest of the artefact that holds the graph or its engine.
        max_items: maximum number of items per call; 0: no batching.
        dynamic_batching: whether the server batches calls of different requests.
    """
    lines = [f"name: {_quoted(graph.model)}"]
    if isinstance(manifest.options, EngineOptions):
        lines += ['platform: "tensorrt_plan"', *_plan_lines(manifest.options)]
    else:
        lines += ['backend: "onnxruntime"', f"default_model_filename: {_quoted(MODEL_FILE)}"]
    lines.append(f"max_batch_size: {max_items}")
    lines += _tensors("input", graph.inputs, batched=graph.batched)
    lines += _tensors("output", graph.outputs, batched=graph.batched)
    if dynamic_batching:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {_QUEUE_MICROSECONDS} }}")
    _write(folder, lines)


def write_pipeline_config(folder: Path, name: str, input_name: str) -> None:
    """Write the configuration of the pipeline's model.

    Args:
        folder: folder of the model.
        name: name of the model.
        input_name: name of the conditioning input: `prompt`, `class_label` or `count`.
    """
    kind = "TYPE_STRING" if input_name == "prompt" else "TYPE_INT64"
    size = 1 if input_name == "count" else -1
    options = {"seed": "TYPE_INT64", "steps": "TYPE_INT32", "guidance": "TYPE_FP32"}
    _write(
        folder,
        [
            f"name: {_quoted(name)}",
            'backend: "python"',
            "max_batch_size: 0",
            f"input {{ name: {_quoted(input_name)} data_type: {kind} dims: [ {size} ] }}",
            *(
                f"input {{ name: {_quoted(option)} data_type: {kind} dims: [ 1 ] optional: true }}"
                for option, kind in options.items()
            ),
            'output { name: "images" data_type: TYPE_UINT8 dims: [ -1, -1, -1, -1 ] }',
            f"instance_group {{ count: {_INSTANCES} kind: KIND_CPU }}",
        ],
    )


def _plan_lines(options: EngineOptions) -> list[str]:
    """The lines that name the plan of each compute capability; all have the same file."""
    lines = [f"default_model_filename: {_quoted(PLAN_NAME)}"]
    for architecture in options.architectures or ():
        digits = architecture.removeprefix("sm")
        if digits.isdigit():
            key = _quoted(f"{digits[:-1]}.{digits[-1]}")
            lines.append(f"cc_model_filenames {{ key: {key} value: {_quoted(PLAN_NAME)} }}")
    return lines


def _tensors(direction: str, specs: Mapping[str, TensorSpec], *, batched: bool) -> list[str]:
    """The `input` or `output` lines, without the batch axis of a batched model."""
    lines = []
    for name, spec in specs.items():
        shape = [size if isinstance(size, int) else -1 for size in spec.shape]
        sizes = shape[1:] if batched else shape
        reshape = "" if sizes else " reshape { shape: [ ] }"
        dims = ", ".join(str(size) for size in sizes or [1])
        kind = _TYPES[spec.dtype.name]
        lines.append(
            f"{direction} {{ name: {_quoted(name)} data_type: {kind} dims: [ {dims} ]{reshape} }}"
        )
    return lines


def _quoted(text: str) -> str:
    return json.dumps(text)


def _write(folder: Path, lines: list[str]) -> None:
    (folder / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")
