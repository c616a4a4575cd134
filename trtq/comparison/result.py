"""Result of `trtq.compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from trtq.results import OMITTED_IF_NONE, Result

__all__ = [
    "Bisection",
    "CompareResult",
    "ComparedCall",
    "ComparedLayer",
    "joined",
    "joined_bisections",
]


@dataclass(frozen=True, kw_only=True)
class ComparedCall(Result):
    """Agreement of one output of the denoiser in one call.

    Attributes:
        output: name of the output.
        timestep: timestep of the call; None for the batch of mixed steps.
        snr_db: SNR in dB over the images without a flipped code, see
            `trtq.exporter.parity.StepParity`.
        pooled_db: SNR in dB over all images.
        required_db: required SNR, in dB.
        ties: share of images with a flipped code, which were set aside.
        ok: whether `snr_db` reaches `required_db`.
        denoiser: name of the denoiser of a recorded pipeline; None for another pipeline.
    """

    output: str
    timestep: float | None
    snr_db: float
    pooled_db: float
    required_db: float
    ties: float
    ok: bool
    denoiser: str | None = field(default=None, metadata=OMITTED_IF_NONE)


@dataclass(frozen=True, kw_only=True)
class ComparedLayer(Result):
    """Agreement of one low-bit layer's output, over all calls.

    Attributes:
        name: name of the layer.
        snr_db: minimum SNR over the calls, in dB.
        required_db: required SNR in that call, in dB.
        timestep: timestep of that call; None for the batch of mixed steps.
        ok: whether the SNR reached the required one in every call.
        denoiser: see `ComparedCall`.
    """

    name: str
    snr_db: float
    required_db: float
    timestep: float | None
    ok: bool
    denoiser: str | None = field(default=None, metadata=OMITTED_IF_NONE)


@dataclass(frozen=True, kw_only=True)
class Bisection(Result):
    """The low-bit layers that have to be in float for the output to agree.

    Attributes:
        layers: the layers, in the order of the model; empty if no choice of layers repairs the output,
            or nothing has to be repaired.
        policy: the rule for a policy file that keeps these layers in float, in TOML; None: no layers.
        snr_db: minimum SNR of the output with these layers in float, in dB.
        comparisons: number of comparisons that were made.
    """

    layers: list[str]
    policy: str | None
    snr_db: float
    comparisons: int


@dataclass(frozen=True, kw_only=True)
class CompareResult(Result):
    """Comparison of two artefacts by polygraphy.

    Attributes:
        ok: whether every output agrees in every call, as polygraphy's `compare_accuracy` judges it.
        reference: the side that the other one is compared with, e.g. `run (torch)`.
        other: the other side, e.g. `onnx (cpu)`.
        same_numbers: whether both sides were made from one run, or are one float model; if not, the
            bound is the rounding noise of the formats.
        snr_db_min: minimum SNR of an output, in dB.
        required_db: required SNR of the prediction, in dB; see `ComparedCall` for each call.
        calls: one entry per call and output, cleanest step first, a batch of mixed steps last; of a
            recorded pipeline denoiser by denoiser, in the order of the pipeline's call.
        layers: one entry per low-bit layer, in the order of execution; None unless requested.
        first: name of the first layer that leaves its bound; None without one.
        bisection: the layers that repair the output in float; None unless requested.
        folder: folder of the files; None if none was requested.
        files: names of the files that were written.
        command: polygraphy's command that repeats the comparison, to be run in the folder; None unless a
            script was requested.
    """

    ok: bool
    reference: str
    other: str
    same_numbers: bool
    snr_db_min: float
    required_db: float
    calls: list[ComparedCall]
    layers: list[ComparedLayer] | None = field(default=None, metadata=OMITTED_IF_NONE)
    first: str | None = field(default=None, metadata=OMITTED_IF_NONE)
    bisection: Bisection | None = field(default=None, metadata=OMITTED_IF_NONE)
    folder: str | None = field(default=None, metadata=OMITTED_IF_NONE)
    files: list[str] | None = field(default=None, metadata=OMITTED_IF_NONE)
    command: str | None = field(default=None, metadata=OMITTED_IF_NONE)


def joined(results: Sequence[CompareResult]) -> CompareResult:
    """One result for the denoisers of a pipeline; all have the same sides."""
    return replace(
        results[0],
        ok=all(result.ok for result in results),
        snr_db_min=min(result.snr_db_min for result in results),
        required_db=min(result.required_db for result in results),
        calls=[call for result in results for call in result.calls],
    )


def joined_bisections(bisections: Sequence[Bisection]) -> Bisection:
    """One bisection for the denoisers of a pipeline."""
    policies = [bisection.policy for bisection in bisections if bisection.policy is not None]
    return Bisection(
        layers=list(dict.fromkeys(name for bisection in bisections for name in bisection.layers)),
        policy="\n\n".join(dict.fromkeys(policies)) or None,
        snr_db=min(bisection.snr_db for bisection in bisections),
        comparisons=sum(bisection.comparisons for bisection in bisections),
    )
