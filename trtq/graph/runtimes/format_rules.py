"""Rules for formats other than integers, see `trtq.graph.runtimes.legality`."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from trtq.graph.runtimes.findings import Finding, constant_of, input_of, layer_of

__all__ = ["int8_blocks"]


def int8_blocks(node: ir.Node) -> Iterator[Finding]:
    """8-bit codes with scales per group, which full TensorRT does not support."""
    stored = constant_of(input_of(node, 0)) if "block_size" in node.attributes else None
    if stored is not None and stored.dtype in (ir.DataType.INT8, ir.DataType.UINT8):
        yield Finding(
            layer_of(node),
            "the weight has scales per blocks of INT8 codes; only INT4, FP4 and FP8 have blocks",
            "quantise with --group 0: one scale per output channel",
        )
