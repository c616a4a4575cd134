"""Runs graphs with plugin nodes in numpy: onnx's reference evaluator, with the plugins' references."""

import numpy as np
import onnx_ir as ir
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from trtq.plugins.fused.attributes import (
    FUSED_FIELDS,
    FUSED_PLUGINS,
    Fusion,
    fusion_of,
    input_names,
)
from trtq.plugins.fused.reference import prepared, silu
from trtq.plugins.low_bit import reference
from trtq.plugins.low_bit.attributes import INPUTS, PLUGINS, spec_of
from trtq.plugins.low_bit.pack import unpack_bytes, unpack_nibbles

__all__ = ["evaluate"]


def integers_of(layer, operands):
    groups = 1 if layer.geometry is None else layer.geometry.groups
    if layer.weight_bits == 8:
        return unpack_bytes(operands["weight"], layer.channels // groups)
    codes = unpack_nibbles(operands["weight"], layer.channels // groups).astype(np.int16)
    return (codes - operands["terms"][2].reshape(-1, 1, 1, 1)).astype(np.int8)


def compute(name, fields, inputs):
    if name in PLUGINS:
        layer, fusion = spec_of(name, fields), Fusion()
    else:
        layer, fusion = fusion_of(name, fields)
    names = input_names(fusion) if name in FUSED_PLUGINS else INPUTS
    operands = dict(zip(names, inputs, strict=True))
    x, linear = operands["x"], layer.geometry is None
    first = not linear and not fusion.x_last
    values = prepared(
        x, fusion, operands.get("affine"), operands.get("image_shift"), channels_first=first
    )
    outer = values.shape[:-1]
    if linear:
        values = values.reshape(len(values), -1, 1, layer.channels)
    values = values if first else values.transpose(0, 3, 1, 2)
    numbers = [operands[key] for key in ("terms", "tables", "step")]
    y = reference.low_bit(values, integers_of(layer, operands), *numbers, layer.geometry)
    if linear or fusion.out_last:
        y = y.transpose(0, 2, 3, 1)
    y = y.reshape(*outer, -1) if linear else y
    if fusion.residual:
        y = y + operands["residual"].astype(np.float32)
    return np.ascontiguousarray((silu(y) if fusion.silu else y).astype(x.dtype))


def operator(name):
    def run(self, *inputs, **_):
        fields = {
            attribute.name: list(attribute.ints)
            for attribute in self.onnx_node.attribute
            if attribute.name in FUSED_FIELDS
        }
        return (compute(name, fields, inputs),)

    return type(name, (OpRun,), {"op_domain": "trtq", "_run": run})


OPERATORS = [operator(name) for name in (*PLUGINS, *FUSED_PLUGINS)]


def evaluate(model, feeds):
    """The outputs of a graph."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy(), dtype=value.dtype)
    proto = ir.to_proto(model)
    if not any(entry.domain == "trtq" for entry in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid("trtq", 1))
    return ReferenceEvaluator(proto, new_ops=OPERATORS).run(None, feeds)
