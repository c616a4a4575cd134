"""Job and answer of the builder's process."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["NEEDS_PYTHON", "Answer", "Job", "PluginForm", "Profile"]

Profile = dict[str, tuple[list[int], list[int], list[int]]]
"""Minimum, optimum and maximum shape of every input with a free axis."""

PluginForm = Literal["engine", "python"]
"""Location of the kernels of an engine's plugins: in the engine, or in this package, which the engine
then needs."""

NEEDS_PYTHON = "the engine needs Python and trtq to run"
"""Start of the warning that kernels are not in the engine although the builder supports that."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Job(_Strict):
    """One engine to build.

    Attributes:
        module: Python module of the builder, see `Backend`.
        graph: ONNX file prepared for the builder, see `trtq.graph.runtimes.prepare.prepare`.
        engine: file to write.
        architectures: GPU architectures to build for.
        profiles: shape ranges, one optimisation profile each.
        weight_streaming: whether weights may stay on the host, for models larger than the GPU's memory.
        refit: whether weights can be exchanged in the finished engine; needs a GPU.
        workspace_bytes: maximum scratch memory on the device for one operator, in bytes; None: no limit.
        plan: planned precision of every low-bit layer, see
            `trtq.engine.tensorrt.precisions.network_precisions`.
    """

    module: str
    graph: Path
    engine: Path
    architectures: list[str]
    profiles: list[Profile]
    weight_streaming: bool = False
    refit: bool = False
    workspace_bytes: int | None = None
    plan: dict[str, str] = {}


class Answer(_Strict):
    """Result of a build.

    Attributes:
        error: message of the error; None: the engine was built.
        layer: layer that caused the error, if the builder names it.
        layers: number of layers of the parsed network.
        parse_seconds: duration of parsing the ONNX file to a network, in seconds.
        build_seconds: duration of building the engine from the network, in seconds.
        peak_rss_bytes: peak resident memory of the builder's process, in bytes.
        warnings: warnings of the builder.
        plugins: location of the kernels of the engine's plugins; None: the engine has no plugins.
        precisions: number of the plan's layers by precision, in the network.
        inspected: number of the plan's layers whose precision the engine's inspector showed, too.
        shortfall: layers that do not run as planned, each with the reason.
    """

    error: str | None = None
    layer: str | None = None
    layers: int = 0
    parse_seconds: float = 0.0
    build_seconds: float = 0.0
    peak_rss_bytes: int = 0
    warnings: list[str] = []
    plugins: PluginForm | None = None
    precisions: dict[str, int] = {}
    inspected: int = 0
    shortfall: list[str] = []
