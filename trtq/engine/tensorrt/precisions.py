"""Precision of the low-bit layers in a parsed network and in a built engine, by the public interfaces.

The network of a strongly typed build says for every product which types its operands have; the builder
may not change them. The inspector of an engine says which types the inputs of a kernel have, if the
engine was built with detailed information and can be loaded. Several layers that one compiled region
computes are hidden in it; their precision stays unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["engine_precisions", "low_bit_layers", "network_precisions", "shortfall"]

_CALL = "/call_"
_PARTS = ("conv", "matmul", "plugin")
_LOW = ("INT8", "INT4", "FP8", "FP4")
_MAX_STEPS = 8
_NAMES = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_TYPES = re.compile(r"\b(int8|int4|fp8|fp4|float8|float4)", re.IGNORECASE)


def network_precisions(trt: Any, network: Any) -> dict[str, str]:
    """The precision of every low-bit layer of a network, by name.

    Args:
        trt: Python module of the builder.
        network: the parsed network.

    Returns:
        `INT8`, `FP8` or `FP4` if both operands have this type; `INT4 weight` or `INT8 weight` if only
        the second operand has; `plugin`; else `float`.
    """
    makers: dict[str, Any] = {}
    products = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for place in range(layer.num_outputs):
            output = layer.get_output(place)
            if output is not None:
                makers[output.name] = layer
        if low_bit_layers(layer.name):
            products.append(layer)
    kinds = trt.LayerType
    precisions: dict[str, str] = {}
    for layer in products:
        if layer.type == kinds.PLUGIN_V3:
            precision = "plugin"
        elif layer.type in (kinds.CONVOLUTION, kinds.MATRIX_MULTIPLY):
            types = [_operand(kinds, makers, layer.get_input(place)) for place in (0, 1)]
            precision = _precision(types)
        else:
            continue
        for name in low_bit_layers(layer.name):
            # Of several calls, one in float counts.
            if precisions.get(name, precision) in (precision, "float"):
                precisions.setdefault(name, precision)
            else:
                precisions[name] = "float"
    return precisions


def low_bit_layers(node: str) -> list[str]:
    """The layers of a product's node `LAYER/matmul` or `LAYER/call_2/matmul`; none for other nodes.

    The plugin node of merged layers is `LAYER+LAYER/plugin`.
    """
    calls, _, part = node.rpartition("/")
    calls = calls.removesuffix("/product")  # NVFP4 has one more level.
    if not calls or part not in _PARTS:
        return []
    return [call.partition(_CALL)[0] for call in calls.split("+")]


def _operand(kinds: Any, makers: Mapping[str, Any], tensor: Any) -> str | None:
    """The type of the numbers that an operand is dequantised from; None: it is not dequantised."""
    for _ in range(_MAX_STEPS):
        layer = None if tensor is None else makers.get(tensor.name)
        if layer is None:
            return None
        if layer.type == kinds.DEQUANTIZE:
            return str(layer.get_input(0).dtype.name)
        if layer.type not in (kinds.SHUFFLE, kinds.CAST, kinds.IDENTITY):
            return None
        tensor = layer.get_input(0)
    return None


def _precision(types: Sequence[str | None]) -> str:
    first, second = types
    if second not in _LOW:
        return "float"
    if first is None:
        return f"{second} weight"
    return second if first == second else "float"


def engine_precisions(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The precision of the low-bit layers that an engine's inspector shows as layers of their own.

    Args:
        rows: the engine's layers, as TensorRT's inspector reports them in detail.

    Returns:
        `low-bit` or `float` by name; layers inside a compiled region are left out.
    """
    precisions: dict[str, str] = {}
    for row in rows:
        metadata = str(row.get("Metadata", ""))
        nodes = _NAMES.findall(metadata) or [str(row.get("Name", ""))]
        layers = [name for node in nodes for name in low_bit_layers(node)]
        inputs = row.get("Inputs")
        if len(layers) != 1 or not isinstance(inputs, list):
            continue
        types = [str(entry.get("Format/Datatype", entry.get("Datatype", ""))) for entry in inputs]
        if not any(types):
            continue
        low = any(_TYPES.search(text) for text in types)
        precisions[layers[0]] = "low-bit" if low else "float"
    return precisions


def shortfall(
    plan: Mapping[str, str], network: Mapping[str, str], engine: Mapping[str, str]
) -> list[str]:
    """The layers that do not run as planned, each with the reason.

    Args:
        plan: planned precision of each low-bit layer, see `network_precisions`.
        network: precision of the layers in the network.
        engine: precision of the layers in the engine, see `engine_precisions`; empty: not known.
    """
    problems = []
    for name, planned in plan.items():
        actual = network.get(name, "missing")
        if actual != planned:
            problems.append(f"{name} ({planned} planned, {actual} in the network)")
        elif engine.get(name) == "float":
            problems.append(f"{name} ({planned} planned, float in the engine)")
    return problems
