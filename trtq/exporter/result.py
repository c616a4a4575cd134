"""Results of `trtq.export`, `trtq.build` and `trtq.verify`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trtq.results import OMITTED_IF_NONE, Result, json_key

__all__ = [
    "BuildResult",
    "BuiltEngine",
    "ComfyFile",
    "ComfyResult",
    "ExportResult",
    "LayerParity",
    "RuleFinding",
    "RuntimeRules",
    "VerifyResult",
]


@dataclass(frozen=True, kw_only=True)
class ExportResult(Result):
    """A finished ONNX folder.

    Attributes:
        parity_db_min: minimum SNR of the graph's noise prediction against torch, in dB.
        parity_db: SNR per step, in dB, cleanest first; the last value is for a batch of mixed steps.
            Images in which a value fell on the other side of a rounding tie are left out, see
            `trtq.exporter.parity.StepParity`. A model with more than half a billion weights has one
            value, see `trtq.exporter.step_check.step_parities`.
        parity_db_pooled_min: minimum SNR over all images, in dB.
        parity_ties: share of images that were left out.
        parity_floor_db: SNR of torch against itself, in dB, with inputs that differ in the last bit.
        parity_largest_db: minimum SNR at the largest size of a range of sizes, in dB.
        parity_parts_db: SNR of text encoders and autoencoder, in dB, by component.
        bytes: size of the denoiser's graph with its weights, in bytes.
        seconds: duration of the whole call, in seconds.
        peak_rss_bytes: peak resident memory, in bytes; the sum of both processes while
            `trtq.exporter.component_worker` runs a second process.
    """

    parity_db_min: float
    parity_db: list[float]
    parity_db_pooled_min: float
    parity_ties: float
    parity_floor_db: list[float]
    parity_largest_db: float
    parity_parts_db: dict[str, float]
    bytes: int
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class ComfyFile(Result):
    """A file for ComfyUI, which holds one denoiser.

    Attributes:
        path: path of the file.
        names: `original`, the names of the model's authors, or `diffusers`.
        formats: number of quantised layers by the name of their format.
        layers_quantized: number of quantised layers of the file.
        bytes: size of the file, in bytes.
        notes: what of the run the file does not hold.
    """

    path: str
    names: str
    formats: dict[str, int]
    layers_quantized: int
    bytes: int
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class ComfyResult(Result):
    """The files that `trtq.export` wrote for ComfyUI.

    Attributes:
        files: one entry per denoiser.
        seconds: duration of the whole call, in seconds.
        peak_rss_bytes: peak resident memory, in bytes.
    """

    files: list[ComfyFile]
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class BuiltEngine(Result):
    """The engine of one graph.

    Attributes:
        name: name of the graph's component.
        engine_bytes: size of the engine, in bytes.
        layers: number of layers of the engine; None if the builder does not report it.
        float_layers: number of the manifest's layers that stay in float; `float` in JSON. None for a
            component that is float altogether.
        parse_seconds: duration of parsing the graph, in seconds.
        build_seconds: duration of the build, in seconds; for a cached engine, of its original build.
        peak_rss_bytes: peak resident memory of the builder's process, in bytes.
        cached: whether the engine comes from the cache.
        warnings: warnings of the builder.
        plugins: location of the plugins' kernels: `engine` (the engine then needs no Python) or
            `python`; None if there are no plugins.
        precisions: number of low-bit layers by their precision in the builder's network, e.g. `INT8`,
            `INT4 weight`, `FP8`, `FP4` or `plugin`; equal to the plan of the manifest.
        inspected: number of low-bit layers whose precision the engine's inspector confirmed; 0 where no
            GPU can load the engine.
    """

    name: str
    engine_bytes: int
    layers: int | None
    float_layers: int | None = field(metadata=json_key("float"))
    parse_seconds: float
    build_seconds: float
    peak_rss_bytes: int
    cached: bool
    warnings: list[str]
    plugins: str | None
    precisions: dict[str, int]
    inspected: int


@dataclass(frozen=True, kw_only=True)
class BuildResult(Result):
    """A finished folder of engines.

    Attributes:
        engine_bytes: total size of all engines, in bytes.
        seconds: duration of the whole call, in seconds.
        peak_rss_bytes: largest peak resident memory of the builder's processes, in bytes; 0 if all
            engines were cached.
        backend: `tensorrt-rtx` or `tensorrt`.
        version: version of the backend.
        architectures: GPU architectures that the engines run on, e.g. `sm86`.
        engines: one entry per graph.
    """

    engine_bytes: int
    seconds: float
    peak_rss_bytes: int
    backend: str
    version: str
    architectures: list[str]
    engines: list[BuiltEngine]


@dataclass(frozen=True, kw_only=True)
class RuleFinding(Result):
    """A rule of a runtime that a layer breaks.

    Attributes:
        layer: name of the layer.
        rule: requirement of the runtime.
        fix: remedy.
        fatal: whether the runtime refuses the layer; otherwise it runs the layer in float.
        former_fix: same as `fix`, under its earlier JSON key, for one release.
    """

    layer: str
    rule: str
    fix: str
    fatal: bool
    former_fix: str = field(metadata=json_key("mend"))


@dataclass(frozen=True, kw_only=True)
class RuntimeRules(Result):
    """Result of checking a graph against the rules of one runtime.

    Attributes:
        legal: whether the runtime accepts the graph.
        findings: broken rules.
    """

    legal: bool
    findings: list[RuleFinding]


@dataclass(frozen=True, kw_only=True)
class LayerParity(Result):
    """Agreement of a layer's output in the graph with torch.

    Attributes:
        name: name of the layer.
        snr_db: SNR of the output, in dB.
    """

    name: str
    snr_db: float


@dataclass(frozen=True, kw_only=True)
class VerifyResult(Result):
    """The outcome of a verification.

    Attributes:
        kind: `run`, `onnx` or `engine`.
        files: number of files whose SHA-256 was checked.
        ok: whether every check passed.
        graphs: problem of each graph or engine by component, None for one without a problem; None for a
            run.
        runtimes: result by runtime; empty if a graph cannot be opened; None unless the artefact is an
            ONNX folder.
        parity_db: SNR against torch per step, in dB, cleanest first; the last value belongs to a batch
            of mixed steps. None if no run was given.
        parity_db_min: minimum of `parity_db`.
        parity_required_db: required SNR, in dB.
        layers: SNR by low-bit layer, in the order of execution; None unless requested.
        first: name of the first layer with a lower SNR than a flipped code causes; None without one.
    """

    kind: str
    files: int
    ok: bool
    graphs: dict[str, str | None] | None = field(default=None, metadata=OMITTED_IF_NONE)
    runtimes: dict[str, RuntimeRules] | None = field(default=None, metadata=OMITTED_IF_NONE)
    parity_db: list[float] | None = field(default=None, metadata=OMITTED_IF_NONE)
    parity_db_min: float | None = field(default=None, metadata=OMITTED_IF_NONE)
    parity_required_db: float | None = field(default=None, metadata=OMITTED_IF_NONE)
    layers: list[LayerParity] | None = field(default=None, metadata=OMITTED_IF_NONE)
    first: str | None = None

    def _by_key(self) -> dict[str, Any]:
        values = super()._by_key()
        if self.layers is None:
            del values["first"]
        return values
