"""Graphs on onnxruntime: its own CPU provider, OpenVINO and CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trtq._optional import require
from trtq.engine.base import TensorSpec
from trtq.errors import ArtefactError, UsageError

__all__ = ["PROVIDERS", "OrtEngine", "available_providers"]

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cuda": "CUDAExecutionProvider",
}

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def available_providers() -> list[str]:
    """Those of `PROVIDERS` that the installed onnxruntime has."""
    present = require("onnxruntime").get_available_providers()
    return [name for name, long in PROVIDERS.items() if long in present]


def _has_vnni() -> bool:
    """Whether the processor adds int8 products in int32; assumed where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return "flags" not in text or "vnni" in text


def _for_openvino(path: Path) -> bytes:
    """The graph without what OpenVINO's provider cannot take or would compute wrongly here.

    It has no float64, and without VNNI its integer products saturate where both factors have 8 bits.

    Raises:
        ArtefactError: the file cannot be read.
    """
    import onnx_ir as ir

    from trtq.export.passes import FloatWideProducts, FloatWideWeights, NarrowDoubles

    try:
        model = ir.load(path)
    except Exception as err:  # protobuf's DecodeError has no public base.
        raise ArtefactError(f"cannot read {path}: {err}") from err
    NarrowDoubles()(model)
    if not _has_vnni():
        FloatWideWeights()(model)
        FloatWideProducts()(model)
    serialized: bytes = ir.to_proto(model).SerializeToString()
    return serialized


class OrtEngine:
    """An ONNX file in an onnxruntime session.

    Args:
        path: the graph; its external data lie beside it.
        provider: one of `PROVIDERS`.
        threads: threads of one operator; None: as many as there are cores.

    Raises:
        UsageError: the provider is unknown or not in the installed onnxruntime.
        ArtefactError: the file cannot be loaded.
    """

    def __init__(self, path: Path, provider: str = "cpu", threads: int | None = None) -> None:
        ort = require("onnxruntime")
        if provider not in PROVIDERS:
            raise UsageError(f"unknown provider {provider!r}; choose one of {', '.join(PROVIDERS)}")
        if provider not in available_providers():
            raise UsageError(
                f"the installed onnxruntime has no provider {provider!r}, it has "
                f"{', '.join(available_providers())}; install trtq with another extra: "
                "[cpu] brings cpu and openvino, [gpu] brings cuda"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        # int8 x int8 as it is written: without it onnxruntime prefers uint8 activations, whose product
        # saturates on processors without VNNI.
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        settings: dict[str, str] = {}
        model: str | bytes = str(path)
        if provider == "openvino":
            # OpenVINO does its own fusions, and finds fewer of them after onnxruntime's.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            settings = {"device_type": "CPU", "precision": "FP32"}
            if threads is not None:
                settings["num_of_threads"] = str(threads)
            model = _for_openvino(path)
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(path.parent)
            )
        try:
            self._session = ort.InferenceSession(
                model, options, providers=[(PROVIDERS[provider], settings)]
            )
            # Otherwise a provider that fails goes over to the CPU's, and says so on standard output.
            self._session.disable_fallback()
        except Exception as err:  # onnxruntime's own exceptions share no base but Exception.
            raise ArtefactError(f"onnxruntime cannot load {path}: {err}") from err
        if PROVIDERS[provider] not in self._session.get_providers():
            raise UsageError(
                f"the provider {provider!r} cannot start on this machine; onnxruntime fell back to "
                f"{', '.join(self._session.get_providers())}"
            )
        self._provider = provider

    @property
    def provider(self) -> str:
        """Name of what runs it."""
        return self._provider

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The graph's inputs by name."""
        return {
            node.name: TensorSpec(np.dtype(_DTYPES[node.type]), tuple(node.shape))
            for node in self._session.get_inputs()
        }

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """The graph's outputs by name."""
        return {
            node.name: TensorSpec(np.dtype(_DTYPES[node.type]), tuple(node.shape))
            for node in self._session.get_outputs()
        }

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the graph's file says about itself."""
        found: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        return found

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; arrays by name, batch first."""
        names = [node.name for node in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
