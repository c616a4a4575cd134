"""Rules for formats other than integers, see `trtq.graph.runtimes.legality`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from trtq.graph.runtimes.findings import Finding, constant_of, input_of, layer_of

__all__ = ["ARCHITECTURES", "MIN_ARCHITECTURE", "architecture_findings", "capable", "int8_blocks"]

ARCHITECTURES = ("sm75", "sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121")
"""GPU architectures, oldest first."""
MIN_ARCHITECTURE = {
    ir.DataType.INT4: ("INT4 weights", "sm80"),
    ir.DataType.FLOAT8E4M3FN: ("FP8", "sm89"),
    ir.DataType.FLOAT4E2M1: ("NVFP4", "sm100"),
}
"""Name of a format and the oldest architecture that computes it, by type of its codes. TensorRT-RTX 1.7
refuses older ones, e.g. "the model contains HW-specific datatypes: fp8_e4m3"."""


def int8_blocks(node: ir.Node) -> Iterator[Finding]:
    """8-bit codes with scales per group, which full TensorRT does not support."""
    stored = constant_of(input_of(node, 0)) if "block_size" in node.attributes else None
    if stored is not None and stored.dtype in (ir.DataType.INT8, ir.DataType.UINT8):
        yield Finding(
            layer_of(node),
            "the weight has scales per blocks of INT8 codes; only INT4, FP4 and FP8 have blocks",
            "quantise with --group 0: one scale per output channel",
        )


def capable(dtype: ir.DataType, architecture: str) -> bool:
    """Whether an architecture computes with codes of a type; also true for unknown architectures."""
    if dtype not in MIN_ARCHITECTURE or architecture not in ARCHITECTURES:
        return True
    oldest = MIN_ARCHITECTURE[dtype][1]
    return ARCHITECTURES.index(architecture) >= ARCHITECTURES.index(oldest)


def architecture_findings(model: ir.Model, architectures: Iterable[str]) -> list[Finding]:
    """Find the first layer of each format that an architecture cannot compute.

    Args:
        model: the graph, rewritten for TensorRT by `trtq.graph.runtimes.prepare.prepare`.
        architectures: GPU architectures, e.g. `sm86`; unknown names are not checked.
    """
    findings = []
    seen: set[ir.DataType] = set()
    names = list(architectures)
    for node in model.graph:
        for value in node.inputs:
            stored = constant_of(value)
            if stored is None or stored.dtype in seen or stored.dtype not in MIN_ARCHITECTURE:
                continue
            seen.add(stored.dtype)
            format, oldest = MIN_ARCHITECTURE[stored.dtype]
            unable = [name for name in names if not capable(stored.dtype, name)]
            if unable:
                findings.append(
                    Finding(
                        layer_of(node),
                        f"{', '.join(unable)} cannot compute {format}, which needs {oldest} or later",
                        f"leave out --arch {unable[0]}, or quantise in another format: `trtq doctor "
                        f"--advise {unable[0]}` names those that suit it",
                    )
                )
    return findings
