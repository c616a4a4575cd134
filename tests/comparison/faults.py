"""Faults that are planted into one layer of an exported graph."""

import json
import shutil

import numpy as np
import onnx
from onnx import numpy_helper

from trtq.artefact.files import sha256

LAYER = "down_blocks.1.resnets.0.conv1"


class _Graph:
    def __init__(self, model):
        self.model = model

    def node(self, name):
        return next(node for node in self.model.graph.node if node.name == name)

    def source(self, value):
        """The node that computes a value, and which of its outputs the value is."""
        node = next(node for node in self.model.graph.node if value in node.output)
        return node, list(node.output).index(value)

    def constant(self, name):
        tensor = next(t for t in self.model.graph.initializer if t.name == name)
        return tensor, numpy_helper.to_array(tensor).copy()


def _store(tensor, array):
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def scale(graph, factor=1.01):
    """The scale of the layer's output x 1.01, at every step."""
    split, place = graph.source(graph.node(f"{LAYER}/rescaled").input[1])
    _, sizes = graph.constant(split.input[1])
    tensor, weights = graph.constant(f"steps/weights_{split.name.rpartition('_')[2]}")
    first = int(sizes[:place].sum())
    weights[..., first : first + int(sizes[place])] *= np.float32(factor)
    _store(tensor, weights)


def doubled(graph):
    """The scale of the layer's output x 2, at every step."""
    scale(graph, 2.0)


def zero_point(graph):
    """The zero point of one output channel's weights is one too large."""
    tensor, values = graph.constant(f"{LAYER}/weight_zero_point")
    values.flat[0] += 1
    _store(tensor, values)


def gather_row(graph):
    """The layer's scales of the first two steps are swapped in the table from which a Gather reads."""
    split, place = graph.source(graph.node(f"{LAYER}/scaled").input[1])
    unsqueeze, _ = graph.source(split.input[0])
    groups, group = graph.source(unsqueeze.input[0])
    assert groups.name == "steps/groups"
    _, sizes = graph.constant("steps/group_sizes")
    column = int(sizes[:group].sum()) + place
    tensor, table = graph.constant("steps/table")
    assert table[0, column] != table[1, column]
    table[[0, 1], column] = table[[1, 0], column]
    _store(tensor, table)


FAULTS = (scale, zero_point, gather_row)


def plant(folder, copy, fault):
    """A copy of an ONNX folder with a fault in its graph, and the hashes that belong to it."""
    shutil.copytree(folder, copy)
    path = copy / "unet" / "model.onnx"
    model = onnx.load(path)
    fault(_Graph(model))
    (copy / "unet" / "model.onnx_data").unlink()
    onnx.save(
        model,
        path,
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=1 << 10,
    )
    record = json.loads((copy / "manifest.json").read_text())
    for name in ("unet/model.onnx", "unet/model.onnx_data"):
        record["files"][name] = sha256(copy / name)
    (copy / "manifest.json").write_text(json.dumps(record))
    return copy
