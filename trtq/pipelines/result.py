"""Results of `trtq.generate` and `trtq.inspect`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trtq.results import OMITTED_IF_NONE, Result

__all__ = [
    "CheckpointLayer",
    "GenerateResult",
    "InspectResult",
    "InspectedArtefact",
    "InspectedCheckpoint",
    "InspectedDenoiser",
    "InspectedEngines",
    "InspectedGraph",
    "InspectedLayer",
]


@dataclass(frozen=True, kw_only=True)
class GenerateResult(Result):
    """Written images, videos or sounds.

    Attributes:
        output: requested file or folder.
        files: written files.
        images: number of images, videos or sounds.
        labels: class of each image; None for a model without classes.
        prompts: prompt of each image; None for a model without prompts.
        steps: number of denoising steps; None if neither the call nor the pipeline gives one.
        seed: seed of the starting noise.
        seconds: duration of generating all images, in seconds.
        media: `video` or `audio`; None for images.
    """

    output: str
    files: list[str]
    images: int
    labels: list[int] | None
    prompts: list[str] | None
    steps: int | None
    seed: int
    seconds: float
    media: str | None = field(default=None, metadata=OMITTED_IF_NONE)


@dataclass(frozen=True, kw_only=True)
class InspectedLayer(Result):
    """A layer of an artefact; see `trtq.artefact.manifest_rows.LayerRow` for the other fields.

    Attributes:
        scale: scale per step, by input; None unless the artefact is a run.
        zero_points: distinct zero points; None unless the artefact is a run.
    """

    name: str
    kind: str
    weight_bits: int | None
    activation_bits: int | None
    right_bits: int | None
    adapters: bool
    reason: str
    input_of: str | None
    format: str
    group: int | None
    smooth: bool
    rotate: int
    scales: str
    outlier_ratio: float | None
    scale: dict[str, list[float]] | None = field(default=None, metadata=OMITTED_IF_NONE)
    zero_points: list[int] | None = field(default=None, metadata=OMITTED_IF_NONE)


@dataclass(frozen=True, kw_only=True)
class CheckpointLayer(Result):
    """A layer of a float checkpoint.

    Attributes:
        name: module path in the denoiser.
        shape: shape of the weight.
    """

    name: str
    shape: list[int]


@dataclass(frozen=True, kw_only=True)
class InspectResult(Result):
    """Contents of an artefact or a checkpoint.

    Attributes:
        kind: `checkpoint`, `run`, `onnx` or `engine`.
        source: checkpoint or artefact that the artefact was made from, or the checkpoint's own name.
        precisions: number of layers by precision.
    """

    kind: str
    source: str
    precisions: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class InspectedCheckpoint(InspectResult):
    """Contents of a float checkpoint.

    Attributes:
        denoiser: class of the denoiser.
        parameters: number of the denoiser's parameters.
        scheduler: class of the scheduler.
        layers: layers that can be quantised.
    """

    denoiser: str
    parameters: int
    scheduler: str
    layers: list[CheckpointLayer]


@dataclass(frozen=True, kw_only=True)
class InspectedGraph(Result):
    """A graph of a recorded denoiser.

    Attributes:
        folder: folder of the graph.
        inputs: names of the tensors of the call.
        free: free axes as texts, e.g. `axis 0: 1 or more (batch)`, by name of the tensor.
        fixed: reason why the graph supports one value only, by `batch`, `prompt` or `size`.
    """

    folder: str
    inputs: list[str]
    free: dict[str, list[str]]
    fixed: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class InspectedDenoiser(Result):
    """A denoiser that was recorded inside its pipeline's call.

    Attributes:
        name: name of the component.
        model: class of the denoiser.
        timestep: argument that holds the timestep.
        calls: number of the denoiser's calls during one call of the pipeline.
        timesteps: calibrated timesteps, smallest first; None for a float model.
        precisions: number of layers by precision.
        graphs: graphs, one per form of the call; empty for a run.
    """

    name: str
    model: str
    timestep: str
    calls: int
    timesteps: list[float] | None
    precisions: dict[str, int]
    graphs: list[InspectedGraph]


@dataclass(frozen=True, kw_only=True)
class InspectedArtefact(InspectResult):
    """Contents of a run or an ONNX folder.

    Attributes:
        bytes: size of all files, in bytes.
        recipe: how the model was quantised; None for a float model.
        timesteps: calibrated timesteps, cleanest first; None for a float model.
        layers: one entry per layer of the denoiser.
        options: options of the export or the build, as in the manifest.
        metrics: measurements taken while the artefact was made, as in the manifest.
        packages: versions of the packages that made the artefact.
        denoisers: the denoisers that were recorded inside the pipeline's call, of which `layers` and
            `timesteps` describe the first; None for an artefact that was not recorded.
        graphs: each graph or engine as polygraphy's inspector shows it, by folder; None unless
            requested.
    """

    bytes: int
    recipe: dict[str, Any] | None
    timesteps: list[float] | None
    layers: list[InspectedLayer]
    options: dict[str, Any]
    metrics: dict[str, Any]
    packages: dict[str, str]
    denoisers: list[InspectedDenoiser] | None = field(default=None, metadata=OMITTED_IF_NONE)
    graphs: dict[str, str] | None = field(default=None, metadata=OMITTED_IF_NONE)


@dataclass(frozen=True, kw_only=True)
class InspectedEngines(InspectedArtefact):
    """Contents of a folder of engines.

    Attributes:
        engine_layers: layers of the denoiser's engine as the backend's inspector reports them; None
            without a GPU to load the engine.
        engine_layers_missing: reason why `engine_layers` is None.
        low_bit_layers: number of low-bit layers by their precision in the builder's network, see
            `trtq.exporter.result.BuiltEngine`; None for engines of earlier versions.
    """

    engine_layers: list[dict[str, Any]] | None
    engine_layers_missing: str | None
    low_bit_layers: dict[str, int] | None = field(default=None, metadata=OMITTED_IF_NONE)
