"""Matches what stands in front of a low-bit layer and can become part of its plugin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from trtq.graph.runtimes.fused_nodes import Part, PluginNode

__all__ = ["Prologue", "match_prologue", "step_factor", "step_silu"]


@dataclass
class Prologue:
    """What precedes the codes of a layer.

    Attributes:
        part: the matched nodes, and the value in front of them.
        changes: fields of `trtq.plugins.fused.attributes.Fusion` that change.
        scale: scale of each channel.
        shift: shift of each channel.
        factor: factor of each channel, behind SiLU.
        epsilon: epsilon of the norm.
        image_shift: values that are added to each image's channels, `[B, C]`.
        shapes: nodes that read only the shape of a value.
    """

    part: Part
    changes: dict[str, Any] = field(default_factory=dict)
    scale: np.ndarray | float = 1.0
    shift: np.ndarray | float = 0.0
    factor: np.ndarray | float = 1.0
    epsilon: float = 0.0
    image_shift: ir.Value | None = None
    shapes: set[ir.Node] = field(default_factory=set)


def match_prologue(plugin: PluginNode) -> Prologue | None:
    """What precedes a layer; None: nothing that its plugin computes."""
    channels, axis = plugin.layer.channels, -1 if plugin.rows else 1
    part = Part(plugin.x)
    factor = step_factor(part, channels, axis=axis)
    prologue = Prologue(part, factor=1.0 if factor is None else factor)
    start = part.value
    if step_silu(part):
        prologue.changes["activated"] = True
    for match in (_gated, _layer_norm, _heads) if plugin.rows else (_group_norm,):
        trial = part.copy()
        if match(trial, prologue, plugin):
            part.value, part.nodes = trial.value, trial.nodes
            break
    if part.value is plugin.x or (part.value is start and factor is None):
        return None
    if part.is_private(plugin.node, prologue.shapes):
        return prologue
    if factor is None:
        return None
    only = Part(plugin.x)
    step_factor(only, channels, axis=axis)
    return Prologue(only, factor=factor) if only.is_private(plugin.node) else None


def step_factor(part: Part, channels: int, *, axis: int) -> np.ndarray | None:
    """Step over a Mul by constants per channel, and return them as `[C]`."""
    trial = part.copy()
    data = trial.with_constant("Mul")
    rank = None if part.value.shape is None else len(part.value.shape)
    row = None if data is None or rank is None else _per_channel(data, channels, axis, rank)
    if row is not None:
        part.value, part.nodes = trial.value, trial.nodes
    return row


def _per_channel(data: np.ndarray, channels: int, axis: int, rank: int) -> np.ndarray | None:
    """A constant that broadcasts over a tensor as one value per channel, `[C]`; None: it does not."""
    if data.ndim > rank:
        return None
    data = data.reshape((1,) * (rank - data.ndim) + data.shape)
    place = axis % rank
    if any(size != 1 for index, size in enumerate(data.shape) if index != place):
        return None
    if data.shape[place] not in (1, channels):
        return None
    return np.broadcast_to(data.reshape(-1), (channels,)).astype(np.float32)


def step_silu(part: Part) -> bool:
    """Step over SiLU: `x * sigmoid(x)`, or `x / (1 + exp(-x))`, in the graph's type or in another."""
    for match in (_sigmoid_form, _exponential_form):
        trial = part.copy()
        if match(trial):
            part.value, part.nodes = trial.value, trial.nodes
            return True
    return False


def _sigmoid_form(part: Part) -> bool:
    node = part.value.producer()
    if node is None or node.op_type != "Mul":
        return False
    for index in (0, 1):
        gate = node.inputs[1 - index]
        sigmoid = gate.producer() if gate is not None else None
        if sigmoid is None or sigmoid.op_type != "Sigmoid":
            continue
        if sigmoid.inputs[0] is node.inputs[index] and part.step("Mul", index) is not None:
            part.nodes.add(sigmoid)
            return True
    return False


def _exponential_form(part: Part) -> bool:
    part.step("Cast")
    division = part.step("Div", 1)
    if division is None:
        return False
    unit = part.with_constant("Add")
    exponential = unit is not None and bool((unit == 1).all()) and part.step("Exp")
    if not exponential or part.step("Neg") is None or part.value is not division.inputs[0]:
        return False
    part.step("Cast")
    return True


def _layer_norm(part: Part, prologue: Prologue, plugin: PluginNode) -> bool:
    part.step("Cast")
    rank = None if part.value.shape is None else len(part.value.shape)
    node = part.step("LayerNormalization")
    if node is None:
        return False
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    source = part.value
    part.step("Cast")
    shape = part.value.shape or source.shape
    if shape is None or axis not in (-1, len(shape) - 1) or (rank or len(shape)) != len(shape):
        return False
    rows = [_constant_row(value, plugin.layer.channels) for value in node.inputs[1:]]
    if any(row is None for row in rows):
        return False
    epsilon = node.attributes.get("epsilon")
    prologue.scale, prologue.shift, *_ = (*rows, 0.0, 0.0) if rows else (1.0, 0.0)  # type: ignore[assignment]
    prologue.epsilon = 1e-5 if epsilon is None else epsilon.as_float()
    prologue.changes["norm"] = "layer"
    return True


def _constant_row(value: ir.Value | None, channels: int) -> np.ndarray | None:
    data = value.const_value if value is not None else None
    if data is None or data.size != channels:
        return None
    row: np.ndarray = data.numpy().astype(np.float32).reshape(-1)
    return row


def _gated(part: Part, prologue: Prologue, plugin: PluginNode) -> bool:
    product = part.value.producer()
    if product is None or product.op_type != "Mul":
        return False
    for index in (0, 1):
        value, gate = product.inputs[index], product.inputs[1 - index]
        gelu = gate.producer() if gate is not None else None
        if gelu is None or value is None or gelu.op_type != "Gelu":
            continue
        approximate = gelu.attributes.get("approximate")
        if approximate is not None and approximate.as_string() != "none":
            continue
        split, gates = value.producer(), gelu.inputs[0]
        if split is None or gates is None or split is not gates.producer():
            continue
        if split.op_type != "Split" or list(split.outputs) != [value, gates]:
            continue
        source = split.inputs[0]
        if source is None or source.shape is None or len(source.shape) < 2:
            continue
        axis = split.attributes["axis"].as_int() if "axis" in split.attributes else 0
        if axis % len(source.shape) != len(source.shape) - 1:
            continue
        if source.shape[-1] != 2 * plugin.layer.channels or value.shape != gates.shape:
            continue
        part.nodes |= {product, gelu, split}
        part.value = source
        prologue.changes["norm"] = "gated"
        return True
    return False


def _heads(part: Part, prologue: Prologue, plugin: PluginNode) -> bool:
    """Heads that are joined: `[B, heads, tokens, d]` -> Transpose -> Reshape -> `[B, tokens, C]`."""
    joined = part.value.shape
    if part.step("Reshape") is None or part.step("Transpose", perm=[0, 2, 1, 3]) is None:
        return False
    shape = part.value.shape
    if shape is None or joined is None or len(joined) != 3 or len(shape) != 4:
        return False
    heads, size = shape[1], shape[3]
    if not isinstance(heads, int) or not isinstance(size, int):
        return False
    if heads * size != plugin.layer.channels or joined[2] != plugin.layer.channels:
        return False
    prologue.changes["heads"] = heads
    return True


def _group_norm(part: Part, prologue: Prologue, plugin: PluginNode) -> bool:
    """Cast -> Reshape -> InstanceNormalization -> Reshape -> Mul -> Add -> Cast."""
    channels = plugin.layer.channels
    part.step("Cast")
    shift = part.with_constant("Add")
    scale = part.with_constant("Mul") if shift is not None else None
    if shift is None or scale is None or shift.size != channels or scale.size != channels:
        return False
    ungrouped = part.step("Reshape")
    norm = part.step("InstanceNormalization") if ungrouped is not None else None
    if ungrouped is None or norm is None or not _is_unit(norm):
        return False
    groups = int(norm.inputs[1].const_value.size)  # type: ignore[union-attr]
    grouped = part.step("Reshape")
    if grouped is None or channels % groups:
        return False
    part.step("Cast")
    if part.value.shape is None or len(part.value.shape) != 4 or part.value.shape[1] != channels:
        return False
    wanted = ungrouped.inputs[1]
    sizes = wanted.producer() if wanted is not None else None
    if sizes is None or sizes.op_type != "Shape" or sizes.inputs[0] is not part.value:
        return False
    part.nodes.add(sizes)
    prologue.scale, prologue.shift = scale.reshape(-1), shift.reshape(-1)
    prologue.epsilon = norm.attributes["epsilon"].as_float()
    prologue.changes |= {"norm": "group", "norm_groups": groups}
    _step_image_shift(part, prologue, plugin)
    return True


def _is_unit(norm: ir.Node) -> bool:
    """Whether an InstanceNormalization has the scale 1 and the shift 0."""
    constants = [value.const_value if value is not None else None for value in norm.inputs[1:]]
    if len(constants) != 2 or constants[0] is None or constants[1] is None:
        return False
    return bool((constants[0].numpy() == 1).all()) and not constants[1].numpy().any()


def _step_image_shift(part: Part, prologue: Prologue, plugin: PluginNode) -> None:
    """Step over an Add of one value per image and channel, if nothing else reads the sum."""
    node = part.value.producer()
    if node is None or node.op_type != "Add":
        return
    if any(use.node not in part.nodes for use in part.value.uses()):
        return
    for index in (0, 1):
        x, other = node.inputs[index], node.inputs[1 - index]
        row = _image_row(other, plugin.layer.channels)
        if row is None or x is None or x.shape != part.value.shape or row.dtype != x.dtype:
            continue
        part.nodes.add(node)
        part.value = x
        prologue.image_shift, prologue.changes["shift_first"] = _whole(row)
        return


def _whole(row: ir.Value) -> tuple[ir.Value, int]:
    """The tensor that holds a value `[B, C]`, and the index of its first column in it."""
    node = row.producer()
    if node is None or node.op_type != "Split" or len(node.inputs) < 2:
        return row, 0
    source, sizes = node.inputs[0], node.inputs[1]
    if source is None or sizes is None or sizes.const_value is None or source.shape is None:
        return row, 0
    if node.attributes["axis"].as_int() % len(source.shape) != 1:
        return row, 0
    before = sizes.const_value.numpy()[: list(node.outputs).index(row)]
    return source, int(before.sum())


def _image_row(value: ir.Value | None, channels: int) -> ir.Value | None:
    """The value `[B, C]` that `[B, C, 1, 1]` views; None: it is another tensor."""
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    if [value.shape[1], value.shape[2], value.shape[3]] != [channels, 1, 1]:
        return None
    node = value.producer()
    while node is not None and node.op_type == "Unsqueeze":
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    if value is None or value.shape is None or len(value.shape) != 2:
        return None
    return value if value.shape[1] == channels else None
