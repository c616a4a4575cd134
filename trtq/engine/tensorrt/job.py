"""What the builder's process is asked, and what it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["NEEDS_PYTHON", "Answer", "Job", "PluginForm", "Profile"]

Profile = dict[str, tuple[list[int], list[int], list[int]]]
"""Smallest, most frequent and largest shape of every input with a free axis."""

PluginForm = Literal["engine", "python"]
"""Where an engine's own kernels are: inside it, or in this package, which it then needs to run."""

NEEDS_PYTHON = "the engine needs Python and trtq to run"
"""Begins the warning of an engine whose kernels could be inside it and are not."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Job(_Strict):
    """One engine to build.

    Attributes:
        module: of the builder, see `Backend`.
        graph: ONNX file as the builder takes it, see `trtq.graph.runtimes.prepare.prepare`.
        engine: where to write.
        architectures: to build for.
        profiles: one optimisation profile each.
        weight_streaming: let weights stay on the host, for models larger than the GPU's memory.
        refit: let weights be exchanged in the finished engine; needs a GPU.
        workspace_bytes: most memory on the device for one operator's scratch; None: all there is.
    """

    module: str
    graph: Path
    engine: Path
    architectures: list[str]
    profiles: list[Profile]
    weight_streaming: bool = False
    refit: bool = False
    workspace_bytes: int | None = None


class Answer(_Strict):
    """How it went.

    Attributes:
        error: None when the engine is there.
        layer: that the error is about, if the builder says.
        layers: of the network after parsing.
        parse_seconds: from ONNX to a network.
        build_seconds: from a network to an engine.
        peak_rss_bytes: of the builder's process.
        warnings: what the builder said beside.
        plugins: where the kernels of the engine's plugins are; None: it has no plugins.
    """

    error: str | None = None
    layer: str | None = None
    layers: int = 0
    parse_seconds: float = 0.0
    build_seconds: float = 0.0
    peak_rss_bytes: int = 0
    warnings: list[str] = []
    plugins: PluginForm | None = None
