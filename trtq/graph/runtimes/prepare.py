"""What each runtime wants changed in the exported graph before it reads it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from trtq.errors import ArtefactError, TrtqError
from trtq.processor import has_vnni

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["RUNTIMES", "Runtime", "external_files", "has_vnni", "load_graph", "prepare"]

Runtime = Literal["onnxruntime", "openvino", "tensorrt-rtx", "tensorrt"]
_LONGEST = 400
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)


def load_graph(path: Path) -> ir.Model:
    """Read a graph; its external data are read when they are needed, and must lie in its folder.

    Raises:
        ArtefactError: the file cannot be read, or its external data are elsewhere or cut.
    """
    import onnx_ir as ir

    if not path.is_file():  # A pipe would be waited for.
        raise ArtefactError(f"{path} is no file")
    if path.stat().st_size == 0:
        raise ArtefactError(f"{path} is empty")
    try:
        model = ir.load(path)
    except Exception as err:  # protobuf's DecodeError has no public base.
        text = " ".join(str(err).split())[:_LONGEST]
        raise ArtefactError(f"cannot read {path}: {text or type(err).__name__}") from err
    for tensor in _external_tensors(model):
        _check_external(path, tensor)
    return model


def external_files(model: ir.Model) -> set[str]:
    """The files that a graph takes weights from, relative to its folder."""
    return {Path(str(tensor.location)).as_posix() for tensor in _external_tensors(model)}


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    import onnx_ir as ir

    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value


def _check_external(path: Path, tensor: ir.ExternalTensor) -> None:
    """Refuse data outside the graph's folder, in no plain file, or beyond its end.

    Raises:
        ArtefactError: so they are.
    """
    location = str(tensor.location)
    file = path.parent / location
    if Path(location).is_absolute() or not Path(os.path.realpath(file)).is_relative_to(
        os.path.realpath(path.parent)
    ):
        raise ArtefactError(
            f"{path} takes {tensor.name!r} from {location[:100]!r}, outside its folder; do not use it"
        )
    if not file.is_file():
        raise ArtefactError(
            f"{path} takes {tensor.name!r} from {location[:100]!r}, which is no file"
        )
    size, begin = file.stat().st_size, tensor.offset or 0
    length = tensor.nbytes if tensor.length is None else tensor.length
    if begin < 0 or length < 0 or begin + length > size:
        raise ArtefactError(
            f"{path} takes {tensor.name!r} from byte {begin} to {begin + length} of {location[:100]!r}, "
            f"which has {size} bytes: it was cut"
        )


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

    from trtq.graph.passes import (
        BreakUniformScales,
        CastFloat64ToFloat32,
        CastInt4ToInt8,
        CastsToQdq,
        DecomposeGroupNorm,
        ExpandPlugins,
        FuseGroupNorm,
        MatMulToConv,
        WideProductsToFloat,
        WideWeightsToFloat,
    )

    if runtime in ("onnxruntime", "openvino"):
        ExpandPlugins()(model)
    if runtime == "onnxruntime":
        if has_vnni():
            CastsToQdq()(model)
        return model
    if runtime == "openvino":
        DecomposeGroupNorm()(model)  # The autoencoder's graphs still have them.
    FuseGroupNorm()(model)
    CastFloat64ToFloat32()(model)
    saturates = runtime == "openvino" and not has_vnni()
    if saturates:
        WideProductsToFloat()(model)
    CastsToQdq()(model)
    if saturates:
        WideWeightsToFloat()(model)
        MatMulToConv()(model)
        BreakUniformScales()(model)
    if runtime != "openvino":
        CastInt4ToInt8()(model)
    # The rewrites leave constants behind; a builder would read them and keep them in memory.
    RemoveUnusedNodesPass()(model)
    return model
