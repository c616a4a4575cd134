"""Quantisers, timestep tables, quantised layers, packing, and the conversion of a denoiser."""

from trtq.precision import Method
from trtq.quant.activation import ActivationQuantizer, ZeroPointMode
from trtq.quant.attention_channels import scale_channels
from trtq.quant.convert import convert, deploy, merge
from trtq.quant.denoiser import QuantizedDenoiser
from trtq.quant.deployed import DeployedLayer
from trtq.quant.fake_quant import fake_quant
from trtq.quant.input_transform import (
    InputTransform,
    TransformTensors,
    hadamard,
    transform_layer,
)
from trtq.quant.layers import QuantConv, QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear
from trtq.quant.modules import Base, QuantLayer
from trtq.quant.packing import PackedWeight, pack_codes, unpack_codes
from trtq.quant.plan import (
    LayerPlan,
    LowBitTensors,
    layer_kind,
    layer_obstacle,
    precision_text,
    quantizable_layers,
)
from trtq.quant.product import QuantProduct
from trtq.quant.ranges import activation_qparams, weight_qparams
from trtq.quant.structure import Structure, apply_structure, attention_modules, skip_splits
from trtq.quant.tensors import ActivationTensors, LayerTensors, ProductTensors
from trtq.quant.timestep import TimestepTable, current_step, float_scope, step_scope

__all__ = [
    "ActivationQuantizer",
    "ActivationTensors",
    "Base",
    "DeployedLayer",
    "InputTransform",
    "LayerPlan",
    "LayerTensors",
    "LowBitTensors",
    "Method",
    "PackedWeight",
    "ProductTensors",
    "QuantConv",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantLayer",
    "QuantLinear",
    "QuantProduct",
    "QuantizedDenoiser",
    "Structure",
    "TimestepTable",
    "TransformTensors",
    "ZeroPointMode",
    "activation_qparams",
    "apply_structure",
    "attention_modules",
    "convert",
    "current_step",
    "deploy",
    "fake_quant",
    "float_scope",
    "hadamard",
    "layer_kind",
    "layer_obstacle",
    "merge",
    "pack_codes",
    "precision_text",
    "quantizable_layers",
    "scale_channels",
    "skip_splits",
    "step_scope",
    "transform_layer",
    "unpack_codes",
    "weight_qparams",
]
