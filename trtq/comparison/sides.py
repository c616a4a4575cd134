"""The two sides of a comparison: a float model, a run, an ONNX folder or engines, on one provider."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_file import parse_manifest
from trtq.artefact.manifest_rows import FurtherRow, LayerRow
from trtq.artefact.opened import (
    Checkpoint,
    EngineFolder,
    GraphFolder,
    OnnxFolder,
    Opened,
    Run,
    StoredArtefact,
    open_artefact,
)
from trtq.artefact.recorded import is_recorded
from trtq.comparison.lineage import lineage, origins
from trtq.comparison.noise import noise_bound_db
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.engine.base import Engine
from trtq.engine.recorded import CallGraph
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.errors import UsageError
from trtq.exporter.step_check import PARITY_DB
from trtq.graph.file import model_file
from trtq.pipelines.open import TORCH, open_any
from trtq.runs.folder import open_run

__all__ = ["LastBits", "Side", "check_layered", "hold_same_numbers", "ordered_sides", "required_db"]


LastBits = dict[str, tuple[Tensor, ...]]
"""By layer and input, the difference of a runtime's floats from torch's in each channel."""


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a comparison.

    Attributes:
        opened: the artefact or checkpoint.
        provider: what computes it: `torch`, a provider of onnxruntime, or the builder of engines.
        label: name of the side in tables and in polygraphy's results, e.g. `onnx (cpu)`.
        recorded: whether the pipeline is used through its own call only.
        part: name of the denoiser that is compared, of a recorded pipeline; None: the only one.
        call_graph: graph of the calls that are compared, of a recorded pipeline.
    """

    opened: Opened
    provider: str
    label: str
    recorded: bool = False
    part: str | None = None
    call_graph: CallGraph | None = None
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def source(self) -> LoadedPipeline:
        """The pipeline around the denoiser, loaded at the first use."""
        source: LoadedPipeline = self._once("source", self._load)
        return source

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns at the first use of a name; all parts of a side share it."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def last_bits(self, measure: Callable[[], LastBits]) -> LastBits:
        """The last bits of the runtime, measured once for the denoiser and graph that are compared."""
        folder = None if self.call_graph is None else self.call_graph.row.folder
        bits: LastBits = self._once(f"last bits {self.part} {folder}", measure)
        return bits

    def _load(self) -> LoadedPipeline:
        if self.recorded and isinstance(self.opened, Checkpoint):
            return open_pipeline(self.opened.place, self.opened.config, recorded=True)
        return open_any(self.opened, None if self.in_torch else self.provider)

    def at(self, part: str, call_graph: CallGraph | None) -> Side:
        """The side at one denoiser of a recorded pipeline, and one graph of its calls."""
        return replace(self, part=part, call_graph=call_graph)

    @property
    def module(self) -> nn.Module:
        """The denoiser that is compared, as it stands in the pipeline."""
        return self._in(self.source)

    def _in(self, source: LoadedPipeline) -> nn.Module:
        module: nn.Module = (
            source.denoiser if self.part is None else getattr(source.pipeline, self.part)
        )
        return module

    @property
    def in_torch(self) -> bool:
        """Whether torch computes this side."""
        return isinstance(self.opened, Checkpoint | Run)

    @property
    def manifest(self) -> Manifest | None:
        """The manifest; None for a checkpoint."""
        return self.opened.manifest if isinstance(self.opened, StoredArtefact) else None

    @property
    def row(self) -> Manifest | FurtherRow | None:
        """Entry of the denoiser in the manifest; None for a checkpoint."""
        if self.manifest is None or self.part is None:
            return self.manifest
        return next(row for row in self.manifest.denoisers if row.denoiser == self.part)

    @property
    def layers(self) -> list[LayerRow]:
        """The low-bit layers, in the order of the model."""
        rows = [] if self.row is None else self.row.layers
        return [row for row in rows if row.activation_bits is not None]

    @property
    def engine(self) -> Engine:
        """The engine of the denoiser's graph."""
        if self.call_graph is not None:
            return self.call_graph.engine
        denoiser: Any = self.module
        engine: Engine = denoiser.engine
        return engine

    @property
    def file(self) -> Path:
        """File of the denoiser's graph or engine."""
        assert isinstance(self.opened, GraphFolder)
        row = None if self.call_graph is None else self.call_graph.row
        return model_file(
            self.opened.folder / (self.opened.denoiser if row is None else row.folder)
        )

    @property
    def graph(self) -> Path | None:
        """File of the denoiser's graph; None for what has none."""
        return self.file if isinstance(self.opened, OnnxFolder) else None

    def torch_denoiser(self) -> nn.Module | None:
        """The denoiser in torch: that of this side, or of the run that a graph was exported from.

        None: the run is not at hand.
        """
        if self.in_torch:
            return self.module
        for folder in origins(self.opened):
            if parse_manifest(folder).kind == "run":
                return self._in(open_run(folder).source())
        return None


def _open_side(place: str | Path | Opened, provider: str | None) -> Side:
    """Open an artefact or checkpoint.

    Raises:
        UsageError: the provider cannot compute it, or its engines are of another version.
    """
    opened = open_artefact(place, verify=False)
    named = isinstance(opened.place, str | Path)
    name = Path(opened.place).name if named else type(opened.place).__name__
    if isinstance(opened, EngineFolder):
        _check_version(opened)
        chosen = provider or opened.backend
        if chosen != opened.backend:
            raise UsageError(
                f"{opened.place} is a folder of engines; run it with {opened.backend}, not {chosen}"
            )
    elif isinstance(opened, OnnxFolder):
        chosen = provider or "cpu"
        if chosen == TORCH:
            raise UsageError(f"{opened.place} is an ONNX folder, which torch does not run")
    else:
        chosen = provider or TORCH
        if chosen != TORCH:
            raise UsageError(f"{opened.place} runs in torch only, not with {chosen}")
    return Side(opened, chosen, f"{name} ({chosen})")


def _check_version(opened: EngineFolder) -> None:
    """Raise unless the installed builder has the version that built the engines.

    Raises:
        UsageError: it has another version.
    """
    backend, built = BACKENDS[opened.backend], opened.options.version
    if backend.installed and built not in (None, backend.version):
        raise UsageError(
            f"{opened.place} was built by {backend.name} {built}, and {backend.version} is installed; "
            f"build it again: trtq build ONNX -o {opened.place} --overwrite"
        )


def ordered_sides(
    first: str | Path | Opened,
    second: str | Path | Opened,
    providers: Sequence[str | None] = (None, None),
) -> tuple[Side, Side]:
    """Open both sides; the first of the result is the reference.

    The reference is the side that is nearer to the float model: float, run, ONNX on onnxruntime's CPU
    provider, ONNX on another provider, engine. Of two equal ones it is `second`.

    Args:
        first: an artefact, a checkpoint, or one of them opened.
        second: another one, or the same one on another provider.
        providers: provider of each side; None: `torch`, `cpu`, or the builder of the engines.

    Raises:
        UsageError: a provider cannot compute its side, or both sides are the same.
    """
    given = _open_side(first, providers[0])
    other = _open_side(second, providers[1])
    if given.label == other.label:
        if str(given.opened.place) == str(other.opened.place):
            raise UsageError(
                f"both sides are {given.label}; name another artefact or another provider: "
                "--provider, --against-provider"
            )
        other = replace(other, label=f"{other.label} 2")
    given, other = _alike(given, other)
    return (given, other) if _distance(given) < _distance(other) else (other, given)


def check_layered(sides: Sequence[Side], option: str) -> None:
    """Raise unless the layers of both sides are known.

    Args:
        sides: the sides.
        option: option of the command that needs the layers.

    Raises:
        UsageError: a side is an engine; the message says what to compare instead.
    """
    for side in sides:
        if isinstance(side.opened, EngineFolder):
            onnx = side.opened.manifest.source.name
            raise UsageError(
                f"{option} needs the layers, and {side.label} is a folder of engines, which hide them; "
                f"compare the graphs that they were built from, on the CPU: trtq verify {onnx} "
                f"--against RUN {option}"
            )


def _alike(first: Side, second: Side) -> tuple[Side, Side]:
    """Both sides, used through the pipeline's own call if one of them was recorded inside it.

    Raises:
        UsageError: only one of two artefacts was recorded.
    """
    recorded = [is_recorded(side.opened) for side in (first, second)]
    if not any(recorded):
        return first, second
    for side, known in ((first, recorded[0]), (second, recorded[1])):
        if not known and side.manifest is not None:
            other = second if side is first else first
            raise UsageError(
                f"{other.label} was recorded inside its pipeline's call, and {side.label} was not; "
                "compare artefacts of one model, quantised in the same way"
            )
    return replace(first, recorded=True), replace(second, recorded=True)


def _distance(side: Side) -> int:
    """Rank of a side: the number of translations from the float model."""
    kinds = {Checkpoint: 0, Run: 1, OnnxFolder: 2, EngineFolder: 4}
    return kinds[type(side.opened)] + (type(side.opened) is OnnxFolder and side.provider != "cpu")


def hold_same_numbers(first: Side, other: Side) -> bool:
    """Whether both sides were made from one run, or are one float model."""
    if first.opened.low_bit != other.opened.low_bit:
        return False
    if not first.opened.low_bit:
        return True
    return bool(lineage(first.opened) & lineage(other.opened))


def required_db(reference: Side, other: Side) -> float:
    """Required SNR of the prediction, in dB.

    Two forms of one run differ in the last bits of floats and in half precision, see
    `trtq.exporter.step_check.PARITY_DB`. A low-bit model and its float model differ by the rounding
    noise of every low-bit layer, see `trtq.comparison.noise.noise_bound_db`.
    """
    rounding = min(PARITY_DB[side.opened.precision] for side in (reference, other))
    if hold_same_numbers(reference, other):
        return rounding
    return min(rounding, noise_bound_db([*reference.layers, *other.layers]))
