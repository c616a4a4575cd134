"""Quantisers, timestep tables, quantised layers, packing, and converting a model."""

from trtq.quant.activation import ActivationQuantizer, ZeroPointMode
from trtq.quant.convert import (
    LayerPlan,
    LowBitTensors,
    QuantizedDenoiser,
    convert,
    deploy,
    layer_kind,
    merge,
    precision_text,
    quantizable_layers,
)
from trtq.quant.deployed import ActivationTensors, DeployedLayer, LayerTensors, ProductTensors
from trtq.quant.fake_quant import fake_quant
from trtq.quant.modules import Base, QuantConv2d, QuantLayer, QuantLinear, QuantProduct
from trtq.quant.packing import PackedWeight, pack_codes, unpack_codes
from trtq.quant.ranges import Method, activation_qparams, weight_qparams
from trtq.quant.structure import Structure, apply_structure, attention_modules, skip_splits
from trtq.quant.timestep import TimestepTable, current_step, float_scope, step_scope

__all__ = [
    "ActivationQuantizer",
    "ActivationTensors",
    "Base",
    "DeployedLayer",
    "LayerPlan",
    "LayerTensors",
    "LowBitTensors",
    "Method",
    "PackedWeight",
    "ProductTensors",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "QuantProduct",
    "QuantizedDenoiser",
    "Structure",
    "TimestepTable",
    "ZeroPointMode",
    "activation_qparams",
    "apply_structure",
    "attention_modules",
    "convert",
    "current_step",
    "deploy",
    "fake_quant",
    "float_scope",
    "layer_kind",
    "merge",
    "pack_codes",
    "precision_text",
    "quantizable_layers",
    "skip_splits",
    "step_scope",
    "unpack_codes",
    "weight_qparams",
]
