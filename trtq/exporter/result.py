"""What `trtq.export`, `trtq.build` and `trtq.verify` return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trtq.results import OMITTED_IF_NONE, Result, json_key

__all__ = [
    "BuildResult",
    "BuiltEngine",
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
        parity_db: SNR per step, cleanest first; the last value belongs to a batch of mixed steps.
            Images in which a value fell on the other side of a rounding tie are left out, see
            `trtq.exporter.parity.StepParity`. A model with more than half a billion weights has one
            value, see `trtq.exporter.step_check.step_parities`.
        parity_db_pooled_min: minimum SNR without leaving out any image.
        parity_ties: share of images that were left out.
        parity_floor_db: SNR of torch against itself with inputs that differ in the last bit.
        parity_largest_db: minimum SNR at the largest size of a range of sizes.
        parity_parts_db: SNR of text encoders and autoencoder, by component.
        bytes: size of the denoiser's graph with its weights.
        seconds: duration of the whole call, in seconds.
        peak_rss_bytes: peak resident memory; of both processes together while
            `trtq.exporter.component_worker` runs a second one.
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
class BuiltEngine(Result):
    """The engine of one graph.

    Attributes:
        name: name of the graph's component.
        engine_bytes: size of the engine.
        layers: number of layers of the engine; None if the builder does not report it.
        float_layers: number of the manifest's layers that stay in float; `float` in JSON. None for a
            component that is float altogether.
        parse_seconds: time of parsing the graph, in seconds.
        build_seconds: time of building, in seconds; for a cached engine that of its original build.
        peak_rss_bytes: peak resident memory of the builder's process.
        cached: whether the engine comes from the cache.
        warnings: warnings of the builder.
        plugins: where the kernels of the plugins are: `engine`, which then needs no Python, or
            `python`; None if there are no plugins.
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


@dataclass(frozen=True, kw_only=True)
class BuildResult(Result):
    """A finished folder of engines.

    Attributes:
        engine_bytes: size of all engines together.
        seconds: duration of the whole call, in seconds.
        peak_rss_bytes: largest peak of the builder's processes; 0 if all engines were cached.
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
    """One rule of a runtime that a layer breaks.

    Attributes:
        layer: name of the layer.
        rule: what the runtime requires.
        fix: what to do about it.
        fatal: whether the runtime refuses the layer; otherwise it runs the layer in float.
        former_fix: the same as `fix`, under its earlier JSON key, for one release.
    """

    layer: str
    rule: str
    fix: str
    fatal: bool
    former_fix: str = field(metadata=json_key("mend"))


@dataclass(frozen=True, kw_only=True)
class RuntimeRules(Result):
    """A graph against the rules of one runtime.

    Attributes:
        legal: whether the runtime accepts the graph.
        findings: broken rules.
    """

    legal: bool
    findings: list[RuleFinding]


@dataclass(frozen=True, kw_only=True)
class LayerParity(Result):
    """A layer's output in the graph against torch.

    Attributes:
        name: name of the layer.
        snr_db: SNR, in dB.
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
        graphs: by component, what is wrong with its graph or engine; None where nothing is. None
            altogether for a run.
        runtimes: rules by runtime; empty if a graph cannot be opened; None unless the artefact is an
            ONNX folder.
        parity_db: SNR against torch per step, in dB, cleanest first; the last value belongs to a batch
            of mixed steps. None without a run to compare with.
        parity_db_min: minimum of `parity_db`.
        parity_required_db: SNR that is required, in dB.
        layers: SNR by low-bit layer, in the order of execution; None unless requested.
        first: name of the first layer below the SNR that a flipped code causes; None if there is none.
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
