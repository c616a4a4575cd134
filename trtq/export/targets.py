"""What each runtime wants changed in the exported graph before it reads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from trtq.errors import ArtefactError, TrtqError
from trtq.processor import has_vnni

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["RUNTIMES", "Runtime", "has_vnni", "load_graph", "prepare"]

Runtime = Literal["onnxruntime", "openvino", "tensorrt-rtx", "tensorrt"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)


def load_graph(path: Path) -> ir.Model:
    """Read a graph; its external data are read when they are needed.

    Raises:
        ArtefactError: the file cannot be read.
    """
    import onnx_ir as ir

    try:
        return ir.load(path)
    except Exception as err:  # protobuf's DecodeError has no public base.
        raise ArtefactError(f"cannot read {path}: {err}") from err


def prepare(model: ir.Model, runtime: Runtime) -> ir.Model:
    """Rewrite a graph of ours, in place, into what a runtime takes and computes rightly.

    Plugin nodes stay for TensorRT, and become quantise-dequantise pairs for the others. Then
    onnxruntime's own providers take it as it is, where there is no VNNI; with it their products of cast
    codes do not saturate as pairs, which run in integers. OpenVINO and TensorRT have no float64 and a
    kernel for group norms; TensorRT takes no INT4 in front of a Cast. Without VNNI, OpenVINO's integer
    products saturate where both factors have 8 bits, so those layers are computed in float, and its
    products of matrices are slow, so the others are given to it as convolutions, whose weights must not
    all have the same scale.

    Returns:
        The model.

    Raises:
        ArtefactError: it is no graph of ours, so that a rewrite does not find what it relies on.
    """
    try:
        return _rewritten(model, runtime)
    except TrtqError:
        raise
    except Exception as err:
        text = " ".join(str(err).split())
        raise ArtefactError(
            f"the graph {model.graph.name!r} is not one that trtq wrote and cannot be rewritten for "
            f"{runtime}: {type(err).__name__}: {text}"
        ) from err


def _rewritten(model: ir.Model, runtime: Runtime) -> ir.Model:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    from trtq.export.passes import (
        ExpandPlugins,
        FloatWideProducts,
        FloatWideWeights,
        FuseGroupNorm,
        LinearAsConv,
        NarrowDoubles,
        PairCastCodes,
        SpellOutGroupNorm,
        UnevenScales,
        WidenInt4,
    )

    if runtime in ("onnxruntime", "openvino"):
        ExpandPlugins()(model)
    if runtime == "onnxruntime":
        if has_vnni():
            PairCastCodes()(model)
        return model
    if runtime == "openvino":
        SpellOutGroupNorm()(model)  # The autoencoder's graphs still have them.
    FuseGroupNorm()(model)
    NarrowDoubles()(model)
    saturates = runtime == "openvino" and not has_vnni()
    if saturates:
        FloatWideProducts()(model)
    PairCastCodes()(model)
    if saturates:
        FloatWideWeights()(model)
        LinearAsConv()(model)
        UnevenScales()(model)
    if runtime != "openvino":
        WidenInt4()(model)
    # The rewrites leave constants behind; a builder would read them and keep them in memory.
    RemoveUnusedNodesPass()(model)
    return model
