"""What a build is to reach: its GPU architectures, and the precision of every low-bit layer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_rows import LayerRow
from trtq.engine.tensorrt.job import Answer
from trtq.engine.tensorrt.precisions import low_bit_layers
from trtq.errors import BuildError, UsageError
from trtq.graph.nodes import DOMAIN
from trtq.graph.runtimes.findings import Finding
from trtq.graph.runtimes.format_rules import MIN_ARCHITECTURE, capable

__all__ = ["check_plan", "planned_precisions", "suitable_architectures"]

logger = logging.getLogger(__name__)

_DTYPES = {
    "weight_only": ir.DataType.INT4,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "nvfp4": ir.DataType.FLOAT4E2M1,
}


_NAMED = 5
"""Number of layers that a message names."""
_OPERANDS = {"int": "INT8", "fp8": "FP8", "nvfp4": "FP4"}


def planned_precisions(
    layers: Iterable[LayerRow], model: ir.Model, findings: Iterable[Finding]
) -> dict[str, str]:
    """The precision that every low-bit layer has in the network of a builder.

    Args:
        layers: layers of the denoiser.
        model: the denoiser's graph, prepared for the builder.
        findings: broken rules; a layer that the builder computes in float is left out, as is one that
            the graph does not compute.

    Returns:
        The precision by layer, as `trtq.engine.tensorrt.precisions.network_precisions` names it.
    """
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    plugins = {name for node in nodes for name in low_bit_layers(node.name or "")}
    floats = {finding.layer for finding in findings}
    present = {name for node in model.graph for name in low_bit_layers(node.name or "")}
    plan = {}
    for row in layers:
        # A result that the model does not use is not in the graph, e.g. the text of the last block.
        if row.activation_bits is None or row.name in floats or row.name not in present:
            continue
        if row.name in plugins:
            plan[row.name] = "plugin"
        elif row.format == "weight_only":
            plan[row.name] = f"INT{row.weight_bits} weight"
        else:
            plan[row.name] = _OPERANDS[row.format]
    return plan


def check_plan(backend: str, name: str, answer: Answer) -> None:
    """Raise unless every low-bit layer runs in its planned precision, as far as the builder tells.

    Args:
        backend: name of the builder.
        name: name of the graph's component.
        answer: answer of the builder.

    Raises:
        BuildError: layers do not; the message names the first ones.
    """
    problems = answer.shortfall
    if problems:
        planned = sum(answer.precisions.values())
        more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise BuildError(
            f"{backend} does not compute {len(problems)} of {planned} low-bit layers of {name} as "
            f"planned: {', '.join(problems[:_NAMED])}{more}; report this, with the output of "
            "trtq verify ONNX"
        )


def suitable_architectures(names: Sequence[str], manifest: Manifest) -> list[str]:
    """Those of the default architectures that can compute every layer of an artefact.

    Args:
        names: the default architectures.
        manifest: manifest of the artefact.

    Raises:
        UsageError: none of them can.
    """
    needed = {
        _DTYPES[row.format]
        for row in [*manifest.layers, *(r for part in manifest.further for r in part.layers)]
        if row.format in _DTYPES and (row.format, row.weight_bits) != ("weight_only", 8)
    }
    chosen = [name for name in names if all(capable(dtype, name) for dtype in needed)]
    formats = ", ".join(sorted(MIN_ARCHITECTURE[dtype][0] for dtype in needed))
    if not chosen:
        raise UsageError(f"none of {', '.join(names)} computes {formats}; name others with --arch")
    left_out = [name for name in names if name not in chosen]
    if left_out:
        logger.warning("not built for %s, which cannot compute %s", ", ".join(left_out), formats)
    return chosen
