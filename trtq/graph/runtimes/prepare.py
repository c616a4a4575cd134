"""Reading of exported graphs, and rewriting for each runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from trtq.errors import ArtefactError, TrtqError
from trtq.processor import has_vnni

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["RUNTIMES", "Runtime", "external_files", "load_graph", "prepare"]

Runtime = Literal["onnxruntime", "openvino", "tensorrt-rtx", "tensorrt"]
_MAX_LENGTH = 400
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)


def load_graph(path: Path) -> ir.Model:
    """Read a graph; its external data are read on demand.

    Returns:
        The graph as an `onnx_ir` model.

    Raises:
        ArtefactError: the file cannot be read, or its external data are truncated or in another folder.
    """
    import onnx_ir as ir

    if not path.is_file():  # Opening a pipe would block.
        raise ArtefactError(f"{path} is not a file")
    if path.stat().st_size == 0:
        raise ArtefactError(f"{path} is empty")
    try:
        model = ir.load(path)
    except Exception as err:  # protobuf's DecodeError has no public base.
        text = " ".join(str(err).split())[:_MAX_LENGTH]
        raise ArtefactError(f"cannot read {path}: {text or type(err).__name__}") from err
    for tensor in _external_tensors(model):
        _check_external(path, tensor)
    return model


def external_files(model: ir.Model) -> set[str]:
    """The files of a graph's external data, relative to its folder."""
    return {Path(str(tensor.location)).as_posix() for tensor in _external_tensors(model)}


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    import onnx_ir as ir

    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value


def _check_external(path: Path, tensor: ir.ExternalTensor) -> None:
    """Raise unless a tensor's data are in a plain file in the graph's folder, and complete.

    Args:
        path: file of the graph.
        tensor: tensor of the graph.

    Raises:
        ArtefactError: the data are elsewhere, in no plain file, or beyond the end of the file.
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
            f"{path} takes {tensor.name!r} from {location[:100]!r}, which is not a file"
        )
    size, begin = file.stat().st_size, tensor.offset or 0
    length = tensor.nbytes if tensor.length is None else tensor.length
    if begin < 0 or length < 0 or begin + length > size:
        raise ArtefactError(
            f"{path} takes {tensor.name!r} from byte {begin} to {begin + length} of {location[:100]!r}, "
            f"which has {size} bytes: it was cut"
        )


def prepare(model: ir.Model, runtime: Runtime, *, fuse: bool = True) -> ir.Model:
    """Rewrite an exported graph, in place, so that a runtime supports it and computes it correctly.

    1. Plugin nodes stay for TensorRT, and become quantise-dequantise pairs for the other runtimes. For
       TensorRT-RTX, plugin nodes also compute what stands before and behind their layers unless `fuse`
       is false; full TensorRT may put kernels into its engines, which then have one launch per layer.
       Products in NVFP4 become TensorRT's operators, or standard ones for the other runtimes.
    2. For onnxruntime's own providers the graph does not change without VNNI. With VNNI, pairs do not
       saturate and run in integers, so cast codes become pairs again.
    3. OpenVINO and TensorRT do not support float64, but have a kernel for group norms; TensorRT does not
       support INT4 in front of a Cast, needs pairs of FP8, and no one-dimensional convolutions of pairs.
    4. In OpenVINO without VNNI, integer products saturate if both factors have 8 bits, so such layers
       are computed in float. Its matrix products are slow, so all others become convolutions, whose
       weights must not have equal scales.

    Args:
        model: an exported graph.
        runtime: runtime that is to run the graph.
        fuse: whether plugins compute more than their layers, see `trtq.graph.runtimes.fuse_plugins`.

    Returns:
        The model.

    Raises:
        ArtefactError: trtq did not export the graph, and a rewrite fails on an unexpected structure.
    """
    try:
        return _rewritten(model, runtime, fuse=fuse)
    except TrtqError:
        raise
    except Exception as err:
        text = " ".join(str(err).split())
        raise ArtefactError(
            f"the graph {model.graph.name!r} is not one that trtq wrote and cannot be rewritten for "
            f"{runtime}: {type(err).__name__}: {text}"
        ) from err


def _rewritten(model: ir.Model, runtime: Runtime, *, fuse: bool) -> ir.Model:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    from trtq.graph.passes import DecomposeGroupNorm, ExpandPlugins
    from trtq.graph.runtimes.break_uniform_scales import BreakUniformScales
    from trtq.graph.runtimes.casts_to_qdq import CastsToQdq
    from trtq.graph.runtimes.flat_convs import FlatConvs
    from trtq.graph.runtimes.float64_to_float32 import CastFloat64ToFloat32
    from trtq.graph.runtimes.fp8_casts_to_qdq import Fp8CastsToQdq
    from trtq.graph.runtimes.fuse_group_norm import FuseGroupNorm
    from trtq.graph.runtimes.fuse_plugins import FUSIONS
    from trtq.graph.runtimes.int4_to_int8 import CastInt4ToInt8
    from trtq.graph.runtimes.matmul_to_conv import MatMulToConv
    from trtq.graph.runtimes.nvfp4 import ExpandNvfp4
    from trtq.graph.runtimes.wide_products_to_float import WideProductsToFloat
    from trtq.graph.runtimes.wide_weights_to_float import WideWeightsToFloat

    ExpandNvfp4(native=runtime.startswith("tensorrt"))(model)
    if runtime in ("onnxruntime", "openvino"):
        ExpandPlugins()(model)
    if runtime == "onnxruntime":
        if has_vnni():
            CastsToQdq()(model)
        return model
    if runtime == "openvino":
        # Only graphs of the autoencoder still contain GroupNormalization.
        DecomposeGroupNorm()(model)
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
        Fp8CastsToQdq()(model)
        FlatConvs()(model)
    if fuse and runtime == "tensorrt-rtx":
        for rewrite in FUSIONS:
            rewrite()(model)
    # The rewrites leave unused constants in the graph, which a builder would keep in memory.
    RemoveUnusedNodesPass()(model)
    return model
