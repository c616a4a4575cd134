"""Quantisers, timestep tables, quantised layers, packing, and converting a model."""

from trtq.quant.activation import ActivationQuantizer, ZeroPointMode
from trtq.quant.convert import (
    LayerPlan,
    QuantizedDenoiser,
    convert,
    deploy,
    merge,
    quantizable_layers,
)
from trtq.quant.deployed import DeployedLayer, LayerTensors
from trtq.quant.fake_quant import fake_quant
from trtq.quant.modules import Base, QuantConv2d, QuantLayer, QuantLinear
from trtq.quant.packing import PackedWeight, pack_codes, unpack_codes
from trtq.quant.ranges import Method, activation_qparams, weight_qparams
from trtq.quant.timestep import TimestepTable, current_step, float_scope, step_scope

__all__ = [
    "ActivationQuantizer",
    "Base",
    "DeployedLayer",
    "LayerPlan",
    "LayerTensors",
    "Method",
    "PackedWeight",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "QuantizedDenoiser",
    "TimestepTable",
    "ZeroPointMode",
    "activation_qparams",
    "convert",
    "current_step",
    "deploy",
    "fake_quant",
    "float_scope",
    "merge",
    "pack_codes",
    "quantizable_layers",
    "step_scope",
    "unpack_codes",
    "weight_qparams",
]
